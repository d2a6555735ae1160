"""What the commands have in common: how one is added, and how its answer is shown to a person."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import Any

from rich.console import Console
from rich.table import Table

_PIPE_COLUMNS = 250

Run = Callable[[argparse.Namespace, Path], Any]
Show = Callable[[Any, Console], None]


def add(commands: Any, name: str, run: Run, show: Show, meaning: str) -> argparse.ArgumentParser:
    """A command: `run` asks for the answer, which `show` prints unless JSON is wanted."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=meaning, description=meaning)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, show=show)
    return parser


def console() -> Console:
    """A pipe has no width, and rich would shorten cells to fit 80 columns."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Shows a person at a terminal that, and for what, the command waits; yields what changes the text."""
    with Console(stderr=True).status(text, spinner="dots") as shown:
        yield shown.update


def table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        made.add_row(*row)
    console.print(made)


def pairs(console: Console, values: Iterable[tuple[str, object]]) -> None:
    """Names and values, one a line."""
    for name, value in values:
        console.print(f"{name + ':':12} {value}", markup=False, highlight=False)


def ago(moment: float | None) -> str:
    return f"{max(0, round(time() - moment))} s ago" if moment else "never"
