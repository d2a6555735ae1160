"""From what all hosts see and have measured to what is wrong, each fault once and by its root (pure).

Faults have consequences: a host that is off loses its probes, a port that another program has keeps devices from being
made. So each check asks first whether a cause that was found already explains what it sees, and then says nothing:

1. *Hosts*: which of them give no sign of life or do not answer; nothing else is said of such a one.
2. *Local findings*, made by each host of itself (`of_host`), and its packet filters, unless probes refute them.
3. *Links*: what is lost without a local cause is lost between two hosts. Pings to the VTEP address, which take the same
   way but are not UDP, tell a dead underlay from a filtered port; the other direction tells one-way faults.
4. *Comparisons*: clocks, versions, keys, VTEP addresses, pools.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from weft import topology
from weft.doctor.facts import Facts, PortDrop, Report
from weft.doctor.findings import Finding, Severity
from weft.model import Host
from weft.probes.links import Kind, ProbeLink

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
    "store": "reachable, quick, with a quorum, compacted",
    "clock": "the same time everywhere",
    "version": "the same weft everywhere",
    "wireguard": "keys and handshakes",
    "guard": "encrypted networks have no way past WireGuard",
    "drift": "the kernel is as the store says",
    "pools": "addresses are left",
}
"""Every check, and what is fine if it finds nothing."""

SLOW_STORE_SECONDS = 0.5
SKEW_SECONDS = 2.0
"""Beyond what the answer's way through the store explains."""
FULL = 0.9
"""The share of a pool that counts as nearly full."""
_LOST = 0.99
_LOSSY = 0.05

UNKNOWN = "unknown"
OK = "ok"


@dataclass(frozen=True, slots=True)
class PoolUse:
    """How many of a pool's addresses are held."""

    cidr: str
    network: str
    used: int
    size: int


@dataclass(frozen=True, slots=True)
class View:
    """All that one host knows when it examines the cluster.

    :param me: id of that host.
    :param hosts: the hosts' records by id; `alive` are the ids of those that give signs of life.
    :param reports: of those that answered, by id.
    :param waits: by id, between which moments of my own clock a host has told its time.
    """

    me: str
    hosts: Mapping[str, Host]
    alive: Set[str]
    reports: Mapping[str, Report]
    links: Sequence[ProbeLink] = ()
    waits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    pools: Sequence[PoolUse] = ()
    port: int = 4789

    def name(self, host: str) -> str:
        if host in self.hosts:
            return self.hosts[host].name
        return self.reports[host].name if host in self.reports else host[:12]

    def port_of(self, kind: Kind, host: str) -> int:
        """The UDP port at which a host receives."""
        return self.hosts[host].wg_port if kind == "encrypted" and host in self.hosts else self.port


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


# One host


def of_host(facts: Facts) -> Iterator[Finding]:
    """What is wrong with a host by its own facts, without consequences of what is found first."""
    if facts.daemon:
        yield _one(facts, "host", "weft does not run", facts.daemon, "systemctl start weft")
    port = list(_ports(facts))
    yield from port
    kernel = list(_kernel(facts))
    yield from kernel
    yield from _vtep(facts)
    yield from _names(facts)
    yield from _store(facts)
    if facts.listener:
        cause = "nobody can read the host's health, metrics and page"
        yield _one(facts, "host", cause, facts.listener, "ss -ltnp", "warning")
    if facts.engine:
        cause = "the Docker Engine does not answer weft"
        yield _one(facts, "docker", cause, facts.engine, "systemctl status docker")
    guard = list(_encryption(facts))
    yield from guard
    if facts.drift and not (port or kernel or guard):
        count = len(facts.drift)
        more = f" and {count - 1} more" if count > 1 else ""
        cause = "the kernel is otherwise than the store says, and weft does not mend it"
        yield _one(facts, "drift", cause, f"left to do: {facts.drift[0]}{more}", "weft plan")
    if facts.orphans and not (facts.engine or facts.store.problem):
        count = len(facts.orphans)
        cause = f"the store has what Docker has not: {count} object{'s' if count > 1 else ''}"
        yield _one(facts, "docker", cause, facts.orphans[0], "weft gc", "warning")

    for conflict in facts.conflicts:
        cause = "a network of the host's Docker does not agree with the cluster"
        yield _one(facts, "docker", cause, conflict, "docker network ls", "warning")


