"""What mountinfo says about mounts made by us."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.kernel.mounts import is_shared

ROOT = "1 0 0:1 / / rw {} - ext4 /dev/vda rw"
RUN = "2 1 0:2 / /run rw,nosuid {} - tmpfs tmpfs rw"
DP = Path("/run/docker/weft/dp")


@pytest.mark.parametrize(
    ("root", "run", "shared"),
    [
        ("shared:1", "shared:2", True),
        ("", "shared:2", True),
        ("shared:1", "", False),  # docker run -v /run/docker:/run/docker
        ("shared:1", "master:2", False),  # a unit with MountFlags=slave
        ("shared:3 master:1", "shared:4 master:2", False),  # a unit with ProtectSystem=
    ],
)
def test_only_mounts_below_a_shared_one_reach_the_host(root: str, run: str, shared: bool) -> None:
    assert is_shared(DP, f"{ROOT.format(root)}\n{RUN.format(run)}\n") == shared


def test_the_last_mount_on_the_longest_path_counts() -> None:
    later = f"{RUN.format('shared:2')}\n{ROOT.format('')}\n{RUN.format('')}\n"
    assert not is_shared(DP, later)
    assert not is_shared(Path("/runner"), f"{ROOT.format('')}\n{RUN.format('shared:2')}\n")


def test_a_mount_point_with_a_space() -> None:
    assert is_shared(Path("/a b/dp"), f"{ROOT.format('')}\n2 1 0:2 / /a\\040b rw shared:2 - tmpfs tmpfs rw\n")
