"""From what all hosts see and have measured to what is wrong, each fault once and by its root (pure).

Faults have consequences: a host that is off loses its probes, a port that another program has keeps devices from being
made. So each check asks first whether a cause that was found already explains what it sees, and then says nothing:

1. *Hosts*: which of them give no sign of life or do not answer; nothing else is said of such a one.
2. *Local findings*, made by each host of itself (`local`), and its packet filters, unless probes refute them.
3. *Ways*: what is lost without a local cause is lost between two hosts. Pings to the VTEP address, which take the same
   way but are not UDP, tell a dead underlay from a filtered port; the other direction tells one-way faults.
4. *Comparisons*: clocks, versions, keys, VTEP addresses, pools.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

from weft.doctor.comparison import absentees, clocks, doubles, foreign, pools, versions
from weft.doctor.findings import Finding
from weft.doctor.losses import losses, spoilt
from weft.doctor.sizes import narrow
from weft.doctor.tunnels import tunnels
from weft.doctor.view import View
from weft.doctor.ways import Blocked, Ways

CHECKS = {
    "host": "weft runs, is registered and answers",
    "vtep": "the published VTEP address is right and nobody else's",
    "udp-port": "no packet filter drops UDP, and no other program has the port",
    "path": "packets pass between hosts, both ways",
    "mtu": "full-size packets pass",
    "checksum": "packets arrive as they were sent",
    "kernel": "modules and switches",
    "mounts": "the data plane outlives weft",
    "names": "containers reach the resolver",
    "docker": "the Docker Engine answers, and has what the store has",
    "store": "reachable, quick, with a quorum, compacted; nothing foreign is in it",
    "clock": "the same time everywhere",
    "version": "the same weft everywhere",
    "wireguard": "keys and handshakes",
    "guard": "encrypted networks have no way past WireGuard",
    "drift": "the kernel is as the store says",
    "pools": "addresses are left",
}
"""Every check, and what is fine if it finds nothing."""

_TUNNEL_DRIFT = ("left to do: update WireGuard device", "left to do: put peer")
"""As `reconcile.Plan` words it."""

UNKNOWN = "unknown"
OK = "ok"


@dataclass(frozen=True, slots=True)
class Examination:
    """:param table: by host's name and check, the worst that was found: `ok`, `warning`, `error`, or `unknown`."""

    findings: tuple[Finding, ...]
    table: Mapping[str, Mapping[str, str]]

    def about(self, name: str) -> Examination:
        """What concerns the host of this name, or the cluster as a whole."""
        findings = tuple(one for one in self.findings if name in one.hosts or not one.hosts)
        return Examination(findings, {name: self.table[name]} if name in self.table else {})

    def to_json(self) -> dict[str, Any]:
        return {
            "findings": [asdict(one) for one in self.findings],
            "hosts": [{"host": name, "checks": dict(checks)} for name, checks in self.table.items()],
        }


def examine(view: View) -> Examination:
    """What is wrong with the cluster, worst first, and the table of hosts and checks."""
    absent = {host for host in view.hosts if host not in view.reports and host != view.me}
    mine = view.reports.get(view.me)
    blind = mine is not None and any(one.check == "store" and one.severity == "error" for one in mine.findings)
    findings = [*([] if blind else absentees(view, absent)), *doubles(view)]
    for report in view.reports.values():
        findings += report.findings
    blocked = Blocked(view)
    findings += blocked.findings()
    down = {host for host in absent if host not in view.alive}
    if blind:  # what others have measured is not to be had
        view = replace(view, links=[link for link in view.links if view.me in (link.sender, link.receiver)])
    ways = Ways(view, down, _explaining(view, findings), blocked)
    findings += [*losses(ways), *narrow(ways), *spoilt(ways), *tunnels(ways)]
    findings += [*clocks(view), *versions(view), *pools(view), *foreign(view)]
    findings = _without_what_follows(findings)
    order = {check: number for number, check in enumerate(CHECKS)}
    unique = sorted(_merged(findings), key=lambda one: (one.severity, order.get(one.check, len(order)), one.hosts))
    return Examination(tuple(unique), _table(view, absent, unique))


def _without_what_follows(findings: Sequence[Finding]) -> list[Finding]:
    """Without the drift of a WireGuard device of which is said what is wrong with it."""
    told = {one.hosts[0] for one in findings if one.check == "wireguard" and "WireGuard key" in one.cause}
    return [
        one
        for one in findings
        if not (one.check == "drift" and one.hosts[0] in told and one.evidence.startswith(_TUNNEL_DRIFT))
    ]


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """What several hosts say in the same words, once."""
    same: dict[tuple[str, str, str], Finding] = {}
    for one in findings:
        key = one.check, one.cause, one.command
        first = same.setdefault(key, one)
        if first.hosts != one.hosts:
            same[key] = replace(first, hosts=tuple(sorted({*first.hosts, *one.hosts})))
    return list(same.values())


def _explaining(view: View, findings: Iterable[Finding]) -> set[str]:
    """Ids of the hosts of which no probe can be expected to come or go."""
    checks = ("udp-port", "kernel", "mounts", "vtep")
    named = {host for one in findings if one.check in checks and one.severity == "error" for host in one.hosts}
    return {host for host in {*view.hosts, *view.reports} if view.name(host) in named}


def _table(view: View, absent: Set[str], findings: Iterable[Finding]) -> dict[str, dict[str, str]]:
    names = {host: view.name(host) for host in {*view.hosts, *view.reports}}
    measured = {host for link in view.links if link.small is not None for host in (link.sender, link.receiver)}
    table: dict[str, dict[str, str]] = {}
    for host, name in sorted(names.items(), key=lambda item: item[1]):
        table[name] = dict.fromkeys(CHECKS, UNKNOWN if host in absent else OK)
        if host not in measured:
            table[name] |= dict.fromkeys(("path", "mtu", "checksum"), UNKNOWN)
        if host == view.me and view.foreign is None:
            table[name]["store"] = UNKNOWN
    for one in findings:
        for name in one.hosts:
            row = table.setdefault(name, dict.fromkeys(CHECKS, UNKNOWN))
            if row.get(one.check) != "error":
                row[one.check] = one.severity
    return table
