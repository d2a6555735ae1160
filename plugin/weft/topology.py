"""From what the cluster has to what this host's kernel should hold. Pure: equal clusters give equal wishes.

Only networks with endpoints on this host are wanted here. A remote endpoint is three rows (see `dataplane.py`), a
remote host with endpoints of the network one flood entry. Local endpoints need no row here: their MAC comes with their
port, and no port learns (see `kernel/links.py`).

Two more networks are wanted on every host: probes take the same way as containers' frames, plain and encrypted. They
have no endpoints; each host has a MAC there, and one row at all others.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import NamedTuple

from weft.cluster import Cluster
from weft.dataplane import (
    FLOOD_MAC,
    IPV6_MIN_MTU,
    Bridge,
    Fdb,
    Link,
    Neighbour,
    Peer,
    Port,
    Row,
    Shaper,
    Station,
    Vxlan,
    bridge_name,
    pack_address,
    pack_mac,
    shaper_name,
    vxlan_name,
)
from weft.model import ENCRYPTED_PROBE_VNI, INHERIT, PROBE_VNI, Endpoint, Host, Network

OVERHEAD = {4: 50, 6: 70}
"""Bytes that VXLAN adds by IP version of the underlay: inner Ethernet 14, VXLAN 8, UDP 8, outer IP 20 or 40."""

WIREGUARD_OVERHEAD = {4: 60, 6: 80}
"""Bytes that WireGuard adds by IP version of the underlay: header 16, authentication 16, UDP 8, outer IP 20 or 40."""

PROBE_NETWORKS = {
    PROBE_VNI: Network(PROBE_VNI, "probes", (), 0, False, ""),
    ENCRYPTED_PROBE_VNI: Network(ENCRYPTED_PROBE_VNI, "encrypted probes", (), 0, False, "", encrypted=True),
}

_TOS_INHERIT = 1
"""What the kernel takes for it (drivers/net/vxlan)."""

_MTU_LEAST = 68
"""Of any Ethernet device (RFC 791; ETH_MIN_MTU in the kernel), whatever a host's record says."""
_WIREGUARD_BLOCK = 16
"""WireGuard fills packets up to a multiple of so many bytes, but for those of its device's MTU."""
_REMEMBERED = 4096
"""Endpoints whose port's name need not be made again: an event of a port is looked up among all of this host."""
_ENGINE_ID = re.compile(r"[0-9a-f]{64}")


class Limit(NamedTuple):
    """The largest MTU that networks can have, and the host whose underlay says so."""

    mtu: int
    host: str


def limit(hosts: Iterable[Host], *, encrypted: bool = False, paths: bool = False) -> Limit:
    """One network, one MTU, as on any Ethernet: that of the narrowest host. At least one of them must be measured.

    :param paths: take what probes have found into account, not only what the hosts say of themselves.
    """
    carried = ((_carried(host, encrypted, paths), host) for host in hosts if host.mtu)
    return min(
        Limit(max(mtu - overhead(host.underlay, encrypted=encrypted), _MTU_LEAST), host.name) for mtu, host in carried
    )


def _carried(host: Host, encrypted: bool, paths: bool) -> int:
    if not (paths and 0 < host.path_mtu < host.mtu):
        return host.mtu
    padding = (host.path_mtu - wireguard_overhead(host.underlay)) % _WIREGUARD_BLOCK
    return host.path_mtu - padding if encrypted else host.path_mtu


def fitting_mtu(network: Network, hosts: Collection[Host]) -> int:
    """MTU of a network's new endpoints: what the user chose, else what every host and every path carries.

    Probes' own networks keep what the hosts carry, else nobody would see that a path carries it again. IPv6 keeps its
    least MTU, below which a container would have no IPv6 at all.
    """
    if network.mtu:
        return network.mtu
    mtu = limit(hosts, encrypted=network.encrypted, paths=network.vni not in PROBE_NETWORKS).mtu
    if mtu < IPV6_MIN_MTU and any(":" in pool.cidr for pool in network.pools):
        return min(IPV6_MIN_MTU, limit(hosts, encrypted=network.encrypted).mtu)
    return mtu


def overhead(underlay: str, *, encrypted: bool = False) -> int:
    """Bytes that a tunnel over this underlay adds to a container's packet."""
    return OVERHEAD[4] + wireguard_overhead(underlay) if encrypted else OVERHEAD[_version(underlay)]


def wireguard_overhead(underlay: str) -> int:
    return WIREGUARD_OVERHEAD[_version(underlay)]