def _one(
    facts: Facts, check: str, cause: str, evidence: str, command: str = "", severity: Severity = "error"
) -> Finding:
    return Finding(check, severity, (facts.name,), _line(cause), _line(evidence), command)


def _line(text: str) -> str:
    return " ".join(text.split())


def _ports(facts: Facts) -> Iterator[Finding]:
    for port, user in facts.users.items():
        what, setting = ("VXLAN", "WEFT_PORT") if port == facts.port else ("WireGuard", "WEFT_WG_PORT")
        cause = f"UDP port {port}, which {what} needs, is used by {user}"
        other = "on all hosts" if port == facts.port else "here"
        evidence = f"ss -lunp shows {user} at port {port}: stop it, or set another {setting} {other}"
        yield _one(facts, "udp-port", cause, evidence)
    if facts.refused and not facts.users:
        cause = "a UDP port that weft needs is used by another program"
        yield _one(facts, "udp-port", cause, f"{facts.refused}; stop it, or set another port", "ss -lunp")


def _kernel(facts: Facts) -> Iterator[Finding]:
    if facts.kernel and not (facts.users or facts.refused):
        command = "weft setup host"
        yield _one(facts, "kernel", "this kernel cannot make what a network needs", facts.kernel, command)
    for switch in facts.switches:
        if facts.engine and not switch.place:
            continue  # Docker sets those of the host when it starts
        inside = f"nsenter --net={switch.place} " if switch.place else ""
        evidence = f"{switch.name} is {switch.value}{' in ' + switch.place if switch.place else ''}"
        command = f"{inside}sysctl -w {switch.name}={switch.wanted}"
        cause = f"the kernel's switch {switch.name} must be {switch.wanted}"
        yield _one(facts, "kernel", cause, evidence, command)
    if facts.mounts:
        command = "mount --make-rshared /run; weft setup host"
        yield _one(facts, "mounts", "the data plane is not mounted where it outlives weft", facts.mounts, command)


def _vtep(facts: Facts) -> Iterator[Finding]:
    if "underlay address" in facts.registered:
        cause = f"another host has the VTEP address {facts.underlay}, too"
        advice = "set another WEFT_UNDERLAY here, or forget the other host if it is gone"
        yield _one(facts, "vtep", cause, f"{facts.registered}; {advice}", "weft host ls")
    elif facts.registered and not facts.store.problem:
        yield _one(facts, "host", "the host is not registered in the cluster", facts.registered)
    if facts.underlay and not facts.device:
        cause = f"the VTEP address {facts.underlay} that is published is on none of the host's interfaces"
        evidence = f"no interface has {facts.underlay}; set WEFT_UNDERLAY to one that the host has"
        yield _one(facts, "vtep", cause, evidence, "ip -br address")


def _names(facts: Facts) -> Iterator[Finding]:
    if facts.resolver:
        yield _one(facts, "names", "names of other hosts' containers are not answered", facts.resolver)
    elif facts.filtered:
        at = facts.resolver_address
        cause = f"a packet filter of the host drops what containers ask the resolver at {at}"
        evidence = f"a question from a container's namespace to {at} port 53 got no answer"
        command = f"iptables -I INPUT -i docker_gwbridge -d {at} -p udp --dport 53 -j ACCEPT"
        yield _one(facts, "names", cause, evidence, command)
    if facts.dns:
        cause = "Docker does not ask weft's resolver for names"
        yield _one(facts, "names", cause, facts.dns, "weft setup dns && systemctl restart docker", "warning")


