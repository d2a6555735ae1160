"""The guest of `make test-kernel`, without QEMU: how it ends, and what it is asked to run."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest

from lab import kernel
from lab.plan import PROJECT
from lab.process import LabError

ENDS = 'echo weft: the guest\\\'s script ended with 3 >"$0"'


def test_exit_code_is_read_from_the_console() -> None:
    assert kernel.ending("[ 1.0] boot\r\nweft: the guest's script ended with 5\r\n[ 2.0] Power down") == 5


@pytest.mark.parametrize("console", ["", "[ 1.0] Kernel panic - not syncing"])
def test_guest_that_does_not_say_how_it_ended_has_failed(console: str) -> None:
    with pytest.raises(LabError, match=console[6:] or "its console is empty"):
        kernel.ending(console)


def test_output_is_passed_on(tmp_path: Path) -> None:
    console, output = tmp_path / "console", io.BytesIO()
    assert kernel.run(["sh", "-c", f"echo dots; {ENDS}", str(console)], output, console) == 3
    assert output.getvalue() == b"dots\n"


@pytest.mark.parametrize(("limit", "silence", "problem"), [(60, 0.1, "said nothing"), (0.1, 60, "took more than")])
def test_hung_guest_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, silence: float, problem: str
) -> None:
    monkeypatch.setattr(kernel, "LIMIT", limit)
    monkeypatch.setattr(kernel, "SILENCE", silence)
    console, pid = tmp_path / "console", tmp_path / "pid"
    console.write_text("[ 1.0] its last words")
    with pytest.raises(LabError, match=rf"{problem}(?s:.*)its last words"):
        kernel.run(["sh", "-c", 'echo $$ >"$0.new"; mv "$0.new" "$0"; exec sleep 60', str(pid)], io.BytesIO(), console)
    assert not pid.exists() or not Path("/proc", pid.read_text().strip()).exists()


def test_script_is_one_that_sh_understands(tmp_path: Path) -> None:
    script = kernel.script("6.1.0", columns=99, colour=False, environment={"NO_SKIP": "1", "SECRET": "x"})
    settings, _, command = script.rstrip("\n").rpartition("\n")
    assert "pytest" in command
    environment = {"PATH": os.environ["PATH"]}
    shown = subprocess.run(["sh", "-ec", f"{settings}\npwd; env"], env=environment, capture_output=True, text=True)
    lines = shown.stdout.splitlines()
    assert lines[0] == str(PROJECT)
    assert {"LAB_GUEST=6.1.0", "COLUMNS=99", "NO_SKIP=1"} <= set(lines)
    assert "SECRET" not in shown.stdout