def _version(address: str) -> int:
    return 6 if ":" in address else 4


def family(hosts: Iterable[Host]) -> int:
    """IP version of these hosts' underlay, or of most of them; 0 if there are none."""
    versions = Counter(host.family for host in hosts)
    return max(sorted(versions), key=versions.__getitem__, default=0)


def network_links(network: Network, *, local: str, port: int, mtu: int, resolver: str = "") -> list[Link]:
    """The devices of a network on the host whose VTEP address there is `local`: bridge, tunnel, limit of its floods."""
    bridge = Bridge(bridge_name(network.vni), mtu, resolver_addresses(network, resolver))
    vxlan = Vxlan(
        vxlan_name(network.vni),
        network.vni,
        local,
        network.port or port,
        mtu,
        bridge.name,
        network.encrypted,
        whole=network.vni in PROBE_NETWORKS,  # else a probe would pass where the path's MTU is smaller
        source_ports=tuple(map(int, network.source_ports.split("-"))) if network.source_ports else (),
        ttl=network.ttl,
        tos=_TOS_INHERIT if network.dscp == INHERIT else network.dscp << 2,
        checksum=network.udp_checksum,
        multicast=network.multicast != 0,
        suppress=not network.floating and any(":" in pool.cidr for pool in network.pools),
        offload=network.tx_checksum,
    )
    return [bridge, vxlan, *([Shaper(vxlan.name, network.multicast)] if network.multicast > 0 else [])]


def shared_names(network: Network) -> tuple[str, ...]:
    """Names of `network_links`."""
    tunnel = vxlan_name(network.vni)
    return (bridge_name(network.vni), tunnel, *([shaper_name(tunnel)] if network.multicast > 0 else []))


def peers(cluster: Cluster, me: Host) -> frozenset[Peer]:
    """All other hosts that can encrypt, over an underlay of our address family, with addresses of our pool.

    A key or address that two of them claim, or that is ours, is nobody's: which is the right one cannot be told.
    """
    others = [h for h in list(cluster.hosts.values()) if h.id != me.id and _can_encrypt(h, me)]
    keys = Counter([me.wg_key, *(host.wg_key for host in others)])
    addresses = Counter([me.wg_address, *(host.wg_address for host in others)])
    return frozenset(
        Peer(host.wg_key, host.wg_address, host.underlay, host.wg_port)
        for host in others
        if keys[host.wg_key] == 1 and addresses[host.wg_address] == 1
    )


def resolver_addresses(network: Network, resolver: str) -> tuple[tuple[str, str], ...]:
    """What lets the containers of an internal network ask the resolver: they have no way out of it.

    One address by itself, and one for each pool, as the way back. If a question for it is flooded, other hosts' bridges
    answer too, but with the same MAC: `SHARED_MAC`.
    """
    if not (network.internal and resolver):
        return ()
    pools = sorted(pool.cidr for pool in network.pools if ":" not in pool.cidr)
    return ((resolver, f"{resolver}/32"), *((resolver, cidr) for cidr in pools))


def device_mtu(mtu: int, endpoints: Iterable[Endpoint]) -> int:
    """MTU of a network's devices on a host with these endpoints.

    Of containers that had a larger one when they started, packets have to get as far as the tunnel: it tells them what
    fits (`skb_tunnel_check_pmtu` in the kernel), while a bridge would drop them without a word.
    """
    return max([mtu, *(endpoint.mtu for endpoint in endpoints)])


def endpoint_links(endpoint: Endpoint, mtu: int) -> list[Link]:
    """The veth of a local endpoint, in a network of this MTU unless the endpoint keeps another, and what limits it."""
    port = Port(
        port_name(endpoint.id),
        bridge_name(endpoint.vni),
        endpoint.mtu or mtu,
        peer=peer_name(endpoint.id),
        mac=endpoint.mac,
        rate=endpoint.rate,
    )
    return [port, *([Shaper(port.name, endpoint.rate)] if endpoint.rate else [])]


@lru_cache(_REMEMBERED)
def port_name(endpoint_id: str) -> str:
    """Name of the host end of an endpoint's veth."""
    return f"wp{_short_id(endpoint_id)}"


def is_port_name(name: str) -> bool:
    return name.startswith("wp")


def peer_name(endpoint_id: str) -> str:
    """Name of the container's end of an endpoint's veth, until the engine takes it."""
    return f"wc{_short_id(endpoint_id)}"


