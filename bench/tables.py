"""Part d: the kernel's tables of one large network, and the memory that it takes to keep them right."""

from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from bench.isolated import run_program
from bench.measure import Results
from bench.metrics import WEFT
from lab.terminal import Terminal

SIZES = (1_000, 10_000, 100_000)
PARTS = ("wanted", "observe", "plan", "write", "total")
_METRICS = {
    (10_000, "program"): "program_10k_s",
    (100_000, "program"): "program_100k_s",
    (100_000, "idle"): "idle_reconcile_100k_s",
}
_PATIENCE = 240.0


class Programming(NamedTuple):
    """Median seconds of the parts of one kind of resync, and how many rows it wrote."""

    size: int
    work: str
    seconds: dict[str, float]
    rows: int

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds["write"]


@dataclass
class Large:
    """What does not fit into one figure per metric."""

    programming: list[Programming] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)


def measure(results: Results, large: Large, terminal: Terminal, *, times: int) -> None:
    for size in SIZES:
        with terminal.step(f"a network of {size:,} remote endpoints, {times} times"):
            runs = run_program("program", str(size), str(times), timeout=_PATIENCE)
        for work in ("program", "idle"):
            parts = {part: median(run[work][part] for run in runs) for part in PARTS}
            large.programming.append(Programming(size, work, parts, int(runs[0][work]["rows"])))
            if metric := _METRICS.get((size, work)):
                for run in runs:
                    results.add(metric, WEFT, run[work]["total"])
    with terminal.step("memory of weft serving 100,000 remote endpoints"):
        large.memory = run_program("memory", "100000", timeout=_PATIENCE)
    results.add("rss_mb_100k", WEFT, large.memory["rss_mb"])