def _store(facts: Facts) -> Iterator[Finding]:
    store = facts.store
    broken = {place: problem for place, problem in store.members.items() if problem}
    listed = ", ".join(f"{place} ({problem})" for place, problem in sorted(broken.items()))
    command = "etcdctl endpoint status --cluster"
    if store.problem:
        cause = "the store cannot be reached"
        if broken and len(broken) < len(store.members):
            cause = f"the store has no quorum: {len(broken)} of {len(store.members)} members of etcd do not serve"
        elif broken and any("leader" in problem for problem in broken.values()):
            cause = f"the store has no quorum: no member of etcd serves ({len(broken)} were asked)"
        yield _one(facts, "store", cause, listed or store.problem, command if broken else "")
        return
    if broken:
        left = len(store.members) - len(broken)
        cause = (
            f"{len(broken)} of {len(store.members)} members of etcd {'does' if len(broken) == 1 else 'do'} not serve"
        )
        evidence = f"{listed}; {left} still {'does' if left == 1 else 'do'}"
        yield _one(facts, "store", cause, evidence, command, "warning")
    elif store.seconds > SLOW_STORE_SECONDS:
        cause = "the store is slow"
        evidence = f"one reading took {store.seconds:.1f} s, of {SLOW_STORE_SECONDS} that are fine"
        yield _one(facts, "store", cause, evidence, "etcdctl check perf", "warning")
    if store.alarm:
        cause = f"etcd refuses to write: alarm {store.alarm}"
        command = "etcdctl compact REVISION; etcdctl defrag --cluster; etcdctl alarm disarm"
        yield _one(facts, "store", cause, f"etcd has the alarm {store.alarm} set", command)
    elif store.history:
        cause = "etcd is not compacted, and will run out of space"
        evidence = f"it keeps more than the last {store.history} revisions"
        advice = "start etcd with --auto-compaction-mode=periodic --auto-compaction-retention=1h"
        yield _one(facts, "store", cause, f"{evidence}; {advice}", severity="warning")


def _encryption(facts: Facts) -> Iterator[Finding]:
    if facts.intruders:
        there = ", ".join(facts.intruders)
        cause = "encrypted networks are shut: there is another way out of WireGuard's namespace"
        command = f"nsenter --net=/run/docker/weft/wg ip link delete {facts.intruders[0]}"
        yield _one(facts, "guard", cause, f"{there} is in /run/docker/weft/wg beside weft-wg", command)
    elif facts.encryption and facts.wg_port not in facts.users:
        yield _one(facts, "wireguard", "no encrypted network works", facts.encryption)


# All hosts


def examine(view: View) -> Examination:
    """What is wrong with the cluster, worst first, and the table of hosts and checks."""
    absent = {host for host in view.hosts if host not in view.reports and host != view.me}
    mine = view.reports.get(view.me)
    blind = mine is not None and any(one.check == "store" and one.severity == "error" for one in mine.findings)
    findings = [*([] if blind else _hosts(view, absent)), *_doubles(view)]
    for report in view.reports.values():
        findings += report.findings
    blocked = _Blocked(view)
    findings += blocked.findings()
    down = {host for host in absent if host not in view.alive}
    if blind:  # what others have measured is not to be had
        view = replace(view, links=[link for link in view.links if view.me in (link.sender, link.receiver)])
    findings += _Links(view, _explaining(view, findings), blocked, down).findings()
    findings += [*_clocks(view), *_versions(view), *_pools(view)]
    rekeyed = {one.hosts for one in findings if one.check == "wireguard" and "another than the one" in one.cause}
    findings = [one for one in findings if one.check != "drift" or one.hosts not in rekeyed]
    order = {check: number for number, check in enumerate(CHECKS)}
    unique = sorted(_merged(findings), key=lambda one: (one.severity, order.get(one.check, len(order)), one.hosts))
    return Examination(tuple(unique), _table(view, absent, unique))


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