def _short_id(endpoint_id: str) -> str:
    """Twelve characters for interface names (15 at most): the id's own first ones, as Docker shows them.

    Only the engine's 64-digit ids are random enough for that; any other is hashed.
    """
    if not _ENGINE_ID.fullmatch(endpoint_id):
        endpoint_id = hashlib.sha256(endpoint_id.encode()).hexdigest()
    return endpoint_id[:12]


def network_of(cluster: Cluster, vni: int) -> Network:
    """Also one of those for probes, unless a user has had its VNI since before it was reserved; or `KeyError`."""
    return cluster.networks.get(vni) or PROBE_NETWORKS[vni]


def probe_networks(cluster: Cluster, me: Host) -> set[int]:
    """VNIs of those for probes that this host can have."""
    possible = {PROBE_VNI, ENCRYPTED_PROBE_VNI} if me.can_encrypt else {PROBE_VNI}
    return {vni for vni in possible if vni not in cluster.networks}


def probe_mac(host_id: str) -> str:
    """A host's own MAC in the networks for probes."""
    return f"02:{hashlib.sha256(host_id.encode()).digest()[:5].hex(':')}"


def probe_peers(cluster: Cluster, vni: int, me: Host) -> dict[str, bytes]:
    """The other hosts on a network for probes, each with its VTEP."""
    vteps = ((host, _vtep(cluster, vni, host, me)) for host in list(cluster.hosts))
    return {host: vtep for host, vtep in vteps if vtep}


def probe_rows(cluster: Cluster, vni: int, me: Host) -> set[Row]:
    """Where each other host is reached."""
    peers = probe_peers(cluster, vni, me)
    return {Fdb(vxlan_name(vni), pack_mac(probe_mac(host)), vtep) for host, vtep in peers.items()}


def network_rows(cluster: Cluster, vni: int, me: Host) -> set[Row]:
    """All rows of one network: every remote endpoint's, and the flood entries."""
    if vni in probe_networks(cluster, me):
        return probe_rows(cluster, vni, me)
    rows = endpoint_rows(cluster, cluster.endpoints.get(vni, {}).values(), me)
    rows.update(flood_rows(cluster, vni, cluster.hosts_of(vni), me))
    return rows


def endpoint_rows(cluster: Cluster, endpoints: Iterable[Endpoint], me: Host) -> set[Row]:
    """The rows of these endpoints as far as they are on other, reachable hosts."""
    vteps: dict[tuple[int, str], bytes | None] = {}
    forwarding: list[tuple[str, bytes, bytes]] = []
    neighbours: list[tuple[str, bytes, bytes]] = []
    for endpoint in endpoints:
        place = endpoint.vni, endpoint.host
        if place not in vteps:
            vteps[place] = _vtep(cluster, *place, me)
        if vtep := vteps[place]:
            mac, bridge = pack_mac(endpoint.mac), bridge_name(endpoint.vni)
            forwarding.append((vxlan_name(endpoint.vni), mac, vtep))
            neighbours += [(bridge, pack_address(address), mac) for address in endpoint.addresses]
    rows: set[Row] = set(map(Fdb._make, forwarding))  # twice as fast as by their names
    rows.update(Station._make((tunnel, mac, False)) for tunnel, mac, _ in forwarding)
    rows.update(map(Neighbour._make, neighbours))
    return rows


def flood_rows(cluster: Cluster, vni: int, hosts: Iterable[str], me: Host) -> set[Row]:
    """Where frames without a known destination go: one entry for each of `hosts` that is a peer."""
    vteps = (_vtep(cluster, vni, host, me) for host in hosts)
    return {Fdb(vxlan_name(vni), FLOOD_MAC, vtep) for vtep in vteps if vtep}


def _vtep(cluster: Cluster, vni: int, host_id: str, me: Host) -> bytes | None:
    """Of another host whose VTEP is of our address family: one VXLAN device cannot mix them.

    In an encrypted network that is its WireGuard address; a host without one is not reached at all.
    """
    host, network = cluster.hosts.get(host_id), cluster.networks.get(vni) or PROBE_NETWORKS.get(vni)
    if host is None or host.id == me.id or not _same_family(host, me):
        return None
    if network is None or not network.encrypted:
        return pack_address(host.underlay)
    return pack_address(host.wg_address) if _can_encrypt(host, me) else None


def _can_encrypt(host: Host, me: Host) -> bool:
    return host.can_encrypt and _same_family(host, me) and host.wg_pool == me.wg_pool


def _same_family(host: Host, me: Host) -> bool:
    return host.family == me.family
