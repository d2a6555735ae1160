"""Part b: how long a user waits for a container, and until it can be reached; and, part c, weft's share of that.

Two starts of each variant in a round. The first is just `docker run`: nothing else goes on. During the second a
container at the other end pings the address that the new one will have; it is told to Docker with `--ip`.
"""

import json
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from time import monotonic, sleep

from bench.calls import AT_START, CallTable, in_handlers, read_calls
from bench.inside import first_ping
from bench.measure import Results, in_turn
from bench.metrics import BRIDGE, OVERLAY, WEFT
from bench.rig import Rig
from lab.process import LabError
from lab.terminal import Terminal

VARIANTS = [BRIDGE, OVERLAY, WEFT]

_PING = [sys.executable, "-I", str(Path(first_ping.__file__))]
_PATIENCE = 20.0
_SETTLE = 0.3


def measure(rig: Rig, results: Results, calls: CallTable, terminal: Terminal, *, rounds: int) -> None:
    starts = _Starts(rig, results)
    with terminal.step("container starts, warm-up"):
        for variant in VARIANTS:
            starts.remove(rig.start(variant))
    for number in range(rounds):
        with terminal.step(f"container starts, round {number + 1} of {rounds}"):
            for variant in in_turn(VARIANTS, number):
                log = starts.log()
                starts.start(variant)
                starts.start_and_ping(variant, rig.address(variant, number))
                if variant == WEFT:
                    calls.add(read_calls(starts.log()[len(log) :]), starts=2)


class _Starts:
    def __init__(self, rig: Rig, results: Results) -> None:
        self._rig = rig
        self._results = results

    def start(self, variant: str) -> None:
        log = self.log()
        began = monotonic()
        container = self._rig.start(variant)
        self._results.add("run_to_started_s", variant, monotonic() - began)
        if variant == WEFT:
            self._add_share(self.log()[len(log) :])
        self.remove(container)

    def start_and_ping(self, variant: str, address: str) -> None:
        argv = [*_PING, address, str(_PATIENCE)]
        with subprocess.Popen(self._rig.far[variant].command(*argv), stdout=PIPE, text=True) as ping:
            assert ping.stdout
            try:
                ping.stdout.readline()
                began = monotonic()
                container = self._rig.start(variant, "--ip", address)
                answered = json.loads(ping.stdout.read() or "null")
            finally:
                ping.kill()
        if answered is None:
            raise LabError(f"{variant}: {address} did not answer a ping within {_PATIENCE:g} s")
        self._results.add("run_to_first_ping_s", variant, answered - began)
        self.remove(container)

    def _add_share(self, log: str) -> None:
        calls = read_calls(log)
        if missing := set(AT_START) - {call.name for call in calls}:
            raise LabError(f"weft's log does not tell the time of {', '.join(sorted(missing))}; it says:\n{log}")
        self._results.add("handlers_ms_per_start", WEFT, in_handlers(calls))

    def remove(self, container: str) -> None:
        """The next start shall not meet the kernel still clearing away."""
        self._rig.remove(container)
        sleep(_SETTLE)

    def log(self) -> str:
        return self._rig.h1.log("weft")
