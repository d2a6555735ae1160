"""The benchmark's programs at their smallest: whether they run, not what they measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.calls import CallTable
from bench.convergence import Convergence
from bench.isolated import run_program
from bench.many import Many
from bench.measure import Results
from bench.scale import Scale
from bench.tables import Large
from bench.tabular import tabulate

MANY = "1000"
"""More records than fit into one transaction of etcd."""
SMALLEST: dict[str, Callable[[str], list[str]]] = {
    "program": lambda _: ["10", "1"],
    "peers": lambda _: ["10", "1"],
    "names": lambda _: ["10", "100", "1"],
    "arrival": lambda folder: [folder, MANY, "10", "1"],
    "crowd": lambda folder: [folder, MANY, "10", "2", "2"],
}


@pytest.mark.parametrize("name", SMALLEST)
def test_a_program_of_the_benchmark_runs(name: str, tmp_path: Path) -> None:
    assert run_program(name, *SMALLEST[name](str(tmp_path)), timeout=120)


def test_all_of_its_memory_is_in_the_table() -> None:
    found = run_program("memory", MANY, timeout=120)
    (table,) = tabulate(Results(), CallTable(), Large(memory=found), Convergence(), Scale(), Many())
    assert len(table.rows) == len(found)
