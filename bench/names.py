"""Part h: the resolver under load, asked by dnsperf."""

from bench.isolated import run_program
from bench.measure import Results, percentile
from bench.metrics import WEFT
from lab.terminal import Terminal

SIZE = 10_000
RATE = 5_000
_PATIENCE = 60.0


def measure(results: Results, terminal: Terminal, *, rounds: int, seconds: int) -> None:
    for number in range(rounds):
        with terminal.step(f"{RATE:,} questions a second among {SIZE:,} names, round {number + 1} of {rounds}"):
            steady = run_program("names", str(SIZE), str(RATE), str(seconds), timeout=_PATIENCE)
        for metric, who in (("dns_p99_ms", "weft"), ("dns_echo_p99_ms", "echo")):
            milliseconds = [second * 1000 for second in steady[who]["seconds"]]
            results.add(metric, WEFT, percentile(milliseconds, 99), milliseconds)
        results.add("dns_lost", WEFT, steady["weft"]["lost"])
        with terminal.step("as many as it answers"):
            most = run_program("names", str(SIZE), "0", str(seconds), timeout=_PATIENCE)
        results.add("dns_most_qps", WEFT, most["weft"]["rate"])
