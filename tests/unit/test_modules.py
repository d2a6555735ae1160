"""Loading modules with the host's modprobe, if there is one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft.errors import KernelError
from weft.kernel import links
from weft.kernel.links import Links
from weft.kernel.modules import load_module


def test_modprobe_is_asked_and_believed(tmp_path: Path) -> None:
    modprobe = tmp_path / "modprobe"
    modprobe.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$2" = vxlan ]\n')
    modprobe.chmod(0o755)
    assert load_module("vxlan", path=str(tmp_path))
    assert not load_module("brokken", path=str(tmp_path))
    assert (tmp_path / "asked").read_text() == "--quiet vxlan\n--quiet brokken\n"


def test_a_host_without_modprobe_cannot_load(tmp_path: Path) -> None:
    assert not load_module("vxlan", path=str(tmp_path))


class KernelWithoutVxlan:
    """Both namespaces of a host whose kernel knows no VXLAN until the module is loaded."""

    def __init__(self) -> None:
        self.has_vxlan = False

    def call(self, what: str, request: Callable[[Any], Any], hint: Callable[[int], str] = lambda _: "") -> None:
        if "VXLAN" in what and not self.has_vxlan:
            raise KernelError(what, errno.EOPNOTSUPP, hint(errno.EOPNOTSUPP))

    def load(self, module: str) -> bool:
        self.has_vxlan = module == "vxlan"
        return True

    def links(self) -> Links:
        connection: Any = self
        return Links(
            connection, connection, connection, connection, lambda **_: None, connection, connection, dp_fd=0, host_fd=0
        )


def test_a_missing_module_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KernelWithoutVxlan()
    monkeypatch.setattr(links, "load_module", kernel.load)
    kernel.links().check()
    assert kernel.has_vxlan


def test_a_module_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "load_module", lambda module: False)
    with pytest.raises(KernelError, match=r"load the vxlan module \(modprobe vxlan\)"):
        KernelWithoutVxlan().links().check()
