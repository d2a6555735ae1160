"""What keeps weft from serving, beside the cases of tests/netns/test_bad_host.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from weft.serve import rival_specs


def test_files_that_name_another_driver_are_found_where_an_engine_looks(tmp_path: Path) -> None:
    etc, usr = tmp_path / "etc", tmp_path / "usr"
    (etc / "weft").mkdir(parents=True)
    files = [etc / "weft.spec", etc / "weft.json", etc / "weft/weft.spec"]
    for file in [*files, etc / "other.spec", etc / "weft/other.json"]:
        file.touch()
    assert sorted(rival_specs("weft", [etc, usr])) == sorted(files)


@pytest.mark.parametrize(("parent", "status"), [(os.getpid(), 0), (1, -signal.SIGKILL)], ids=["living", "dead"])
def test_a_worker_whose_parent_died_before_it_could_ask_to_be_told_dies_too(parent: int, status: int) -> None:
    worker = f"from weft.serve import _die_with_parent; _die_with_parent({parent})"
    assert subprocess.run([sys.executable, "-c", worker], check=False).returncode == status
