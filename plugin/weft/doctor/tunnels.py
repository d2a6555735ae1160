"""The encrypted way alone: WireGuard's keys and handshakes (pure)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from weft.doctor.facts import Report
from weft.doctor.findings import Finding, listed
from weft.doctor.ways import Pair, Way, Ways, pair
from weft.probes.links import ProbeLink


def tunnels(ways: Ways) -> Iterator[Finding]:
    wrong = _rekeyed(ways)
    for host in sorted(wrong):
        yield _other_key(ways, host)
    ill = wrong | {host for host, report in ways.view.reports.items() if _is_ill(report)}
    unexplained = [way for way in _silent(ways) if ill.isdisjoint(way) and not _is_explained(ways, way)]
    silent: dict[Pair, Way] = {}
    for way in sorted(unexplained, key=lambda way: not _is_unpeered(ways, way)):
        silent.setdefault(pair(way), way)
    unpeered = {one for one, way in silent.items() if _is_unpeered(ways, way)}
    if all_hosts := ways.everywhere(silent.keys() - unpeered, "encrypted"):
        names, ports = tuple(ways.named(all_hosts)), {str(ways.view.hosts[host].wg_port) for host in all_hosts}
        cause = f"WireGuard gets no answer between all hosts: UDP port {', '.join(sorted(ports))} is dropped on the way"
        evidence = f"no encrypted probe passes between {listed(names)}, while VXLAN in plain passes"
        advice = "open it in what is between them (firewalls, security groups)"
        yield Finding("wireguard", "error", names, cause, f"{evidence}; {advice}")
        silent = {one: silent[one] for one in unpeered}
    for way in silent.values():
        yield _missing_peer(ways, way) if pair(way) in unpeered else _no_handshake(ways, way)


def _rekeyed(ways: Ways) -> set[str]:
    """Hosts whose device has another key than the published one."""
    published = {host: record.wg_key for host, record in ways.view.hosts.items() if record.wg_key}
    used = {host: report.tunnel_key for host, report in ways.view.reports.items() if report.tunnel_key}
    return {host for host in published.keys() & used if published[host] != used[host]}


def _other_key(ways: Ways, host: str) -> Finding:
    name = ways.view.name(host)
    cause = f"the WireGuard key of {name} is another than the one it has published"
    evidence = f"its device has {ways.view.reports[host].tunnel_key}, the store {ways.view.hosts[host].wg_key}"
    return Finding("wireguard", "error", (name,), cause, evidence, "weft rotate-key")


def _silent(ways: Ways) -> Iterator[Way]:
    """Those on which encrypted packets are lost, or were sent without that a handshake ever succeeded."""
    hosts, reports = ways.view.hosts, ways.view.reports
    owners: dict[str, list[str]] = defaultdict(list)
    for host, record in hosts.items():
        if record.wg_key:
            owners[record.wg_key].append(host)
    lost: dict[str, set[str]] = defaultdict(set)
    for (sender, receiver), link in ways.encrypted.items():
        if receiver in hosts and hosts[receiver].wg_key and ways.is_lost(link):
            lost[sender].add(receiver)
    for host in sorted(reports, key=ways.view.name):
        report = reports[host]
        if report.tunnel_key and host not in ways.ill:
            keys = {*report.unpeered, *(key for key, peering in report.peerings.items() if peering.unanswered)}
            others = {other for key in keys for other in owners.get(key, ())} | lost[host]
            for other in sorted(others - {host} - ways.ill, key=ways.view.name):
                yield host, other


def _is_explained(ways: Ways, way: Way) -> bool:
    """By what plain packets suffer, too, or by a packet filter of one of the two."""
    there_and_back = (way, way[::-1])
    links = (ProbeLink(a, b, "encrypted", 0, 0.0) for a, b in there_and_back)
    return not ways.lost.isdisjoint(there_and_back) or any(map(ways.blocked.explains, links))


def _is_unpeered(ways: Ways, way: Way) -> bool:
    return ways.view.hosts[way[1]].wg_key in ways.view.reports[way[0]].unpeered


def _missing_peer(ways: Ways, way: Way) -> Finding:
    a, b = ways.named(way)
    cause = f"{a} does not have {b}'s published WireGuard key among its peers"
    evidence = f"{ways.view.hosts[way[1]].wg_key} is no peer of weft-wg on {a}"
    return Finding("wireguard", "error", (a, b), cause, evidence, "weft plan")


def _no_handshake(ways: Ways, way: Way) -> Finding:
    a, b = ways.named(way)
    record = ways.view.hosts[way[1]]
    peering = ways.view.reports[way[0]].peerings.get(record.wg_key)
    age = f"the last one was {peering.age:.0f} s ago" if peering and peering.age is not None else "there was none"
    cause = f"WireGuard gets no answer between {a} and {b}: UDP port {record.wg_port} is dropped on the way"
    evidence = f"no handshake ({age}), while VXLAN in plain passes"
    return Finding("wireguard", "error", tuple(sorted((a, b))), cause, f"{evidence}; {ways.to_open(way)}")


def _is_ill(report: Report) -> bool:
    return any(one.check in ("wireguard", "guard") for one in report.findings)
