"""The measured ways between hosts, as far as no fault of a host itself accounts for what they lose (pure)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Set

from weft.doctor.facts import PortDrop
from weft.doctor.findings import Finding, Severity
from weft.doctor.view import LOST, View
from weft.probes.links import Kind, ProbeLink

Way = tuple[str, str]
"""Ids of the host that sends and of the one that receives."""
Pair = tuple[str, str]
"""Ids of two hosts, sorted."""


class Blocked:
    """The UDP ports that hosts' own packet filters drop, as far as no probe shows the contrary."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._reaching: dict[tuple[str, int, bool], list[ProbeLink]] = defaultdict(list)
        for link in view.links:
            port = view.port_of(link.kind, link.receiver)
            self._reaching[link.receiver, port, False].append(link)
            self._reaching[link.sender, port, True].append(link)
        self._found = {
            (host, drop.port, drop.outgoing): drop
            for host, report in view.reports.items()
            for drop in report.drops
            if not self._refuted(host, drop)
        }
        self.hosts = {host for host, port, _ in self._found if port == view.port}
        """Those that drop what all plain networks and probes use."""

    def explains(self, link: ProbeLink) -> bool:
        sent = self._view.port_of(link.kind, link.receiver)
        ports = {sent, self._view.port} if link.kind == "plain" else {sent}
        return any(
            (link.receiver, port, False) in self._found or (link.sender, port, True) in self._found for port in ports
        )

    def findings(self) -> Iterator[Finding]:
        for (host, port, outgoing), blocked in self._found.items():
            drop, name = blocked.drop, self._view.name(host)
            seen = any(link.small is not None and link.small >= LOST for link in self._touching(host, blocked))
            which = f"{port} of network {blocked.network}" if blocked.network else str(port)
            way = "which it sends" if outgoing else "incoming"
            cause = f"a packet filter of {name} drops UDP port {which}, {way}"
            evidence = f"{drop.where}: {drop.rule}" + ("; probes are lost" if seen else "")
            if passes := self._passed(host, blocked):
                evidence += "; answers pass, and so do all packets until the hosts are silent for a while"
            severity: Severity = "error" if seen or (drop.sure and not passes) else "warning"
            yield Finding("udp-port", severity, (name,), cause, evidence, drop.repair)

    def _refuted(self, host: str, drop: PortDrop) -> bool:
        """Some probe has passed where the rule is said to drop all.

        Of WireGuard that refutes no rule that is understood: both hosts send from the port at which they receive, so
        what one sends looks like the answer to what the other has sent, and a firewall lets it in.
        """
        answers = drop.port == self._view.port_of("encrypted", host) and not drop.outgoing and drop.drop.sure
        return not answers and self._passed(host, drop)

    def _passed(self, host: str, drop: PortDrop) -> bool:
        return any(link.small is not None and link.small < LOST for link in self._touching(host, drop))

    def _touching(self, host: str, drop: PortDrop) -> list[ProbeLink]:
        return self._reaching.get((host, drop.port, drop.outgoing), [])


class Ways:
    """
    :param down: hosts that are off.
    :param faulty: hosts with a fault of their own. It accounts for what they lose, unless it is no packet filter and
        plain probes come to them.
    """

    def __init__(self, view: View, down: Set[str], faulty: Set[str], blocked: Blocked) -> None:
        self.view = view
        self.blocked = blocked
        self.ill = down | faulty
        heard = {
            one.receiver for one in view.links if one.kind == "plain" and one.small is not None and one.small < LOST
        }
        ill = {"plain": down | (faulty - (heard - blocked.hosts)), "encrypted": self.ill}
        self._links = {one.key: one for one in view.links if {one.sender, one.receiver}.isdisjoint(ill[one.kind])}
        self.plain = {k[:2]: link for k, link in self._links.items() if link.kind == "plain"}
        self.encrypted = {k[:2]: link for k, link in self._links.items() if link.kind == "encrypted"}
        self._measured = {"plain": by_host(pairs(self.plain)), "encrypted": by_host(pairs(self.encrypted))}
        self.lost = {way for way, link in self.plain.items() if self.is_lost(link)}
        """In plain; what is encrypted is lost as well, then."""
        impaired = [way for way, link in self.plain.items() if link.faulty and way not in self.lost]
        self.impaired = {way: self.plain[way] for way in sorted(impaired, key=self.named)}
        """Where some packets pass."""

    def is_lost(self, link: ProbeLink) -> bool:
        """All that was sent. That nothing was answered, which is all that a sender knows, may be the other direction's
        fault: it counts unless the sender itself says that nothing comes from there."""
        if link.small is None or link.small < LOST:
            return False
        back = self._links.get((link.receiver, link.sender, link.kind))
        return link.attested or not (back and back.attested and back.small is not None and back.small >= LOST)

    def common(self, faulty: Iterable[Pair]) -> list[str]:
        """Hosts that are in several of these pairs, and have no other pair that was measured; sorted by name."""
        ends, measured = by_host(faulty), self._measured["plain"]
        found = [host for host, own in ends.items() if len(own) > 1 and own == measured[host]]
        return sorted(found, key=self.view.name) if len(found) < 2 or len(ends) > len(found) else []

    def everywhere(self, faulty: Iterable[Pair], kind: Kind = "plain") -> list[str]:
        """The hosts of these pairs, if they are several pairs and all that were measured of these hosts; by name."""
        ends, measured = by_host(faulty), self._measured[kind]
        if len(ends) < 3 or any(own != measured[host] for host, own in ends.items()):
            return []
        return sorted(ends, key=self.view.name)

    def named(self, way: Iterable[str]) -> list[str]:
        """What to sort ways by."""
        return self.view.names(way)

    def to_open(self, way: Iterable[str]) -> str:
        return f"open it between {' and '.join(map(self.view.address, way))} (firewalls, security groups)"


def pair(way: Way) -> Pair:
    return (min(way), max(way))


def pairs(ways: Iterable[Way]) -> set[Pair]:
    return {pair(way) for way in ways}


def by_host(found: Iterable[Pair]) -> dict[str, set[Pair]]:
    """Each host's pairs; an empty set for a host that has none."""
    hosts: dict[str, set[Pair]] = defaultdict(set)
    for one in found:
        for host in one:
            hosts[host].add(one)
    return hosts
