"""Ways that carry smaller packets than the networks send (pure)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from weft import topology
from weft.doctor.findings import Finding
from weft.doctor.view import LOST
from weft.doctor.ways import Pair, Way, Ways, by_host, pair
from weft.probes.links import ProbeLink


def narrow(ways: Ways) -> Iterator[Finding]:
    """All hosts, or one that has no other ways, are named once; else each pair."""
    found: dict[Pair, list[ProbeLink]] = defaultdict(list)
    for way, link in ways.impaired.items():
        if link.full is not None and link.full >= LOST > (link.small or 0.0):
            found[pair(way)].append(link)
    all_hosts = ways.everywhere(found)
    if all_hosts and len({report.mtu for report in ways.view.reports.values()}) == 1:
        yield _too_narrow(ways, [link for links in found.values() for link in links], all_hosts, "all hosts")
        return
    of_host = by_host(found)
    for host in ways.common(found):
        if own := [link for one in list(found) if one in of_host[host] for link in found.pop(one)]:
            yield _too_narrow(ways, own, [host], f"{ways.view.name(host)} and the other hosts")
    for one, links in found.items():
        yield _too_narrow(ways, links, sorted(one, key=ways.view.name))


def _too_narrow(ways: Ways, links: Sequence[ProbeLink], hosts: Sequence[str], between: str = "") -> Finding:
    way = links[0].sender, links[0].receiver
    overhead = topology.overhead(ways.view.address(way[0]))
    fits = min((link.mtu for link in links if link.mtu), default=None)
    outer = fits + overhead if fits else None
    fit = f"{outer} bytes fit" if outer else "how many fit is not known"
    evidence = f"packets of {links[0].size + overhead} bytes are lost and small ones pass; {fit}"
    names = tuple(ways.named(hosts))
    if finding := _unlike(ways, names, way, outer, evidence):
        return finding
    cause = f"the path between {between or ' and '.join(names)} carries smaller packets than the networks send"
    advice = "raise the MTU of what is between them"
    command = ""
    if outer:
        report = ways.view.reports.get(way[0])
        command = f"ip link set {report.device if report else 'DEVICE'} mtu {outer}"
        advice += f", or lower that of all hosts (weft follows), or make networks with -o mtu={fits}"
    return Finding("mtu", "error", names, cause, f"{evidence}; {advice}", command)


def _unlike(ways: Ways, names: tuple[str, ...], way: Way, outer: int | None, evidence: str) -> Finding | None:
    """If the two interfaces themselves have different MTUs, and that explains what fits."""
    known = [ways.view.reports[host] for host in way if host in ways.view.reports]
    if not known:
        return None
    small, *rest = sorted(known, key=lambda report: report.mtu)
    large = rest[-1] if rest else small
    if small.mtu == large.mtu or (outer and outer < small.mtu):
        return None
    cause = f"the MTU of {small.name}'s underlay interface is {small.mtu}, that of {large.name}'s {large.mtu}"
    command = f"ip link set {small.device} mtu {large.mtu}"
    advice = f"raise it on {small.name}, or lower it on {large.name} (weft follows)"
    return Finding("mtu", "error", names, cause, f"{evidence}; {advice}", command)
