"""The command line: its documentation and its completion say what it is."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from weft import commandline
from weft.main import main

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = ["serve", "version", "host", "gc", "setup", "completion"]


def test_the_documentation_is_what_make_docs_writes() -> None:
    assert (DOCS / "cli.md").read_text() == runpy.run_path(str(DOCS / "cli.py"))["render"]()


def test_bash_completes_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = f"{script}\nCOMP_WORDS=(weft ''); COMP_CWORD=1; _shtab_weft; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    offered = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True).stdout.split()
    assert set(COMMANDS) <= set(offered)


def test_the_completion_of_zsh_names_every_command() -> None:
    script = commandline.completion("zsh")
    assert script.startswith("#compdef weft")
    assert all(f"\n    {command}:'" in script for command in COMMANDS)


def test_a_command_that_asks_the_daemon_imports_none_of_its_libraries(tmp_path: Path) -> None:
    """They take a second of CPU."""
    program = "import sys; from weft.main import main; main(); print([*sys.modules], file=sys.stderr)"
    command = [sys.executable, "-c", program, "version", "--json"]
    environment = {"WEFT_SOCKET": str(tmp_path / "none.sock")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "daemon" in json.loads(done.stdout)
    imported = set(ast.literal_eval(done.stderr))
    assert "weft.cli" in imported
    assert not imported & {"flask", "gunicorn", "waitress", "prometheus_client", "pyroute2", "docker", "requests"}
    assert not imported & {"dns", "nacl", "shtab", "sqlite3", "weft.daemon", "weft.cli.offline"}
