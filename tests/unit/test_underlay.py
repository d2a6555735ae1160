"""How the host's own network is asked; what is read of it, `tests/netns/test_underlay.py` tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from weft.kernel.connection import Connection
from weft.kernel.netlink import Rtnetlink
from weft.kernel.underlay import Underlay


class Message(dict[str, Any]):
    def get_attr(self, name: str) -> Any:
        return self.get(name)


class Kernel:
    """A connection to a kernel with one route, to everywhere."""

    def __init__(self) -> None:
        self.lookups: list[int] = []
        """Of each call."""

    def call(self, what: str, request: Callable[[Any], Any]) -> Any:
        self.lookups.append(0)
        return request(self)

    def route(self, command: str, dst: str) -> list[Message]:
        self.lookups[-1] += 1
        return [Message(RTA_OIF=1)]

    def link(self, command: str, index: int) -> list[Message]:
        return [Message(IFLA_MTU=1400)]


def test_routes_to_many_hosts_leave_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Underlay, "_interface_mtu", lambda *_: 1500)
    kernel, reader = Kernel(), Rtnetlink(lambda: pytest.fail("no table is read"))
    hosts = (f"10.0.{n // 250}.{n % 250}" for n in range(1020))
    assert Underlay(cast(Connection, kernel), reader).mtu("10.0.0.1", hosts) == 1400
    assert (sum(kernel.lookups), max(kernel.lookups)) == (1020, 50)
