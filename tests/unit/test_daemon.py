"""What the composition root decides itself: where this host's VTEP address is looked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import pytest

from weft.cluster import Cluster
from weft.config import from_environment
from weft.daemon import _underlay
from weft.kernel import LinuxKernel
from weft.model import Host

OTHER = Host("b" * 32, "other", "192.0.2.2")


class Routes:
    """A kernel that has a route to every address that it is asked for."""

    def underlay_address(self, spec: str, *, family: int, present: str, towards: Iterable[str]) -> str:
        return present or spec or next(f"towards {one}" for one in towards)


@pytest.mark.parametrize(
    ("setting", "present", "others", "address"),
    [
        ({}, "192.0.2.1", [], "192.0.2.1"),
        ({"WEFT_UNDERLAY": "eth0"}, "", [], "eth0"),
        ({}, "", [OTHER], "towards 192.0.2.2"),
        ({"WEFT_UNDERLAY_FAMILY": "ipv4"}, "", [OTHER], "towards 192.0.2.2"),
    ],
)
def test_the_stores_names_are_not_resolved_for_nothing(
    monkeypatch: pytest.MonkeyPatch, setting: dict[str, str], present: str, others: list[Host], address: str
) -> None:
    """Without an answer of a name server that takes half a minute, at each sign of life."""
    monkeypatch.setattr("weft.store.opening.getaddrinfo", lambda *_, **__: pytest.fail("a name was resolved"))
    settings = from_environment({"WEFT_STORE": "etcd://etcd1.example:2379", **setting})
    cluster = Cluster("a" * 32)
    cluster.apply([(host.key, host.encode()) for host in others])
    assert _underlay(settings, cast(LinuxKernel, Routes()), cluster, "a" * 32, present) == address


def test_without_other_hosts_the_way_to_the_store_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(2, 1, 6, "", ("198.51.100.9", 0))]
    monkeypatch.setattr("weft.store.opening.getaddrinfo", lambda *_, **__: answer)
    settings = from_environment({"WEFT_STORE": "etcd://etcd1.example:2379"})
    kernel = cast(LinuxKernel, Routes())
    assert _underlay(settings, kernel, Cluster("a" * 32), "a" * 32, "") == "towards 198.51.100.9"
