"""What the paths between hosts carry, as probes have found it: believed when two measurements agree (pure).

A switch that drops what is too large tells nobody. One measurement may be wrong, since packets get lost for other
reasons too; so the same has to be found twice, be it that less passes or that all does again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from weft.probes.links import Kind, ProbeLink

_LEAST = 576
"""Inner bytes: what passes less than that is broken, and no MTU would mend it."""

_Way = tuple[str, str, Kind]


class PathMtu:
    """One host's view. Not thread-safe.

    :param overhead: bytes that a tunnel of each kind adds to a packet.
    """

    def __init__(self, overhead: Mapping[Kind, int]) -> None:
        self._overhead = overhead
        self._last: dict[_Way, tuple[str, int]] = {}
        self._believed: dict[_Way, int] = {}

    def take(self, links: Iterable[ProbeLink], hosts: Collection[str]) -> int:
        """Take note of what was measured since; return the least that a path between these hosts carries, in bytes of
        the underlay's packet, or 0 if none carries less than it should."""
        for link in links:
            self._take(link)
        for way in [way for way in self._last if way[0] not in hosts or way[1] not in hosts]:
            del self._last[way]
            self._believed.pop(way, None)
        return min((mtu for mtu in self._believed.values() if mtu), default=0)

    def _take(self, link: ProbeLink) -> None:
        before, said = self._last.get(link.key, ("", -1))
        if link.round == before or link.corrupt or (link.mtu or 0) < _LEAST:
            return
        mtu = self._outer(link)
        if mtu == said:
            self._believed[link.key] = mtu
        self._last[link.key] = link.round, mtu

    def _outer(self, link: ProbeLink) -> int:
        """0 if all passes."""
        return link.mtu + self._overhead[link.kind] if link.mtu and link.mtu < link.size else 0
