"""The benchmark's programs at their smallest: whether they run, not what they measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.isolated import run_program

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
