"""Which Docker Engine a lab has, without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import engine
from lab.plan import PATH
from lab.process import LabError


def write_program(file: Path, text: str = "") -> None:
    file.write_text(f"#!/bin/sh\n{text}")
    file.chmod(0o755)


def test_the_machines_engine_is_the_default() -> None:
    assert engine.search_path("") == PATH


def test_a_folder_comes_before_the_machines_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in engine.PROGRAMS:
        write_program(tmp_path / program)
    assert engine.search_path(str(tmp_path)) == f"{tmp_path}:{PATH}"
    monkeypatch.chdir(tmp_path)
    assert engine.search_path("./") == f"{tmp_path}:{PATH}"


def test_a_folder_that_lacks_programs_is_refused(tmp_path: Path) -> None:
    write_program(tmp_path / "dockerd")
    (tmp_path / "docker").touch()
    with pytest.raises(LabError, match=r"it lacks docker, docker-proxy, containerd, containerd-shim-runc-v2$"):
        engine.search_path(str(tmp_path))


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("echo Debian $1 has none; exit 77", engine.NoEngine, "^Debian one has none$"),
        ("exit 1", LabError, "of Debian one could not be fetched"),
    ],
)
def test_a_release_without_an_engine_is_told_from_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[LabError], words: str
) -> None:
    (tmp_path / "lab").mkdir()
    write_program(tmp_path / "lab/engine.sh", script)
    monkeypatch.setattr(engine, "PROJECT", tmp_path)
    with pytest.raises(LabError, match=words) as caught:
        engine.search_path("one")
    assert caught.type is error