def _hosts(view: View, absent: Set[str]) -> Iterator[Finding]:
    for host in sorted(absent, key=view.name):
        record, name = view.hosts[host], view.name(host)
        asked = [view.name(h) for h, report in view.reports.items() if host in report.reached]
        reached = any(report.reached.get(host) for report in view.reports.values())
        # Where nobody may send pings there are the probes, which may be from before it fell silent.
        passing = not asked and any(link.small is not None and link.small < _LOST for link in _of(view, host))
        if host in view.alive:
            cause = f"weft on {name} is alive but did not answer what it was asked"
            evidence = f"it gives signs of life in the store; its version is {record.version or 'unknown'}"
            yield Finding("host", "warning", (name,), cause, evidence, "weft doctor")
        elif passing or reached:
            cause = f"{name} is up, but weft there does not run or does not reach the store"
            evidence = f"no sign of life in the store, while {record.underlay} answers"
            yield Finding("host", "error", (name,), cause, evidence, "systemctl start weft; weft doctor")
        else:
            cause = f"{name} is off, or cut off from all other hosts"
            pinged = f", and {record.underlay} answers no ping of {', '.join(asked)}" if asked else ""
            advice = f"bring it back, or if it is gone for good, weft host forget {name}"
            yield Finding("host", "error", (name,), cause, f"no sign of life in the store{pinged}; {advice}")


def _of(view: View, host: str) -> Iterator[ProbeLink]:
    yield from (link for link in view.links if host in (link.sender, link.receiver))


def _doubles(view: View) -> Iterator[Finding]:
    at: dict[str, list[str]] = defaultdict(list)
    for host in view.hosts.values():
        at[host.underlay].append(host.id)
    for address, hosts in at.items():
        if len(hosts) > 1:
            names = tuple(sorted(map(view.name, hosts)))
            cause = f"{' and '.join(names)} publish one VTEP address, {address}"
            evidence = f"the store has {address} in {len(hosts)} hosts' records"
            advice = "set WEFT_UNDERLAY on one of them, or forget the one that is gone"
            yield Finding("vtep", "error", names, cause, f"{evidence}; {advice}", "weft host ls")


def _clocks(view: View) -> Iterator[Finding]:
    offsets = {view.me: 0.0}
    for host, (asked, heard) in view.waits.items():
        if host in view.reports and host != view.me:
            told = view.reports[host].time
            offsets[host] = max(0.0, told - heard) + min(0.0, told - asked)
    true = median(offsets.values())
    wrong = sorted(host for host in offsets if abs(offsets[host] - true) > SKEW_SECONDS)
    command = "timedatectl set-ntp true"
    difference = max(offsets.values()) - min(offsets.values())
    if len(offsets) == 2 and difference > SKEW_SECONDS:
        names = tuple(sorted(map(view.name, offsets)))
        cause = f"the clocks of {' and '.join(names)} differ by {difference:.0f} s"
        yield Finding("clock", "warning", names, cause, "each told its time on request", command)
        return
    for host in wrong:
        name, offset = view.name(host), offsets[host] - true
        cause = f"the clock of {name} is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} the others"
        evidence = f"asked for its time, it told one that differs from that of {len(offsets) - 1} other hosts"
        yield Finding("clock", "warning", (name,), cause, evidence, command)


def _versions(view: View) -> Iterator[Finding]:
    versions = {host: record.version for host, record in view.hosts.items() if record.version}
    versions |= {host: report.version for host, report in view.reports.items() if report.version}
    newest = max(versions.values(), key=_version, default="")
    if old := sorted((host for host in versions if versions[host] != newest), key=view.name):
        names = tuple(map(view.name, old))
        cause = f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} an older weft than the other hosts"
        evidence = ", ".join(f"{view.name(host)}: {versions[host]}" for host in old) + f"; newest: {newest}"
        yield Finding("version", "warning", names, cause, evidence)


def _version(text: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in text.replace("-", ".").split(".")]


def _pools(view: View) -> Iterator[Finding]:
    for pool in view.pools:
        if pool.used >= FULL * pool.size:
            cause = f"pool {pool.cidr} of network {pool.network} is nearly full"
            evidence = f"{pool.used} of {pool.size} addresses are held"
            advice = "if that frees none, move containers to a network with a larger --subnet"
            yield Finding("pools", "warning", (), cause, f"{evidence}; {advice}", "weft gc")


