"""What the doctor may find is explained in docs/troubleshooting.md in its own words, as are the samples of the page."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import weft.doctor
from lab import sample
from weft.doctor.verdict import CHECKS

DOCS = Path(__file__).parents[2] / "docs/troubleshooting.md"
_SHORTEST = 10
"""Letters that a piece of a text needs to be recognised."""


def causes() -> Iterator[tuple[str, list[str]]]:
    """Where a cause is written, and the pieces between what is filled in."""
    for path in sorted(Path(weft.doctor.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for text in _texts(node):
                pieces = [one.value for one in ast.walk(text) if isinstance(one, ast.Constant)]
                long = [piece.strip(" ,:()") for piece in pieces if isinstance(piece, str) and len(piece) >= _SHORTEST]
                if long:
                    yield f"{path.name}:{text.lineno}", long


def _texts(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.Assign(targets=[ast.Name("cause")], value=value):
            return [value]
        case ast.Assign(targets=[ast.Tuple(elts=[ast.Name("cause"), *_])], value=ast.IfExp(body=one, orelse=other)):
            return [pair.elts[0] for pair in (one, other) if isinstance(pair, ast.Tuple)]
        case ast.Call(func=ast.Name("_one"), args=[_, _, ast.Constant() | ast.JoinedStr() as cause, *_]):
            return [cause]
    return []


CAUSES = dict(causes())


def test_causes_are_found_in_the_source() -> None:
    assert len(CAUSES) > 45, "the doctor writes its causes otherwise than this test reads them"


@pytest.mark.parametrize("place", CAUSES)
def test_each_cause_is_explained(place: str) -> None:
    text = " ".join(DOCS.read_text().split())
    assert any(piece in text for piece in CAUSES[place]), f"{DOCS.name} says nothing of {' … '.join(CAUSES[place])!r}"


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_is_named(check: str) -> None:
    assert f"**{check}**" in DOCS.read_text()


@pytest.mark.parametrize("finding", [*sample.faulty()["findings"], *sample.large()["findings"]])
def test_samples_say_what_the_doctor_says(finding: dict[str, Any]) -> None:
    assert finding["check"] in CHECKS
    assert any(all(piece in finding["cause"] for piece in pieces) for pieces in CAUSES.values())
