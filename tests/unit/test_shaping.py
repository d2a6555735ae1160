"""Limits of rates on a kernel that lacks what they need."""

from __future__ import annotations

from collections.abc import Sequence
from errno import EINVAL, ENOENT

import pytest

from weft.errors import KernelError
from weft.kernel import shaping
from weft.kernel.netlink import Rtnetlink
from weft.kernel.shaping import Shaping


class PoorKernel(Rtnetlink):
    """It knows no kind of queue or filter, until their modules are loaded."""

    def __init__(self) -> None:
        self.lacks = {b"tbf", b"clsact", b"u32"}
        self.loaded: list[str] = []
        self.errno = ENOENT

    def send(self, batch: Sequence[bytes]) -> list[tuple[int, int]]:
        return [(0, self.errno)] if any(kind in request for request in batch for kind in self.lacks) else []

    def load(self, module: str) -> bool:
        self.loaded.append(module)
        self.lacks.discard({"sch_tbf": b"tbf", "sch_ingress": b"clsact", "act_mirred": b"u32"}.get(module, b""))
        return True


@pytest.fixture
def kernel() -> PoorKernel:
    return PoorKernel()


def test_missing_modules_are_loaded(kernel: PoorKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaping, "load_module", kernel.load)
    Shaping(kernel).limit("x", 1, 8)
    Shaping(kernel).divert("x", 1, 2, floods=True)
    assert kernel.loaded == ["sch_tbf", "sch_ingress", "cls_u32", "act_mirred"]


def test_a_module_that_cannot_be_loaded_is_named(kernel: PoorKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaping, "load_module", lambda _: False)
    with pytest.raises(KernelError, match=r"create port wp1: .*cannot limit a rate.* \(modprobe -a sch_tbf\)"):
        Shaping(kernel).limit("create port wp1", 1, 8)
    with pytest.raises(KernelError, match=r"modprobe -a sch_ingress"):
        Shaping(kernel).divert("x", 1, 2, floods=False)
    kernel.lacks = {b"u32"}
    with pytest.raises(KernelError, match=r"modprobe -a cls_u32 act_mirred"):
        Shaping(kernel).divert("x", 1, 2, floods=False)
    kernel.errno = EINVAL
    with pytest.raises(KernelError) as error:
        Shaping(kernel).divert("x", 1, 2, floods=False)
    assert "modprobe" not in str(error.value)