class _Blocked:
    """The UDP ports that hosts' own packet filters drop, as far as no probe shows the contrary."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._found = {
            (host, drop.port, drop.outgoing): drop
            for host, report in view.reports.items()
            for drop in report.drops
            if not self._refuted(host, drop)
        }

    def explains(self, link: ProbeLink) -> bool:
        sent = self._view.port_of(link.kind, link.receiver)
        ports = {sent, self._view.port} if link.kind == "plain" else {sent}
        return any(
            (link.receiver, port, False) in self._found or (link.sender, port, True) in self._found for port in ports
        )

    def findings(self) -> Iterator[Finding]:
        for (host, port, outgoing), blocked in self._found.items():
            drop, name = blocked.drop, self._view.name(host)
            seen = any(link.small is not None and link.small >= _LOST for link in self._touching(host, blocked))
            what = f"a packet filter of {name} drops UDP port {port}, {'which it sends' if outgoing else 'incoming'}"
            evidence = f"{drop.where}: {drop.rule}" + ("; probes are lost" if seen else "")
            severity: Severity = "error" if drop.sure or seen else "warning"
            yield Finding("udp-port", severity, (name,), what, evidence, drop.repair)

    def _refuted(self, host: str, drop: PortDrop) -> bool:
        """Some probe has passed where the rule is said to drop all."""
        return any(link.small is not None and link.small < _LOST for link in self._touching(host, drop))

    def _touching(self, host: str, drop: PortDrop) -> Iterator[ProbeLink]:
        for link in self._view.links:
            here, there = (link.sender, link.receiver) if drop.outgoing else (link.receiver, link.sender)
            if here == host and there and self._view.port_of(link.kind, link.receiver) == drop.port:
                yield link


class _Links:
    """What is lost, cut or spoilt between hosts.

    :param explained: hosts whose own fault accounts for whatever they lose.
    :param down: hosts that are off.
    """

    def __init__(self, view: View, explained: Set[str], blocked: _Blocked, down: Set[str]) -> None:
        self._view = view
        self._blocked = blocked
        self._ill = explained | down
        self._links = {link.key: link for link in view.links if {link.sender, link.receiver}.isdisjoint(self._ill)}
        self._plain = {k[:2]: link for k, link in self._links.items() if link.kind == "plain"}
        self._encrypted = {k[:2]: link for k, link in self._links.items() if link.kind == "encrypted"}

    def findings(self) -> Iterator[Finding]:
        lost = {way for way, link in self._plain.items() if self._is_lost(link)}
        unexplained = {way for way in lost if not self._blocked.explains(self._plain[way])}
        yield from self._losses(unexplained)
        yield from self._sizes({way: link for way, link in self._plain.items() if way not in lost})
        yield from self._spoilt({way: link for way, link in self._plain.items() if way not in lost})
        yield from self._wireguard(lost)

    def _is_lost(self, link: ProbeLink) -> bool:
        """All that was sent. That nothing was answered, which is all that a sender knows, may be the other direction's
        fault: it counts unless the sender itself says that nothing comes from there."""
        if link.small is None or link.small < _LOST:
            return False
        back = self._links.get((link.receiver, link.sender, link.kind))
        return link.attested or not (back and back.attested and back.small is not None and back.small >= _LOST)

    def _losses(self, lost: Set[tuple[str, str]]) -> Iterator[Finding]:
        misplaced = {host for host in self._ends(lost) if self._is_misplaced(host, lost)}
        yield from (self._misplaced(host) for host in sorted(misplaced, key=self._view.name))
        lost = {way for way in lost if misplaced.isdisjoint(way)}
        pairs = {tuple(sorted(way)) for way in lost}
        both: set[tuple[str, ...]] = {pair for pair in pairs if pair in lost and pair[::-1] in lost}
        both |= {pair for pair in pairs if pair not in both and not self._passes_back(pair, lost)}
        yield from self._both_ways(both)
        for sender, receiver in sorted(lost, key=self._named):
            if tuple(sorted((sender, receiver))) not in both:
                a, b, port = self._view.name(sender), self._view.name(receiver), self._view.port
                cause = f"UDP port {port} is dropped on the way from {a} to {b}, in this direction only"
                evidence = f"probes from {a} to {b} are lost, those from {b} to {a} arrive"
                advice = f"open it from {self._at(sender)} to {self._at(receiver)} in what is between them"
                yield Finding("path", "error", (a, b), cause, f"{evidence}; {advice}")

    def _passes_back(self, pair: tuple[str, ...], lost: Set[tuple[str, str]]) -> bool:
        """Whether one of the two directions is known to work."""
        ways = [(pair[0], pair[1]), (pair[1], pair[0])]
        return any(way not in lost and way in self._plain and (self._plain[way].small or 0.0) < _LOST for way in ways)

    def _both_ways(self, pairs: Set[tuple[str, ...]]) -> Iterator[Finding]:
        unreached = {pair for pair in pairs if self._reached(pair) is False}
        for host in self._common(unreached & pairs):
            name = self._view.name(host)
            others = sorted(self._view.name(h) for pair in pairs & unreached if host in pair for h in pair if h != host)
            cause = f"{name} is cut off: the underlay does not carry packets between it and the other hosts"
            evidence = f"neither probes nor pings pass between {self._at(host)} and {', '.join(others)}"
            advice = "look at its routes, cable, VLAN and the firewalls up to it"
            yield Finding("path", "error", (name,), cause, f"{evidence}; {advice}", "ip route")
            pairs = {pair for pair in pairs if host not in pair}
        for pair in sorted(pairs, key=self._named):
            yield self._pair(pair, self._reached(pair))

    def _pair(self, pair: Sequence[str], reached: bool | None) -> Finding:
        pair = sorted(pair, key=self._view.name)
        a, b = map(self._view.name, pair)
        port = self._view.port
        if reached is False:
            cause = f"{a} and {b} do not reach each other: the underlay does not carry packets between them"
            evidence = f"neither probes nor pings pass between {' and '.join(map(self._at, pair))}"
            advice = f"look at the routes, here from {a}, and at what is between them"
            command = f"ip route get {self._at(pair[1])}"
        else:
            cause = f"UDP port {port} is dropped on the way between {a} and {b}"
            pings = "pings pass" if reached else "whether pings pass is not known"
            evidence = f"no probe is answered, while {pings}, and neither host's packet filter drops them"
            advice, command = self._open(pair), ""
        return Finding("path", "error", (a, b), cause, f"{evidence}; {advice}", command)

    def _common(self, pairs: Set[tuple[str, ...]]) -> list[str]:
        """Hosts that are in several of these pairs, and lost all they have."""
        found = []
        for host in sorted(self._ends(pairs), key=self._view.name):
            mine = {pair for pair in pairs if host in pair}
            measured = {tuple(sorted(way)) for way in self._plain if host in way}
            if len(mine) > 1 and mine == measured:
                found.append(host)
        return found if len(found) < 2 or len(self._ends(pairs)) > len(found) else []

    def _is_misplaced(self, host: str, lost: Set[tuple[str, str]]) -> bool:
        """Nothing comes to the address that it publishes, and it has another one towards the others."""
        report = self._view.reports.get(host)
        coming = {way for way, link in self._plain.items() if way[1] == host and link.small is not None}
        return bool(report and report.towards not in ("", report.underlay) and coming and coming <= lost)

    def _misplaced(self, host: str) -> Finding:
        report, name = self._view.reports[host], self._view.name(host)
        cause = f"{name} publishes {report.underlay} as its VTEP address, at which others do not reach it"
        evidence = f"its routes to the other hosts begin at {report.towards}"
        advice = f"set WEFT_UNDERLAY={report.towards} there and restart weft"
        return Finding("vtep", "error", (name,), cause, f"{evidence}; {advice}")

    def _reached(self, pair: Sequence[str]) -> bool | None:
        """Whether one of the two answers the other's pings; None if nobody could ask."""
        reports = self._view.reports
        said = [reports[a].reached[b] for a, b in (pair, pair[::-1]) if a in reports and b in reports[a].reached]
        return any(said) if said else None

    def _sizes(self, links: Mapping[tuple[str, str], ProbeLink]) -> Iterator[Finding]:
        narrow: dict[tuple[str, ...], list[ProbeLink]] = defaultdict(list)
        for way, link in sorted(links.items(), key=lambda item: self._named(item[0])):
            if link.full is not None and link.full >= _LOST > (link.small or 0.0):
                narrow[tuple(sorted(way))].append(link)
        for host in self._common(narrow.keys()):
            yield self._too_narrow([link for pair in list(narrow) if host in pair for link in narrow.pop(pair)], host)
        for found in narrow.values():
            yield self._too_narrow(found)

    def _too_narrow(self, links: Sequence[ProbeLink], common: str = "") -> Finding:
        """:param common: the host that all these links lead to or from."""
        way = links[0].sender, links[0].receiver
        overhead = topology.overhead(self._at(way[0]))
        fits = min((link.mtu for link in links if link.mtu), default=None)
        outer = fits + overhead if fits else None
        fit = f"{outer} bytes fit" if outer else "how many fit is not known"
        evidence = f"packets of {links[0].size + overhead} bytes are lost and small ones pass; {fit}"
        hosts = (common,) if common else tuple(sorted(way, key=self._view.name))
        names = tuple(map(self._view.name, hosts))
        between = " and ".join([*names, *(["the other hosts"] if common else [])])
        if finding := self._unlike(hosts, way, outer, evidence):
            return finding
        cause = f"the path between {between} carries smaller packets than the networks send"
        advice = "raise the MTU of what is between them"
        command = ""
        if outer:
            report = self._view.reports.get(way[0])
            command = f"ip link set {report.device if report else 'DEVICE'} mtu {outer}"
            advice += f", or lower that of all hosts (weft follows), or make networks with -o mtu={fits}"
        return Finding("mtu", "error", names, cause, f"{evidence}; {advice}", command)

    def _unlike(self, hosts: tuple[str, ...], way: tuple[str, str], outer: int | None, evidence: str) -> Finding | None:
        """If the two interfaces themselves have different MTUs, and that explains what fits."""
        known = [self._view.reports[host] for host in way if host in self._view.reports]
        if not known:
            return None
        small, *rest = sorted(known, key=lambda report: report.mtu)
        large = rest[-1] if rest else small
        if small.mtu == large.mtu or (outer and outer < small.mtu):
            return None
        cause = f"the MTU of {small.name}'s underlay interface is {small.mtu}, that of {large.name}'s {large.mtu}"
        command = f"ip link set {small.device} mtu {large.mtu}"
        advice = f"raise it on {small.name}, or lower it on {large.name} (weft follows)"
        return Finding("mtu", "error", tuple(map(self._view.name, hosts)), cause, f"{evidence}; {advice}", command)

    def _spoilt(self, links: Mapping[tuple[str, str], ProbeLink]) -> Iterator[Finding]:
        for way, link in sorted(links.items(), key=lambda item: self._named(item[0])):
            a, b = map(self._view.name, way)
            offloaded = link.offloaded is not None and link.offloaded >= _LOST > (link.small or 0.0)
            if offloaded or link.corrupt:
                device = self._view.reports[way[0]].device if way[0] in self._view.reports else "DEVICE"
                cause = f"packets from {a} arrive at {b} with a wrong checksum: a network card spoils what it offloads"
                lost = "those whose checksum the card makes are lost, others pass"
                evidence = lost if offloaded else f"{link.corrupt} probes arrived with a wrong payload or checksum"
                command = f"ethtool -K {device} tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off tx off"
                yield Finding("checksum", "error", (a, b), cause, f"{evidence}; to be repaired on {a}", command)
            elif _LOSSY < (link.small or 0.0) < _LOST:
                cause = f"the underlay loses packets from {a} to {b}"
                evidence = f"{link.small or 0:.0%} of the small probes were lost"
                evidence += f"; {b}'s interface counts errors, if any, and so do the switches between them"
                yield Finding("path", "warning", (a, b), cause, evidence, "ip -s link show")

    def _wireguard(self, lost: Set[tuple[str, str]]) -> Iterator[Finding]:
        """What concerns the encrypted way alone."""
        wrong = set()
        for host, report in sorted(self._view.reports.items()):
            record = self._view.hosts.get(host)
            if record and record.wg_key and report.tunnel_key and record.wg_key != report.tunnel_key:
                wrong.add(host)
                name = self._view.name(host)
                cause = f"the WireGuard key of {name} is another than the one it has published"
                evidence = f"its device has {report.tunnel_key}, the store {record.wg_key}"
                yield Finding("wireguard", "error", (name,), cause, evidence, "weft rotate-key")
        ill = wrong | {host for host, r in self._view.reports.items() if _has(r, "wireguard", "guard")}
        done = set()
        for way, record_of_peer in self._silent_peers():
            pair = tuple(sorted(way))
            if pair in done or not ill.isdisjoint(way) or {way, way[::-1]} & lost or self._filtered(way):
                continue
            done.add(pair)
            yield self._no_handshake(way, record_of_peer)

    def _silent_peers(self) -> Iterator[tuple[tuple[str, str], Host]]:
        """Ways on which encrypted packets are lost, or were sent without that a handshake ever succeeded."""
        for host, report in sorted(self._view.reports.items(), key=lambda item: self._view.name(item[0])):
            for other, record in sorted(self._view.hosts.items(), key=lambda item: item[1].name):
                way = (host, other)
                peering = report.peerings.get(record.wg_key)
                if other == host or not self._ill.isdisjoint(way) or not (report.tunnel_key and record.wg_key):
                    continue
                link = self._encrypted.get(way)
                suspect = record.wg_key in report.unpeered or (peering is not None and peering.unanswered)
                if suspect or (link and self._is_lost(link)):
                    yield way, record

    def _filtered(self, way: tuple[str, str]) -> bool:
        ways = (way, way[::-1])
        links = (ProbeLink(a, b, "encrypted", 0, 0.0) for a, b in ways)
        return any(map(self._blocked.explains, links))

    def _no_handshake(self, way: tuple[str, str], record: Host) -> Finding:
        a, b = map(self._view.name, way)
        report = self._view.reports[way[0]]
        if record.wg_key in report.unpeered:
            cause = f"{a} does not have {b}'s published WireGuard key among its peers"
            evidence = f"{record.wg_key} is no peer of weft-wg on {a}"
            return Finding("wireguard", "error", (a, b), cause, evidence, "weft plan")
        peering = report.peerings.get(record.wg_key)
        age = f"the last one was {peering.age:.0f} s ago" if peering and peering.age is not None else "there was none"
        port = record.wg_port
        cause = f"WireGuard gets no answer between {a} and {b}: UDP port {port} is dropped on the way"
        evidence = f"no handshake ({age}), while VXLAN in plain passes"
        return Finding("wireguard", "error", tuple(sorted((a, b))), cause, f"{evidence}; {self._open(way)}")

    def _open(self, way: Iterable[str]) -> str:
        return f"open it between {' and '.join(map(self._at, way))} (firewalls, security groups)"

    def _at(self, host: str) -> str:
        return self._view.hosts[host].underlay if host in self._view.hosts else "?"

    def _named(self, way: Iterable[str]) -> list[str]:
        return [self._view.name(host) for host in way]

    @staticmethod
    def _ends(pairs: Iterable[Iterable[str]]) -> set[str]:
        return {host for pair in pairs for host in pair}


def _has(report: Report, *checks: str) -> bool:
    return any(one.check in checks for one in report.findings)


def _table(view: View, absent: Set[str], findings: Iterable[Finding]) -> dict[str, dict[str, str]]:
    names = {host: view.name(host) for host in {*view.hosts, *view.reports}}
    table: dict[str, dict[str, str]] = {}
    for host, name in sorted(names.items(), key=lambda item: item[1]):
        measured = {link.kind for link in _of(view, host) if link.small is not None}
        table[name] = dict.fromkeys(CHECKS, UNKNOWN if host in absent else OK)
        if not measured:
            table[name] |= dict.fromkeys(("path", "mtu", "checksum"), UNKNOWN)
    for one in findings:
        for name in one.hosts:
            row = table.setdefault(name, dict.fromkeys(CHECKS, UNKNOWN))
            if row.get(one.check) != "error":
                row[one.check] = one.severity
    return table
