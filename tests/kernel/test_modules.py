"""Kernels have VXLAN and bridges as modules, which nobody may have loaded yet. Other kernels have them built in."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.netns.world import Host, wait_for
from weft.config import from_environment
from weft.doctor import checkup
from weft.doctor.checkup import Checkup, Place, of_daemon
from weft.doctor.local import of_host
from weft.errors import KernelError
from weft.kernel import Inspection
from weft.kernel.modules import DEVICE_MODULES, load_module

pytestmark = pytest.mark.kernel

HELPER = Path("/proc/sys/kernel/modprobe")


def loaded(module: str) -> bool:
    return Path("/sys/module", module).exists()


@pytest.fixture(params=["vxlan", "bridge"])
def unloaded(request: pytest.FixtureRequest) -> Iterator[str]:
    """A module that is not loaded, all others are, and the kernel does not load it by itself."""
    module: str = request.param
    for name in DEVICE_MODULES:
        load_module(name)
    helper = HELPER.read_text()
    HELPER.write_text("/bin/false")
    assert wait_for(lambda: not subprocess.run(["modprobe", "-r", module]).returncode, 20)  # once a device has gone
    assert not loaded(module)
    yield module
    HELPER.write_text(helper)
    load_module(module)


class Silent:
    """The parts of a daemon that has made no device yet."""

    problem = ""

    def preview(self, _: float) -> list[tuple[str, str]]:
        return []


def findings(host: Host) -> list[tuple[str, str, str]]:
    """What the doctor says of this host's kernel: cause, evidence, command."""
    daemon: Any = Silent()
    with closing(Inspection(host.dp.path.parent, host.path)) as inspection:
        settings = from_environment({"WEFT_DNS": "off", "WEFT_HOSTNAME": "h1"})
        parts = of_daemon(settings, host.kernel, daemon, daemon, daemon, daemon, None, None)
        facts = Checkup(settings, inspection, lambda: Place("", []), parts).look()
    found = [(one.cause, one.evidence, one.command) for one in of_host(facts) if one.check == "kernel"]
    return [one for one in found if "switch" not in one[0]]


def test_a_module_is_loaded_or_the_doctor_says_that_it_is_missing(
    host: Host, unloaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "_LOOK_SECONDS", 60)  # as emulation is slow
    remedy = f"load the {unloaded} module (modprobe {unloaded})"
    subprocess.run(["mount", "-t", "tmpfs", "empty", "/lib/modules"], check=True)
    try:
        with pytest.raises(KernelError) as refusal:
            host.kernel.check()
        assert remedy in str(refusal.value)
        ((cause, evidence, command),) = findings(host)
        assert cause == "this kernel cannot make what a network needs"
        assert remedy in evidence
        assert command == "weft setup host"
        assert not loaded(unloaded)
    finally:
        subprocess.run(["umount", "/lib/modules"], check=True)
    assert findings(host) == []
    assert loaded(unloaded)
