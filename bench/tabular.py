"""Results as tables of text, which a terminal and a document show each in its way."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.calls import CallTable
from bench.convergence import STEPS, STORES, Convergence
from bench.many import COSTS, Many, tenths
from bench.measure import Results, Series, Spread, percentile
from bench.metrics import BRIDGE, ENCRYPTED, METRICS, OVERLAY, PARTS, RAW, VARIANTS, WEFT, Metric
from bench.scale import ENDPOINTS, Scale
from bench.tables import Large

_BASES = {"a": (OVERLAY, RAW), "b": (OVERLAY, BRIDGE), "i": tuple(ENCRYPTED.values())}
_MEMORY = {
    "rest_s": ("from its start until it is at rest, all programmed", "s"),
    "rss_mb": ("memory then", "MB"),
    "pss_mb": ("of that its own", "MB"),
    "peak_mb": ("most memory meanwhile", "MB"),
}


@dataclass
class Table:
    """`verdicts` are as many as rows, or none: whether what a row says is as it should be."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    verdicts: list[bool | None] = field(default_factory=list)

    def add(self, *cells: str, verdict: bool | None = None) -> None:
        self.rows.append(list(cells))
        self.verdicts.append(verdict)


def tabulate(
    results: Results, calls: CallTable, large: Large, convergence: Convergence, scale: Scale, many: Many
) -> list[Table]:
    found = [
        *(_metrics(part, results) for part in PARTS),
        _calls(calls),
        _programming(large),
        _memory(large),
        _convergence(convergence),
        _requests(convergence),
        _crowds(scale),
        _store_load(scale),
        _arrivals(scale),
        _many(many),
    ]
    return [table for table in found if table.rows]


def misses(results: Results) -> list[Metric]:
    return [metric for metric in METRICS if metric.verdict(results) is False]


def _metrics(part: str, results: Results) -> Table:
    metrics = [metric for metric in METRICS if metric.part == part and metric.name in results.series]
    variants = [name for name in VARIANTS if any(results.get(metric.name, name) for metric in metrics)]
    bases = [base for base in _BASES.get(part, ()) if base in variants]
    columns = [*(VARIANTS[name] for name in variants), *(f"weft / {VARIANTS[name]}" for name in bases)]
    table = Table(PARTS[part], ["", "unit", *columns, "target"])
    for metric in metrics:
        figures = [_figure(results.get(metric.name, name)) for name in variants]
        ratios = [_ratio(results.ratio(metric.name, WEFT, base)) for base in bases]
        target = str(metric.target) if metric.target else ""
        table.add(metric.title, metric.unit, *figures, *ratios, target, verdict=metric.verdict(results))
    return table


def _calls(calls: CallTable) -> Table:
    table = Table("weft's calls, from its own log", ["call", "per start", "median ms", "99th percentile ms"])
    for name, times in sorted(calls.milliseconds.items()):
        per_start = f"{len(times) / calls.starts:.2g}" if calls.starts else ""
        table.add(name, per_start, number(Spread.of(times).median), number(percentile(times, 99)))
    return table


def _programming(large: Large) -> Table:
    columns = ["compute wanted", "read kernel", "compare", "write", "total"]
    header = ["remote endpoints", "kernel has", *(f"{column}, s" for column in columns), "rows written per s"]
    table = Table("A full comparison of one network, in its parts", header)
    for run in large.programming:
        rate = f"{run.rows_per_second / 1e3:,.0f} k" if run.rows else ""
        has = "nothing" if run.rows else "all of it"
        table.add(f"{run.size:,}", has, *(f"{seconds:.3f}" for seconds in run.seconds.values()), rate)
    return table


def _memory(large: Large) -> Table:
    table = Table("weft serve on a store with 100,000 remote endpoints", ["", "unit", "value"])
    for name, value in large.memory.items():
        title, unit = _MEMORY[name]
        table.add(title, unit, number(value))
    return table


