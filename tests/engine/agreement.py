"""What the kernel, the store and Docker have of weft's networks, each read past weft, and where they differ.

All is compared as sentences, so that a difference can be read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lab import CommandFailed, Host, LabError
from weft.model import ENCRYPTED_PROBE_VNI, PROBE_VNI
from weft.topology import probe_mac

_FLOOD = "00:00:00:00:00:00"


@dataclass(frozen=True)
class Records:
    """The store at one moment."""

    entries: Mapping[str, str]

    def of(self, prefix: str) -> dict[str, Any]:
        return {
            key.removeprefix(prefix): json.loads(value) for key, value in self.entries.items() if key.startswith(prefix)
        }

    @property
    def hosts(self) -> dict[str, Any]:
        return self.of("topology/hosts/")

    @property
    def endpoints(self) -> list[Any]:
        return list(self.of("topology/endpoints/").values())

    def contradictions(self) -> set[str]:
        """What must not be at any moment: addresses or MACs that are doubled, lost, or nobody's."""
        endpoints = {one["id"]: one for one in self.endpoints}
        pending = {key.split("/", 3)[3] for key in self.entries if key.startswith("ipam/pending/")}
        held = {key: one for key, one in self.of("ipam/addresses/").items() if one["kind"] == "endpoint"}
        macs = {key.removeprefix("macs/"): value for key, value in self.entries.items() if key.startswith("macs/")}
        found = set()
        for known, one in endpoints.items():
            owners = [a["endpoint"] for a in held.values() if a["address"] in one["addresses"]]
            if owners != [known] * len(one["addresses"]):
                found.add(f"endpoint {known} has {one['addresses']}, which are recorded as of {owners}")
            if macs.get(f"{one['vni']}/{one['mac']}") != known:
                found.add(f"endpoint {known} has MAC {one['mac']}, which is recorded as of another")
        owned = {key for key, one in held.items() if one["endpoint"] in endpoints}
        found |= {f"address {key} is nobody's" for key in held.keys() - owned - pending}
        found |= {f"MAC {mac} is nobody's" for mac, owner in macs.items() if owner not in endpoints}
        return found


def kernel_facts(host: Host) -> set[str]:
    """All that stands in a host's data plane, but for what the kernel puts there by itself."""
    try:
        shown = host.dataplane("sh", "-c", "ip -j -d link; bridge -j fdb; ip -j neigh")
    except CommandFailed:
        raise
    except LabError:  # there is no data plane, or not even a host
        return set()
    links, fdb, neighbours = (json.loads(line or "[]") for line in shown.splitlines())
    links = [link for link in links if link["ifname"] != "lo"]
    own = {link["address"] for link in links}
    facts = {_link(link) for link in links}
    facts |= {_row(row) for row in fdb if _is_lasting(row) and row["mac"] not in own}
    lasting = [n for n in neighbours if "PERMANENT" in n["state"]]  # an internal network's bridge learns others
    return facts | {f"neighbour {n['dst']} at {n['lladdr']} on {n['dev']}" for n in lasting}


def _link(link: Any) -> str:
    name, up = link["ifname"], "up" if "UP" in link["flags"] else "down"
    data = link["linkinfo"].get("info_data", {})
    master = f" in {link['master']}" if "master" in link else ""
    tunnel = f" from {data['local']}" if "local" in data else ""
    return f"link {name}{master}{tunnel} {up}"


def _is_lasting(row: Any) -> bool:
    return row.get("state") in ("permanent", "static") and not row["mac"].startswith(("33:33:", "01:00:5e:"))


def _row(row: Any) -> str:
    way = f"via {row['dst']} on" if "dst" in row else "behind"
    return f"row {row['mac']} {way} {row['ifname']}"


def wanted_facts(records: Records, host_id: str) -> set[str]:
    """What a host's data plane should hold, by the store."""
    facts, hosts = _probe_facts(records.hosts, host_id), records.hosts
    for vni in {one["vni"] for one in records.endpoints if one["host"] == host_id}:
        bridge, tunnel = f"br{vni}", f"vx{vni}"
        facts |= {f"link {bridge} up", f"link {tunnel} in {bridge} from {hosts[host_id]['underlay']} up"}
        for one in records.endpoints:
            if one["vni"] == vni and one["host"] == host_id:
                port = f"wp{one['id'][:12]}"
                facts |= {f"link {port} in {bridge} up", f"row {one['mac']} behind {port}"}
            elif one["vni"] == vni:
                vtep = hosts[one["host"]]["underlay"]
                facts |= {f"row {one['mac']} behind {tunnel}", f"row {one['mac']} via {vtep} on {tunnel}"}
                facts |= {f"neighbour {address} at {one['mac']} on {bridge}" for address in one["addresses"]}
                facts.add(f"row {_FLOOD} via {vtep} on {tunnel}")
    return facts


def _probe_facts(hosts: Mapping[str, Any], host_id: str) -> set[str]:
    """Of the networks by which hosts probe each other."""
    facts = set()
    for vni, end in ((PROBE_VNI, "underlay"), (ENCRYPTED_PROBE_VNI, "wg_address")):
        vteps = {known: one[end] for known, one in hosts.items() if one.get(end)}
        if local := vteps.pop(host_id, ""):
            facts |= {f"link br{vni} up", f"link vx{vni} in br{vni} from {local} up"}
            facts |= {f"row {probe_mac(known)} via {vtep} on vx{vni}" for known, vtep in vteps.items()}
    return facts


def docker_facts(host: Host) -> set[str]:
    """The endpoints of running containers on weft's networks."""
    networks = set(host.docker("network", "ls", "-q", "--no-trunc", "--filter", "driver=weft").split())
    running = host.docker("ps", "-q").split()
    inspected = json.loads(host.docker("inspect", *running)) if running else []
    attached = [one for container in inspected for one in container["NetworkSettings"]["Networks"].values()]
    return {
        f"endpoint {one['EndpointID']} of {one['NetworkID']} has {one['IPAddress']} and {one['MacAddress']}"
        for one in attached
        if one["NetworkID"] in networks and one["EndpointID"]
    }


def recorded_facts(records: Records, host_id: str) -> set[str]:
    """The same, by the store."""
    members = records.of("topology/members/")
    facts = set()
    for one in records.endpoints:
        if one["host"] == host_id:
            network = members.get(f"{one['vni']}/{host_id}", {}).get("network_id", "?")
            facts.add(f"endpoint {one['id']} of {network} has {one['addresses'][0]} and {one['mac']}")
    return facts


def differences(hosts: Mapping[str, Host], entries: Mapping[str, str]) -> set[str]:
    """Where kernel, store and Docker do not agree, by host id; the empty set when all is calm and right."""
    records = Records(entries)
    found = records.contradictions()
    found |= {f"address {key} is pending" for key in entries if key.startswith("ipam/pending/")}
    for known, host in hosts.items():
        kernel, wanted = kernel_facts(host), wanted_facts(records, known)
        docker, recorded = docker_facts(host), recorded_facts(records, known)
        for missing, has in (
            ("the kernel", wanted - kernel),
            ("the store", docker - recorded),
            ("Docker", recorded - docker),
        ):
            found |= {f"{host.name}: {missing} lacks {fact}" for fact in has}
        found |= {
            f"{host.name}: the store does not want {fact}" for fact in kernel - wanted if not _is_spare(fact, wanted)
        }
    return found


def _is_spare(fact: str, wanted: set[str]) -> bool:
    """Devices of a network without containers here stay for a while, empty."""
    return fact.startswith(("link br", "link vx")) and not any(fact.split()[1] in other for other in wanted)
