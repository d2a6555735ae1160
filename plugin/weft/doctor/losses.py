"""What is lost or spoilt on the ways between hosts: by a firewall, by the underlay, by a network card (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from weft.doctor.findings import Finding, listed
from weft.doctor.view import LOST
from weft.doctor.ways import Pair, Way, Ways, by_host, pair, pairs

_LOSSY = 0.05


def losses(ways: Ways) -> Iterator[Finding]:
    """Ways on which nothing passes."""
    lost = {way for way in ways.lost if not ways.blocked.explains(ways.plain[way])}
    misplaced = _misplaced(ways, lost)
    for host in sorted(misplaced):
        yield _published(ways, host)
    lost = {way for way in lost if misplaced.isdisjoint(way)}
    both = {one for one in pairs(lost) if not _passes_one_way(ways, one, lost)}
    yield from _both_ways(ways, both)
    for sender, receiver in sorted(lost, key=ways.named):
        if pair((sender, receiver)) not in both:
            a, b = ways.named((sender, receiver))
            cause = f"UDP port {ways.view.port} is dropped on the way from {a} to {b}, in this direction only"
            evidence = f"probes from {a} to {b} are lost, those from {b} to {a} arrive"
            there = " to ".join(map(ways.view.address, (sender, receiver)))
            advice = f"open it from {there} in what is between them"
            yield Finding("path", "error", (a, b), cause, f"{evidence}; {advice}")


def spoilt(ways: Ways) -> Iterator[Finding]:
    """Ways on which some packets are lost, or arrive otherwise than they were sent."""
    for way, link in ways.impaired.items():
        a, b = ways.named(way)
        offloaded = link.offloaded is not None and link.offloaded >= LOST > (link.small or 0.0)
        if offloaded or link.corrupt:
            device = ways.view.reports[way[0]].device if way[0] in ways.view.reports else "DEVICE"
            cause = f"packets from {a} arrive at {b} with a wrong checksum: a network card spoils what it offloads"
            lost = "those whose checksum the card makes are lost, others pass"
            evidence = lost if offloaded else f"{link.corrupt} probes arrived with a wrong payload or checksum"
            advice = f"to be repaired on {a}; networks made with -o tx-checksum=off do without the card's"
            command = f"ethtool -K {device} tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off tx off"
            yield Finding("checksum", "error", (a, b), cause, f"{evidence}; {advice}", command)
        elif _LOSSY < (link.small or 0.0) < LOST:
            cause = f"the underlay loses packets from {a} to {b}"
            evidence = f"{link.small or 0:.0%} of the small probes were lost"
            evidence += f"; {b}'s interface counts errors, if any, and so do the switches between them"
            yield Finding("path", "warning", (a, b), cause, evidence, "ip -s link show")


def _misplaced(ways: Ways, lost: Set[Way]) -> set[str]:
    """Hosts to whose published address nothing comes, and which have another one towards the others."""
    heard = {way[1] for way, link in ways.plain.items() if link.small is not None and way not in lost}
    reports = ways.view.reports
    silent = [reports[host] for host in {way[1] for way in lost} - heard if host in reports]
    return {report.host for report in silent if report.towards not in ("", report.underlay)}


def _published(ways: Ways, host: str) -> Finding:
    report, name = ways.view.reports[host], ways.view.name(host)
    cause = f"{name} publishes {report.underlay} as its VTEP address, at which others do not reach it"
    evidence = f"its routes to the other hosts begin at {report.towards}"
    advice = f"set WEFT_UNDERLAY={report.towards} there and restart weft"
    return Finding("vtep", "error", (name,), cause, f"{evidence}; {advice}")


def _passes_one_way(ways: Ways, one: Pair, lost: Set[Way]) -> bool:
    """Whether one of the two directions is known to work."""
    known = (way for way in (one, one[::-1]) if way in ways.plain and way not in lost)
    return any((ways.plain[way].small or 0.0) < LOST for way in known)


def _both_ways(ways: Ways, silent: Set[Pair]) -> Iterator[Finding]:
    left = set(silent)
    dead = {one for one in silent if _reached(ways, one) is False}
    of_host = by_host(dead)
    if (all_hosts := ways.everywhere(silent)) and dead in (silent, set()):
        yield _nowhere(ways, all_hosts, dead=bool(dead))
        return
    for host in ways.common(dead):
        if own := of_host[host] & left:
            left -= own
            yield _cut_off(ways, host, {other for one in own for other in one} - {host})
    for one in sorted(left, key=ways.named):
        yield _silence(ways, one, _reached(ways, one))


def _nowhere(ways: Ways, hosts: Sequence[str], *, dead: bool) -> Finding:
    names = tuple(ways.named(hosts))
    if dead:
        cause = "no host reaches another: the underlay does not carry packets between them"
        evidence = f"neither probes nor pings pass between {listed(names)}; look at the switch and at its VLANs"
        return Finding("path", "error", names, cause, evidence, "ip route")
    cause = f"UDP port {ways.view.port} is dropped on the way between all hosts"
    pings = "pings pass" if any(_reached(ways, one) for one in pairs(ways.lost)) else "whether pings pass is not known"
    evidence = f"no probe is answered between {listed(names)}, while {pings}, and no host's packet filter drops them"
    advice = "open it in what is between them (firewalls, security groups), or give all hosts another WEFT_PORT"
    return Finding("path", "error", names, cause, f"{evidence}; {advice}")


def _cut_off(ways: Ways, host: str, others: Set[str]) -> Finding:
    name, at = ways.view.name(host), ways.view.address(host)
    cause = f"{name} is cut off: the underlay does not carry packets between it and the other hosts"
    evidence = f"neither probes nor pings pass between {at} and {listed(sorted(ways.named(others)))}"
    advice = "look at its routes, cable, VLAN and the firewalls up to it"
    return Finding("path", "error", (name,), cause, f"{evidence}; {advice}", "ip route")


def _silence(ways: Ways, one: Pair, reached: bool | None) -> Finding:
    hosts = sorted(one, key=ways.view.name)
    a, b = ways.named(hosts)
    if reached is False:
        cause = f"{a} and {b} do not reach each other: the underlay does not carry packets between them"
        evidence = f"neither probes nor pings pass between {' and '.join(map(ways.view.address, hosts))}"
        advice = f"look at the routes, here from {a}, and at what is between them"
        command = f"ip route get {ways.view.address(hosts[1])}"
    else:
        cause = f"UDP port {ways.view.port} is dropped on the way between {a} and {b}"
        pings = "pings pass" if reached else "whether pings pass is not known"
        evidence = f"no probe is answered, while {pings}, and neither host's packet filter drops them"
        advice, command = ways.to_open(hosts), ""
    return Finding("path", "error", (a, b), cause, f"{evidence}; {advice}", command)


def _reached(ways: Ways, one: Pair) -> bool | None:
    """Whether one of the two answers the other's pings; None if nobody could ask."""
    reports = ways.view.reports
    said = [reports[a].reached[b] for a, b in (one, one[::-1]) if a in reports and b in reports[a].reached]
    return any(said) if said else None
