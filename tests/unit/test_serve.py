"""What keeps weft from serving, beside the cases of tests/netns/test_bad_host.py."""

from __future__ import annotations

from pathlib import Path

from weft.serve import rival_specs


def test_files_that_name_another_driver_are_found_where_an_engine_looks(tmp_path: Path) -> None:
    etc, usr = tmp_path / "etc", tmp_path / "usr"
    (etc / "weft").mkdir(parents=True)
    files = [etc / "weft.spec", etc / "weft.json", etc / "weft/weft.spec"]
    for file in [*files, etc / "other.spec", etc / "weft/other.json"]:
        file.touch()
    assert sorted(rival_specs("weft", [etc, usr])) == sorted(files)
