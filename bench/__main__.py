"""`python -m bench`: all of it in one run, on a lab of its own. Tables go to the terminal, figures to build/bench.json.

The exit code says whether everything could be measured, not whether the figures are good.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from types import FrameType

from bench import convergence, encrypted, many, names, report, scale, starts, tables, traffic
from bench.calls import CallTable
from bench.machine import busy, describe
from bench.measure import Results
from bench.metrics import PARTS, WEFT
from bench.rig import ENDINGS, Rig, rig
from bench.tabular import Table, tabulate
from lab.process import LabError
from lab.terminal import Terminal


@dataclass(frozen=True)
class Effort:
    """How many rounds of each part, and how long one piece of traffic lasts."""

    traffic_rounds: int
    seconds: int
    trips: int
    start_rounds: int
    table_rounds: int
    convergence: convergence.Effort
    crowd_samples: int
    largest: int
    names_rounds: int
    networks: int
    rest: float
    names_samples: int


FULL = Effort(
    traffic_rounds=18,
    seconds=1,
    trips=20_000,
    start_rounds=12,
    table_rounds=5,
    convergence=convergence.Effort(samples=200, calls=10, starts=5),
    crowd_samples=60,
    largest=100_000,
    names_rounds=5,
    networks=200,
    rest=60,
    names_samples=100,
)
QUICK = Effort(
    traffic_rounds=3,
    seconds=1,
    trips=5_000,
    start_rounds=3,
    table_rounds=1,
    convergence=convergence.Effort(samples=20, calls=5, starts=1),
    crowd_samples=10,
    largest=10_000,
    names_rounds=1,
    networks=20,
    rest=10,
    names_samples=10,
)


_QUIET = 0.1
_NAMES_SECONDS = 5


class Interrupted(BaseException):
    """As KeyboardInterrupt, by any signal: all that was begun is ended and removed on its way out."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Bench:
    """A part that cannot be measured is told, and the others go on."""

    def __init__(self, effort: Effort, terminal: Terminal) -> None:
        self.results = Results()
        self.failed = False
        self._effort = effort
        self._terminal = terminal
        self._calls = CallTable()
        self._large = tables.Large()
        self._convergence = convergence.Convergence()
        self._scale = scale.Scale()
        self._many = many.Many()

    def run(self, parts: set[str]) -> None:
        if parts & {"a", "b", "c"}:
            self._attempt(lambda: self._on_lab(parts))
        if "d" in parts:
            self._attempt(self._measure_tables)
        if "e" in parts:
            self._attempt(self._measure_convergence)
        if "f" in parts:
            self._attempt(self._measure_crowds)
        if "g" in parts:
            self._attempt(self._measure_arrivals)
        if "h" in parts:
            self._attempt(self._measure_names)
        if "i" in parts:
            self._attempt(self._measure_encryption)
        if "j" in parts:
            self._attempt(self._measure_many)

    def report(self) -> list[Table]:
        return tabulate(self.results, self._calls, self._large, self._convergence, self._scale, self._many)

    def _attempt(self, part: Callable[[], None]) -> None:
        try:
            part()
        except LabError as error:
            self.failed = True
            self._terminal.failure(str(error))

    def _on_lab(self, parts: set[str]) -> None:
        with_starts = bool(parts & {"b", "c"})
        variants = {*(traffic.VARIANTS if "a" in parts else ()), *(starts.VARIANTS if with_starts else ())}
        with rig(variants, self._terminal) as place:
            if "a" in parts:
                self._attempt(lambda: self._measure_traffic(place))
            if with_starts:
                self._attempt(lambda: self._measure_starts(place))

    def _measure_traffic(self, place: Rig) -> None:
        rounds, seconds, trips = self._effort.traffic_rounds, self._effort.seconds, self._effort.trips
        traffic.measure(place, self.results, self._terminal, rounds=rounds, seconds=seconds, trips=trips)

    def _measure_starts(self, place: Rig) -> None:
        starts.measure(place, self.results, self._calls, self._terminal, rounds=self._effort.start_rounds)

    def _measure_tables(self) -> None:
        tables.measure(self.results, self._large, self._terminal, times=self._effort.table_rounds)

    def _measure_convergence(self) -> None:
        """On a lab of its own: with the other variants' networks it would not be idle."""
        with rig({WEFT}, self._terminal) as place:
            convergence.measure(place, self.results, self._convergence, self._terminal, self._effort.convergence)

    def _measure_crowds(self) -> None:
        scale.measure_crowds(self.results, self._scale, self._terminal, samples=self._effort.crowd_samples)

    def _measure_names(self) -> None:
        names.measure(self.results, self._terminal, rounds=self._effort.names_rounds, seconds=_NAMES_SECONDS)
        with rig({WEFT}, self._terminal) as place:
            names.measure_changes(place, self.results, self._terminal, samples=self._effort.names_samples)

    def _measure_encryption(self) -> None:
        effort = self._effort
        encrypted.measure_peers(self.results, self._terminal, times=effort.table_rounds)
        with rig({WEFT}, self._terminal) as place:
            rounds, seconds, trips = effort.traffic_rounds, effort.seconds, effort.trips
            encrypted.measure(place, self.results, self._terminal, rounds=rounds, seconds=seconds, trips=trips)

    def _measure_many(self) -> None:
        with rig((), self._terminal) as place:
            networks, rest = self._effort.networks, self._effort.rest
            many.measure(place, self.results, self._many, self._terminal, networks=networks, rest=rest)

    def _measure_arrivals(self) -> None:
        scale.measure_arrivals(self.results, self._scale, self._terminal, largest=self._effort.largest)


def _arguments() -> argparse.Namespace:
    parts = "; ".join(f"{letter}: {title}" for letter, title in PARTS.items())
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: an impression, no result")
    parser.add_argument("--only", type=_parts, default=set(PARTS), metavar="a,b,…", help=f"{parts} (with b)")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/benchmarks.md as well")
    args = parser.parse_args()
    if args.write_docs and (args.quick or args.only != set(PARTS)):
        parser.error("--write-docs wants the whole run")
    return args


def _parts(text: str) -> set[str]:
    parts = set(text.replace(",", " ").split())
    if not parts or parts - PARTS.keys():
        raise argparse.ArgumentTypeError(f"{text!r}: some of {', '.join(PARTS)}")
    return parts


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    if os.geteuid() != 0:
        raise LabError("the benchmark needs root, for the lab's namespaces")
    began, machine = monotonic(), describe()
    terminal.title(f"weft's benchmark, on {machine}")
    if (share := busy()) > _QUIET:
        terminal.failure(f"other programs use {share:.0%} of it: these figures will not be worth much")
    bench = Bench(QUICK if args.quick else FULL, terminal)
    bench.run(args.only)
    if not bench.results.series:
        return 1
    found = bench.report()
    report.show(terminal, found, bench.results)
    report.write_json(bench.results, found)
    terminal.say(f"{report.JSON.name} is written; it took {monotonic() - began:.0f} s")
    if args.write_docs and not bench.failed:
        report.write_document(bench.results, found, machine)
    return int(bench.failed)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


def main() -> int:
    for number in ENDINGS:
        signal.signal(number, _interrupt)
    args, terminal = _arguments(), Terminal()
    try:
        return _run(args, terminal)
    except LabError as error:
        terminal.failure(str(error))
        return 1
    except Interrupted as ending:
        terminal.failure("interrupted")
        return 128 + ending.number


if __name__ == "__main__":
    sys.exit(main())
