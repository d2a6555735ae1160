"""Parts f and g: what a cluster of many hosts costs its hosts and its store, as it grows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench.isolated import run_program
from bench.measure import Results
from bench.metrics import WEFT
from lab.plan import PROJECT
from lab.terminal import Terminal

_PATIENCE = 300.0
_RATE = 5


class Population(NamedTuple):
    """See `bench.inside.population`."""

    size: int
    hosts: int
    networks: int

    def __str__(self) -> str:
        return f"{self.size:,} endpoints, {self.hosts:,} hosts, {self.networks} networks"


LARGEST = Population(100_000, 1_000, 1)
POPULATIONS = (
    Population(1_000, 1_000, 1),
    Population(10_000, 10, 1),
    Population(10_000, 100, 1),
    Population(10_000, 1_000, 1),
    LARGEST,
    Population(100_000, 1_000, 100),
)
CROWDS = (10, 50, 100)
ENDPOINTS = 1_000
"""Of a crowd, before any is added."""


@dataclass
class Scale:
    """What the programs in `bench.inside` found: by number of hosts, and by population."""

    crowds: dict[int, dict[str, Any]] = field(default_factory=dict)
    arrivals: dict[Population, dict[str, float]] = field(default_factory=dict)


def measure_crowds(results: Results, scale: Scale, terminal: Terminal, *, samples: int) -> None:
    numbers = [str(number) for number in (ENDPOINTS, _RATE, samples, *CROWDS)]
    with terminal.step(f"{', '.join(map(str, CROWDS))} simulated hosts, {samples} endpoints each"), _folder() as folder:
        for found in run_program("crowd", folder, *numbers, timeout=_PATIENCE):
            scale.crowds[found["hosts"]] = found
    for name in ("each", "all", "real"):
        samples_ms = scale.crowds[CROWDS[-1]][f"{name}_ms"]
        results.add(f"crowd_{name}_ms", WEFT, median(samples_ms), samples_ms)


def measure_arrivals(results: Results, scale: Scale, terminal: Terminal, *, largest: int) -> None:
    """Of populations up to that size."""
    for population in POPULATIONS:
        if population.size > largest:
            continue
        with terminal.step(f"a host comes to {population}"), _folder() as folder:
            found = run_program("arrival", folder, *map(str, population), timeout=_PATIENCE)
        scale.arrivals[population] = found
        if population == LARGEST:
            results.add("arrive_100k_s", WEFT, found["sync_s"])
            results.add("arrive_100k_mb", WEFT, found["peak_mb"])


@contextmanager
def _folder() -> Iterator[str]:
    """For etcd, on the machine's disk."""
    build = PROJECT / "build"
    build.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=build, ignore_cleanup_errors=True) as folder:
        yield folder
