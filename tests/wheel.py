"""weft as users install it: a wheel in a folder with all that it needs, installed without a network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.plan import PROJECT


def wheelhouse(folder: Path) -> Path:
    """Wheels of weft, as it is in the working tree, and of all it needs."""
    source, wheels = folder / "source", folder / "wheels"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    shutil.copytree(PROJECT / "plugin", source / "plugin", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip("wheel", "--wheel-dir", str(wheels), str(source))
    return wheels


def install(wheels: Path, venv: Path, *, python: str = sys.executable, enter: Sequence[str] = ()) -> None:
    """Into a new virtual environment at `venv`, with `enter` before each command."""
    subprocess.run([*enter, python, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
    pip("--python", f"{venv}/bin/python", "install", "--no-index", "--find-links", str(wheels), "weft", enter=enter)


def pip(*arguments: str, enter: Sequence[str] = ()) -> None:
    argv = [*enter, sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*argv, *arguments], check=True, timeout=600)
