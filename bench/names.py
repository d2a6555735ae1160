"""Part h: the resolver under load, asked by dnsperf; and how soon a container's name comes and goes on another host."""

from time import monotonic

from bench.isolated import run_program
from bench.measure import Results, percentile
from bench.metrics import WEFT
from bench.rig import Rig
from lab.host import RESOLVER
from lab.process import LabError
from lab.terminal import Terminal
from tests.engine.asking import askers

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


def measure_changes(rig: Rig, results: Results, terminal: Terminal, *, samples: int) -> None:
    """From the return of `docker run` and `docker kill` on one host; a container on the other asks every 4 ms."""
    with askers() as inside, terminal.step(f"{samples} names come and go on the other host"):
        ask = inside(rig.h2, rig.resident(WEFT, 1))
        for number in range(samples):
            name = f"bench-name-{number}"
            container = rig.start(WEFT, "--name", name)
            for metric, until in (("name_come_ms", "answered"), ("name_gone_ms", "gone")):
                began = monotonic()
                reply = ask(name, server=RESOLVER, until=until, patience=_PATIENCE)
                if bool(reply.answers) != (until == "answered"):
                    raise LabError(f"{name} was not {until} within {_PATIENCE:g} s: {reply.code}")
                results.add(metric, WEFT, (reply.at - began) * 1000)
                if until == "answered":
                    rig.h1.docker("kill", container)
            rig.remove(container)
