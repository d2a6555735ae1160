"""Part i: what encryption costs, by the WireGuard that this machine has; and what a mesh of many hosts costs each."""

from functools import partial

from bench import traffic
from bench.isolated import run_program
from bench.measure import Results
from bench.metrics import WEFT
from bench.rig import Rig
from lab.terminal import Terminal

PEERS = 1_000
_PATIENCE = 60.0


def measure(rig: Rig, results: Results, terminal: Terminal, *, rounds: int, seconds: int, trips: int) -> None:
    with terminal.step("an encrypted network beside the plain one"):
        variants = [WEFT, rig.encrypt()]
    measures: dict[str, traffic.Measure] = {
        "encrypted_tcp_gbps": partial(traffic.tcp, streams=1, seconds=seconds),
        "encrypted_rtt_us": partial(traffic.round_trips, trips=trips),
    }
    traffic.compare(rig, results, terminal, variants, measures, rounds)


def measure_peers(results: Results, terminal: Terminal, *, times: int) -> None:
    with terminal.step(f"{PEERS:,} WireGuard peers"):
        for seconds in run_program("peers", str(PEERS), str(times), timeout=_PATIENCE):
            results.add("peers_1000_s", WEFT, seconds)
