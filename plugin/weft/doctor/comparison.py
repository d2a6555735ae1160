"""What comparing hosts with each other, and with their records, shows (pure)."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator, Set
from statistics import median

from weft.doctor.findings import Finding, listed
from weft.doctor.view import LOST, View

SKEW_SECONDS = 2.0
"""Beyond what the answer's way through the store explains."""
FULL = 0.9
"""The share of a pool that counts as nearly full."""
_MOST_FOREIGN = 10


def absentees(view: View, absent: Set[str]) -> Iterator[Finding]:
    """Hosts that did not answer."""
    passing_at = {host for link in view.links if link.small is not None and link.small < LOST for host in link.key[:2]}
    for host in sorted(absent, key=view.name):
        record, name = view.hosts[host], view.name(host)
        asked = [view.name(h) for h, report in view.reports.items() if host in report.reached]
        reached = any(report.reached.get(host) for report in view.reports.values())
        # Where nobody may send pings there are the probes, which may be from before it fell silent.
        passing = not asked and host in passing_at
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
            pinged = f", and {record.underlay} answers no ping of {listed(sorted(asked))}" if asked else ""
            advice = f"bring it back, or if it is gone for good, weft host forget {name}"
            yield Finding("host", "error", (name,), cause, f"no sign of life in the store{pinged}; {advice}")


def doubles(view: View) -> Iterator[Finding]:
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


def clocks(view: View) -> Iterator[Finding]:
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


def versions(view: View) -> Iterator[Finding]:
    known = {host: record.version for host, record in view.hosts.items() if record.version}
    known |= {host: report.version for host, report in view.reports.items() if report.version}
    newest = max(known.values(), key=_version, default="")
    if old := sorted((host for host in known if known[host] != newest), key=view.name):
        names = tuple(map(view.name, old))
        cause = f"{listed(names)} {'has' if len(names) == 1 else 'have'} an older weft than the other hosts"
        evidence = listed(f"{view.name(host)}: {known[host]}" for host in old) + f"; newest: {newest}"
        yield Finding("version", "warning", names, cause, evidence)


def _version(text: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in text.replace("-", ".").split(".")]


def pools(view: View) -> Iterator[Finding]:
    for pool in view.pools:
        if pool.used >= FULL * pool.size:
            cause = f"pool {pool.cidr} of network {pool.network} is nearly full"
            evidence = f"{pool.used} of {pool.size} addresses are held"
            advice = "if that frees none, move containers to a network with a larger --subnet"
            yield Finding("pools", "warning", (), cause, f"{evidence}; {advice}", "weft gc")


def foreign(view: View) -> Iterator[Finding]:
    """Entries of the store that are none of weft's; of many the first."""
    found = view.foreign or {}
    keys = sorted(found)
    rest = f"; {len(keys)} entries are like that" if len(keys) > _MOST_FOREIGN else ""
    for key in keys[:_MOST_FOREIGN]:
        cause = f"the store has an entry that is none of weft's: {key}"
        evidence = f"{found[key]}; if no newer weft wrote it, delete it{rest}"
        yield Finding("store", "warning", (), cause, evidence, f"weft gc --entry {shlex.quote(key)}")