def _convergence(convergence: Convergence) -> Table:
    stores = [STORES[store] for store in convergence.milliseconds]
    table = Table("Milliseconds from CreateEndpoint on one host, to … (median / 99th percentile)", ["", *stores])
    for step, title in STEPS.items() if stores else ():
        table.add(title, *(_median_and_worst(by_step[step]) for by_step in convergence.milliseconds.values()))
    return table


def _requests(convergence: Convergence) -> Table:
    table = Table("What etcd is asked, by its own counters", ["", "round trips"])
    for name, count in convergence.requests.items():
        table.add(name, f"{count:.1f}".removesuffix(".0"))
    return table


def _crowds(scale: Scale) -> Table:
    who = {"each_ms": "each of them", "all_ms": "the last of them", "real_ms": "a real host's kernel"}
    title = f"Milliseconds from CreateEndpoint to …, after {ENDPOINTS:,} endpoints (median / 99th percentile)"
    table = Table(title, ["simulated hosts", *who.values(), "all start, s", "CPU of each per endpoint, ms"])
    for hosts, found in scale.crowds.items():
        delays = [_median_and_worst(found[name]) for name in who]
        table.add(f"{hosts}", *delays, number(found["start_s"]), number(found["host_cpu_ms"]))
    return table


def _store_load(scale: Scale) -> Table:
    columns = {
        "watches": "watches",
        "idle_round_trips_per_s": "round trips per s, idle",
        "rate": "endpoints made per s",
        "round_trips_per_s": "round trips per s",
        "writes_per_s": "writes per s",
        "sent_kb": "kB sent per endpoint",
        "etcd_cpu_ms": "CPU per endpoint, ms",
        "etcd_mb": "memory, MB",
    }
    table = Table("What etcd has to do for them", ["simulated hosts", *columns.values()])
    for hosts, found in scale.crowds.items():
        table.add(f"{hosts}", *(number(found[name]) for name in columns))
    return table


def _arrivals(scale: Scale) -> Table:
    columns = {
        "list": "list, s",
        "decode": "decode, s",
        "plan": "plan, s",
        "netlink": "write, s",
        "sync_s": "weft in sync, s",
        "sync_cpu_s": "its CPU, s",
        "rest_s": "at rest, s",
        "rss_mb": "memory, MB",
        "pss_mb": "its own, MB",
        "peak_mb": "at most, MB",
    }
    table = Table("A host comes to a cluster, in its parts", ["endpoints", "hosts", "networks", *columns.values()])
    for population, found in scale.arrivals.items():
        table.add(*(f"{count:,}" for count in population), *(number(found[name]) for name in columns))
    return table


def _many(many: Many) -> Table:
    """In the words of `COSTS`."""
    columns = [f"{VARIANTS[variant]}, {which}" for variant in many.costs for which in ("first tenth", "last tenth")]
    table = Table("Milliseconds for a network and a container more", ["", *columns])
    for cost, title in COSTS.items() if many.costs else ():
        found = [tenths(costs[cost]) if cost in costs else None for costs in many.costs.values()]
        table.add(title, *(number(figure) if pair else "" for pair in found for figure in pair or (0, 0)))
    return table


def _figure(series: Series | None) -> str:
    if series is None:
        return ""
    low, middle, high = series.spread
    return number(middle) if len(series.rounds) == 1 else f"{number(middle)} ({number(low)}–{number(high)})"


def _median_and_worst(values: Sequence[float]) -> str:
    return f"{number(percentile(values, 50))} / {number(percentile(values, 99))}"


def _ratio(spread: Spread | None) -> str:
    return f"{spread.median:.3f} ({spread.low:.2f}–{spread.high:.2f})" if spread else ""


def number(value: float) -> str:
    """Three digits that mean something."""
    decimals = next((places for places, limit in ((3, 1), (2, 10), (1, 100)) if abs(value) < limit), 0)
    return f"{value:.{decimals}f}"


def aligned(table: Table) -> list[str]:
    """Header and rows with columns of equal width: text to the left, figures to the right."""
    lines: Sequence[Sequence[str]] = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(_pad(cell, width, place) for place, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def _pad(cell: str, width: int, place: int) -> str:
    return cell.ljust(width) if place == 0 else cell.rjust(width)
