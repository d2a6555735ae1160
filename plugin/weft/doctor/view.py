"""All that one host knows when it examines the cluster: records, reports, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from weft.doctor.facts import Report
from weft.model import Host
from weft.probes.links import Kind, ProbeLink

LOST = 0.99
"""Beyond that share of lost probes, nothing passes."""


@dataclass(frozen=True, slots=True)
class PoolUse:
    """How many of a pool's addresses are held."""

    cidr: str
    network: str
    used: int
    size: int


@dataclass(frozen=True, slots=True)
class View:
    """
    :param me: id of the host that examines.
    :param hosts: the hosts' records by id; `alive` are the ids of those that give signs of life.
    :param reports: of those that answered, by id.
    :param foreign: by key, what is wrong with entries of the store that are none of weft's; None if nobody looked.
    :param waits: by id, between which moments of my own clock a host has told its time.
    """

    me: str
    hosts: Mapping[str, Host]
    alive: Set[str]
    reports: Mapping[str, Report]
    links: Sequence[ProbeLink] = ()
    waits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    pools: Sequence[PoolUse] = ()
    foreign: Mapping[str, str] | None = field(default_factory=dict)
    port: int = 4789

    def name(self, host: str) -> str:
        if host in self.hosts:
            return self.hosts[host].name
        return self.reports[host].name if host in self.reports else host[:12]

    def names(self, hosts: Iterable[str]) -> list[str]:
        return [self.name(host) for host in hosts]

    def address(self, host: str) -> str:
        return self.hosts[host].underlay if host in self.hosts else "?"

    def port_of(self, kind: Kind, host: str) -> int:
        """The UDP port at which a host receives."""
        return self.hosts[host].wg_port if kind == "encrypted" and host in self.hosts else self.port
