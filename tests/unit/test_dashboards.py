"""Alert rules, dashboard and documentation name the metrics that there are, with the labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from weft.web.metrics import FAMILIES

PROJECT = Path(__file__).parents[2]
RULES = yaml.safe_load((PROJECT / "deploy/alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((PROJECT / "deploy/grafana.json").read_text())

_PARTS = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
LABELS = {
    f"{family.name}{part}": {*family.labels, "instance", "job", *(["le"] if part == "_bucket" else [])}
    for family in FAMILIES
    for part in _PARTS.get(family.kind, ("",))
}
"""Those of each series, by its name, with what Prometheus adds."""
_PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"}
_SERIES = re.compile(r"\b(up|(?:weft|process)_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"[^"]*"')
_GROUPING = re.compile(r"\b(?:by|on|ignoring|without)\s*\(([^)]*)\)")


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


EXPRESSIONS = [
    *(pytest.param(rule["expr"], id=rule["alert"]) for rule in RULES),
    *(pytest.param(target["expr"], id=panel["title"]) for panel in panels() for target in panel["targets"]),
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_asks_for_what_there_is(expression: str) -> None:
    series = _SERIES.findall(expression)
    assert series
    known = {name: LABELS[name] if name.startswith("weft_") else {"instance", "job"} for name, _ in series}
    assert {name for name in known if name.startswith("process_")} <= _PROCESS
    for name, matchers in series:
        assert set(_MATCHER.findall(matchers)) <= known[name]
        assert not _MATCHER.sub("", matchers).strip(", ")
    grouped = {label.strip() for labels in _GROUPING.findall(expression) for label in labels.split(",")}
    assert grouped <= set().union(*known.values())
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_suffers(rule: dict[str, Any]) -> None:
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    used = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    kept = [set(labels.split(", ")) for labels in re.findall(r"\bby \(([^)]*)\)", rule["expr"])]
    names = [name for name, _ in _SERIES.findall(rule["expr"])]
    there = kept[0] if kept else LABELS.get(names[0], {"instance", "job"})
    assert used <= there


def test_alerts_have_names_of_their_own() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_panels_do_not_overlap() -> None:
    cells = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_panels_have_ids_of_their_own() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_metric_is_used_or_is_told_of_elsewhere() -> None:
    text = json.dumps([*RULES, *panels()])
    unused = {family.name for family in FAMILIES if family.name not in text}
    assert unused == {"weft_host_info"}


def test_the_documentation_lists_every_metric() -> None:
    listed = re.findall(
        r"^\| `(weft_\w+)` \| (\w+) \| (.*) \| (.*) \|$", (PROJECT / "docs/metrics.md").read_text(), re.M
    )
    assert listed == [
        (family.name, family.kind, ", ".join(f"`{label}`" for label in family.labels), family.help)
        for family in FAMILIES
    ]
