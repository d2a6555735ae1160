"""The kernel that `make test-kernel` boots has what tests are run on it for: WireGuard of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.kernel import GUEST
from tests.netns.world import Host

pytestmark = pytest.mark.kernel


def test_this_is_the_kernel_that_was_booted() -> None:
    assert os.uname().release == os.environ[GUEST]
    assert b"lab/guest/main" in Path("/proc/1/cmdline").read_bytes()


def test_the_tests_of_encryption_are_of_its_own_wireguard(host: Host) -> None:
    host.kernel.ensure_tunnel()
    seen = host.kernel.observe_tunnel()
    assert seen
    assert seen.backend == "kernel"
    assert host.wg.link(host.wireguard)["linkinfo"]["info_kind"] == "wireguard"
