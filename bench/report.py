"""Where results go: the terminal, build/bench.json, and the tables in docs/benchmarks.md."""

import json
import re
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import Results, percentile
from bench.metrics import METRICS
from bench.tabular import Table, aligned, misses
from lab.plan import PROJECT
from lab.process import LabError
from lab.terminal import Terminal

JSON = PROJECT / "build/bench.json"
DOCUMENT = PROJECT / "docs/benchmarks.md"

_BEGIN, _END = "<!-- bench: begin -->", "<!-- bench: end -->"
_MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: (" ", "dim")}


def show(terminal: Terminal, tables: Iterable[Table], results: Results) -> None:
    for table in tables:
        header, *lines = aligned(table)
        terminal.say()
        terminal.title(table.title)
        terminal.say(terminal.paint("dim", header))
        for line, verdict in zip(lines, table.verdicts, strict=True):
            mark, colour = _MARKS[verdict]
            terminal.say(f"{line} {terminal.paint(colour, mark)}".rstrip())
    terminal.say()
    terminal.say("Median of the rounds (middle half of them); ratios are taken within a round.")
    (terminal.failure if misses(results) or _disturbed(results) else terminal.success)(summary(results))


def summary(results: Results) -> str:
    judged = [metric for metric in METRICS if metric.verdict(results) is not None]
    missed = [f"{metric.title}: {metric.value(results):.3f} instead of {metric.target}" for metric in misses(results)]
    disturbed = _disturbed(results)
    text = f"{len(judged) - len(missed)} of {len(judged)} targets met"
    text += f"; missed: {'; '.join(missed)}" if missed else ""
    return text + (f"; not judged, for the machine alone was too slow: {'; '.join(disturbed)}" if disturbed else "")


def _disturbed(results: Results) -> list[str]:
    return [metric.title for metric in METRICS if metric.is_disturbed(results)]


def write_json(results: Results, tables: Iterable[Table], path: Path = JSON) -> None:
    """Each metric by its name, and the tables as they are shown."""
    found: dict[str, Any] = {
        metric.name: {
            variant: {
                "median": median(series.samples),
                "p99": percentile(series.samples, 99),
                "n": len(series.samples),
                "unit": metric.unit,
            }
            for variant, series in results.series[metric.name].items()
        }
        for metric in METRICS
        if metric.name in results.series
    }
    found["tables"] = {table.title: [table.header, *table.rows] for table in tables}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def write_document(results: Results, tables: Iterable[Table], machine: str, path: Path = DOCUMENT) -> None:
    """Replaces what is between the markers; the prose around them is a person's."""
    parts = [f"Measured on {date.today():%d %B %Y}: {machine}.", *map(_markdown, tables), f"{summary(results)}."]
    text = path.read_text()
    if not re.search(f"{_BEGIN}.*{_END}", text, re.DOTALL):
        raise LabError(f"{path.relative_to(PROJECT)} lacks the markers {_BEGIN} and {_END} for the tables")
    before, rest = text.split(_BEGIN, 1)
    after = rest.split(_END, 1)[1]
    path.write_text("\n\n".join([before + _BEGIN, *parts, _END + after]))


def _markdown(table: Table) -> str:
    verdicts = any(verdict is not None for verdict in table.verdicts)
    header = [*table.header, "met"] if verdicts else table.header
    rows = [
        [*row, {True: "yes", False: "**no**", None: ""}[verdict]] if verdicts else row
        for row, verdict in zip(table.rows, table.verdicts, strict=True)
    ]
    rule = ["---", *("---:" for _ in header[1:])]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
    return "\n".join([f"### {table.title}", "", *lines])
