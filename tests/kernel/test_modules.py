"""Kernels have VXLAN as a module, which nobody may have loaded yet. The machine's own kernel may have it built in."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.world import Host, wait_for
from weft.errors import KernelError
from weft.kernel.modules import load_module

pytestmark = pytest.mark.kernel

LOADED = Path("/sys/module/vxlan")
HELPER = Path("/proc/sys/kernel/modprobe")


@pytest.fixture
def no_vxlan() -> Iterator[None]:
    """It is not loaded, and the kernel does not do it by itself."""
    helper = HELPER.read_text()
    HELPER.write_text("/bin/false")
    assert wait_for(lambda: not LOADED.exists() or not subprocess.run(["rmmod", "vxlan"]).returncode, 20)
    yield
    HELPER.write_text(helper)
    load_module("vxlan")


def test_vxlan_is_loaded_or_it_is_said_what_is_missing(host: Host, no_vxlan: None) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "empty", "/lib/modules"], check=True)
    try:
        with pytest.raises(KernelError, match=r"load the vxlan module \(modprobe vxlan\)"):
            host.kernel.check()
        assert not LOADED.exists()
    finally:
        subprocess.run(["umount", "/lib/modules"], check=True)
    host.kernel.check()
    assert LOADED.exists()
