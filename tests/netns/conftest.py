"""Fixtures for what runs in throw-away namespaces."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.world import Host, World

_CLONE_NEWNS = 0x20000


@pytest.fixture(scope="session", autouse=True)
def own_mounts() -> None:
    """What these tests mount ends with them. The mounts are shared ones, as on a host with systemd.

    weft makes no data plane that would end with it, and not every machine tells which mounts are process 1's.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "--make-rshared", "/"], check=True)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def host(world: World) -> Host:
    """One host on its own."""
    return world.host()
