"""Local findings: what one host's own facts say, without consequences of what is found first (pure)."""

from __future__ import annotations

from collections.abc import Iterator

from weft.doctor.facts import Facts
from weft.doctor.findings import Finding, Severity

SLOW_STORE_SECONDS = 0.5
_MAKE_ROOM = (
    """etcdctl compact $(etcdctl endpoint status -w fields | sed -n 's/^"Revision" : //p'); """
    "etcdctl defrag --cluster; etcdctl alarm disarm"
)
"""As etcd's guide to maintenance has it. The revision is that of the one member that is asked."""


def of_host(facts: Facts) -> Iterator[Finding]:
    """What is wrong with a host."""
    if facts.daemon:
        hangs = "does not answer" in facts.daemon
        cause, verb = ("weft hangs", "restart") if hangs else ("weft does not run", "start")
        command = f"systemctl {verb} weft (a managed plugin: docker plugin enable weft)"
        yield _one(facts, "host", cause, facts.daemon, command)
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
        because = f"; {facts.unmended}" if facts.unmended else ""
        yield _one(facts, "drift", cause, f"left to do: {facts.drift[0]}{more}{because}", "weft plan")
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
        what, change = _purpose(facts, port)
        cause = f"UDP port {port}, which {what} needs, is used by {user}"
        evidence = f"ss -lunp shows {user} at port {port}: stop it, or {change}"
        yield _one(facts, "udp-port", cause, evidence)
    if facts.refused and not facts.users:
        cause = "a UDP port that weft needs is used by another program"
        yield _one(facts, "udp-port", cause, f"{facts.refused}; stop it, or set another port", "ss -lunp")


def _purpose(facts: Facts, port: int) -> tuple[str, str]:
    """What needs a UDP port, and how to have it use another one."""
    if port in facts.networks:
        return f"network {facts.networks[port]}", "make the network with another -o weft.port"
    if port == facts.port:
        return "VXLAN", "set another WEFT_PORT on all hosts"
    return "WireGuard", "set another WEFT_WG_PORT here"


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
        evidence += f"; if that is ufw: ufw allow in on docker_gwbridge to {at} port 53"
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
        yield _one(facts, "store", cause, f"etcd has the alarm {store.alarm} set", _MAKE_ROOM)
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
