"""Links as they are: from rtnetlink's messages to `ObservedLink`.

Parsed like the tables, since a host with many networks has a thousand links and pyroute2 takes 2 ms for each.

Properties that never differ between links of a kind are in tables, which serve both ways: pyroute2 sets them by name
(`links.py`), and what is read back by number and is otherwise becomes a fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from socket import AF_INET, AF_INET6, inet_ntop, socket
from struct import Struct
from typing import Any, NamedTuple

from weft.dataplane import IPV6_MIN_MTU, SHARED_MAC, Bridge, Port, Shaper, Vxlan, pack_mac, source_of
from weft.kernel.netlink import (
    ADDRESS,
    IFLA_ADDRESS,
    IFLA_IFNAME,
    IFLA_MTU,
    LINK,
    Rtnetlink,
    attributes,
    messages,
    number,
    text,
)
from weft.kernel.offload import leaves_checksums
from weft.kernel.shaping import diverts, rates
from weft.reconcile import ObservedLink


class Fixed(NamedTuple):
    """A property that all links of a kind share: pyroute2's name, the kernel's number, the value."""

    name: str
    attribute: int
    value: int


BRIDGE = (Fixed("br_stp_state", 5, 0), Fixed("br_mcast_snooping", 23, 0), Fixed("br_vlan_default_pvid", 39, 0))
VXLAN = (Fixed("vxlan_learning", 7, 0),)
PORT = (Fixed("learning", 8, 0),)
VXLAN_PORT = (*PORT, Fixed("proxyarp_wifi", 12, 1))
ADDRESSES = (Fixed("IFLA_INET6_ADDR_GEN_MODE", 8, 1),)
"""1 is none: the link makes no IPv6 address by itself."""
_NO_IPV6_ADDRESS = {"attrs": [("AF_INET6", {"attrs": [(fixed.name, fixed.value) for fixed in ADDRESSES]})]}

_IFLA_QDISC = 6
_IFLA_MASTER = 10
_IFLA_LINKINFO = 18
_IFLA_AF_SPEC = 26
_IFLA_LINK_NETNSID = 37
_IFLA_INFO_KIND = 1
_IFLA_INFO_DATA = 2
_IFLA_INFO_SLAVE_DATA = 5
_IFLA_VXLAN_ID = 1
_IFLA_VXLAN_LOCAL = 4
_IFLA_VXLAN_TTL = 5
_IFLA_VXLAN_TOS = 6
_IFLA_VXLAN_PORT_RANGE = 10
_IFLA_VXLAN_PROXY = 12
_IFLA_VXLAN_PORT = 15
_IFLA_VXLAN_LOCAL6 = 17
_IFLA_VXLAN_DF = 29
_IFLA_VXLAN_UDP_CSUM = 18
_IFLA_BRPORT_MCAST_FLOOD = 27
_IFLA_BRPORT_NEIGH_SUPPRESS = 32
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFF_UP = 1
_IFF_LOWER_UP = 1 << 16

_PORT_RANGE = Struct(">HH")
_SHARED_MAC = pack_mac(SHARED_MAC)

_LOOPBACK = 1
"""The index of lo in each namespace."""
_FALLBACK = {
    "tunl0": "ipip",
    "gre0": "gre",
    "gretap0": "gretap",
    "erspan0": "erspan",
    "ip_vti0": "vti",
    "ip6_vti0": "vti6",
    "sit0": "sit",
    "ip6tnl0": "ip6tnl",
    "ip6gre0": "ip6gre",
}
"""Kinds, by name, of what the kernel puts into each namespace by itself, and nobody can remove."""


def kind_of(reader: Rtnetlink, name: str) -> str:
    """What kind of link that is, in the kernel's words; "" if it does not exist."""
    reply = reader.link(name=name)
    return (_Link(reply, 0).kind or "?") if reply else ""


def no_ipv6_address(mtu: int) -> dict[str, Any]:
    """The settings for pyroute2 that keep a link of this MTU from making IPv6 addresses.

    None if it cannot anyway, since the kernel has no IPv6 or the MTU is too small for it: then they would be refused.
    """
    possible = mtu >= IPV6_MIN_MTU and os.path.exists("/proc/sys/net/ipv6")
    return {"IFLA_AF_SPEC": _NO_IPV6_ADDRESS} if possible else {}


def observe_links(
    reader: Rtnetlink, names: Iterable[str] | None, *, plain: socket | None = None, tunnel_fd: int = -1
) -> dict[str, ObservedLink]:
    """All links of the namespace, or those of these names that exist.

    :param plain: any socket of the namespace; without it nobody is told who computes checksums.
    :param tunnel_fd: the namespace in which sockets of encrypted networks are.
    """
    if names is None:
        links = [_Link(chunk, start) for chunk in reader.links() for start in messages(chunk)]
    else:
        links = [_Link(reply, 0) for name in names if (reply := reader.link(name=name))]
    known = {link.index: link.name for link in links}
    with_tunnels = tunnel_fd >= 0 and any(link.kind == "vxlan" for link in links)
    tunnel = reader.namespace_id(tunnel_fd) if with_tunnels else None
    addresses = _addresses(reader) if any(link.kind == "bridge" for link in links) else {}
    limits = rates(reader) if any(link.queue == "tbf" for link in links) else {}

    def name_of(index: int) -> str:
        if index not in known:
            device = reader.find(index=index)
            known[index] = device.name if device else ""
        return known[index]

    found = {}
    for link in links:
        if not link.is_the_kernels:
            seen = link.observed(name_of, addresses.get(link.index, ()), tunnel)
            found[link.name] = _with_limits(seen, link.index, limits.get(link.index, 0), reader, plain)
    return found


def _with_limits(seen: ObservedLink, index: int, rate: int, reader: Rtnetlink, plain: socket | None) -> ObservedLink:
    """With what the link's message does not tell."""
    match seen.link:
        case Vxlan() if plain and not leaves_checksums(plain, seen.link.name):
            return replace(seen, link=replace(seen.link, offload=False))
        case Port() if rate:
            return replace(seen, link=replace(seen.link, rate=rate))
        case Shaper(source):
            device = reader.find(name=source)
            diverted = device is not None and diverts(reader, device.ifindex, index, floods=seen.link.floods)
            faults = seen.faults if diverted else (*seen.faults, f"{source} passes it by")
            return replace(seen, link=Shaper(source, rate), faults=faults)
    return seen


def _addresses(reader: Rtnetlink) -> dict[int, tuple[tuple[str, str], ...]]:
    """IPv4 addresses by the index of their link: each with the CIDR that is reached from it, shortest last."""
    found: dict[int, list[tuple[int, str, str]]] = {}
    for chunk in reader.addresses():
        for start in messages(chunk):
            size, _, _, _, _, _, prefix, _, _, index = ADDRESS.unpack_from(chunk, start)
            at = attributes(chunk, start + ADDRESS.size, start + size)
            peer, local = (inet_ntop(AF_INET, chunk[at[kind]]) for kind in (_IFA_ADDRESS, _IFA_LOCAL))
            found.setdefault(index, []).append((-prefix, local, f"{peer}/{prefix}"))
    return {index: tuple((local, cidr) for _, local, cidr in sorted(some)) for index, some in found.items()}


class _Link:
    """One message of a chunk; nested attributes are looked at when they are asked for."""

    def __init__(self, chunk: bytes, start: int) -> None:
        size, _, _, _, _, _, _, self.index, self._flags, _ = LINK.unpack_from(chunk, start)
        self._chunk = chunk
        self._at = attributes(chunk, start + LINK.size, start + size)
        self.name = text(chunk, self._at[IFLA_IFNAME])
        self._info = self._nested(self._at, _IFLA_LINKINFO)
        self.queue = text(chunk, self._at[_IFLA_QDISC]) if _IFLA_QDISC in self._at else ""
        self.kind = text(chunk, self._info[_IFLA_INFO_KIND]) if _IFLA_INFO_KIND in self._info else ""

    @property
    def is_the_kernels(self) -> bool:
        """It is in each namespace, and what it sends stays there. Anything may be called like that."""
        fallback = self.kind and _FALLBACK.get(self.name) == self.kind and _IFLA_LINK_NETNSID not in self._at
        return self.index == _LOOPBACK or bool(fallback)

    def observed(
        self, name_of: Callable[[int], str], addresses: tuple[tuple[str, str], ...], tunnel: int | None
    ) -> ObservedLink:
        data = self._nested(self._info, _IFLA_INFO_DATA)
        mtu = number(self._chunk, self._at[IFLA_MTU])
        master = name_of(number(self._chunk, self._at[_IFLA_MASTER])) if _IFLA_MASTER in self._at else ""
        faults = list(self._common_faults())
        match self.kind:
            case "bridge":
                if addresses and self._chunk[self._at[IFLA_ADDRESS]] != _SHARED_MAC:
                    faults.append("has a MAC of its own")
                return ObservedLink(Bridge(self.name, mtu, addresses), (*faults, *self._faults(BRIDGE, data)))
            case "vxlan" if self._is_like_ours(data):
                faults += self._faults(VXLAN, data)
                faults += self._faults(VXLAN_PORT, self._nested(self._info, _IFLA_INFO_SLAVE_DATA))
                return ObservedLink(self._vxlan(data, mtu, master, tunnel), tuple(faults))
            case "ifb" if source := source_of(self.name):
                return ObservedLink(Shaper(source, 0), tuple(faults))
        faults += self._faults(PORT, self._nested(self._info, _IFLA_INFO_SLAVE_DATA))
        return ObservedLink(Port(self.name, master, mtu), tuple(faults), carrier=bool(self._flags & _IFF_LOWER_UP))

    def _nested(self, at: Mapping[int, slice], attribute: int) -> dict[int, slice]:
        return attributes(self._chunk, at[attribute].start, at[attribute].stop) if attribute in at else {}

    def _common_faults(self) -> Iterator[str]:
        if not self._flags & _IFF_UP:
            yield "down"
        if any(self._faults(ADDRESSES, self._nested(self._nested(self._at, _IFLA_AF_SPEC), AF_INET6))):
            yield "makes IPv6 addresses"

    def _faults(self, wanted: Iterable[Fixed], at: Mapping[int, slice]) -> Iterator[str]:
        """What this kernel does not tell is no fault."""
        for name, attribute, value in wanted:
            if attribute in at and (has := number(self._chunk, at[attribute])) != value:
                yield f"{name.removeprefix('br_')} {'on' if has else 'off'}"

    def _is_like_ours(self, data: Mapping[int, slice]) -> bool:
        """Its socket is in another namespace, and it is no proxy: one that swallows the ARP it cannot answer."""
        return _IFLA_LINK_NETNSID in self._at and not number(self._chunk, data[_IFLA_VXLAN_PROXY])

    def _vxlan(self, data: Mapping[int, slice], mtu: int, bridge: str, tunnel: int | None) -> Vxlan:
        local = ""
        if _IFLA_VXLAN_LOCAL in data:
            local = inet_ntop(AF_INET, self._chunk[data[_IFLA_VXLAN_LOCAL]])
        elif _IFLA_VXLAN_LOCAL6 in data:
            local = inet_ntop(AF_INET6, self._chunk[data[_IFLA_VXLAN_LOCAL6]])
        port = int.from_bytes(self._chunk[data[_IFLA_VXLAN_PORT]], "big")
        encrypted = number(self._chunk, self._at[_IFLA_LINK_NETNSID]) == tunnel
        ports = _PORT_RANGE.unpack(self._chunk[data[_IFLA_VXLAN_PORT_RANGE]])
        slave = self._nested(self._info, _IFLA_INFO_SLAVE_DATA)
        return Vxlan(
            self.name,
            number(self._chunk, data[_IFLA_VXLAN_ID]),
            local,
            port,
            mtu,
            bridge,
            encrypted,
            whole=_IFLA_VXLAN_DF in data and bool(number(self._chunk, data[_IFLA_VXLAN_DF])),
            source_ports=ports if any(ports) else (),
            ttl=number(self._chunk, data[_IFLA_VXLAN_TTL]),
            tos=number(self._chunk, data[_IFLA_VXLAN_TOS]),
            checksum=bool(number(self._chunk, data[_IFLA_VXLAN_UDP_CSUM])),
            multicast=_IFLA_BRPORT_MCAST_FLOOD not in slave
            or bool(number(self._chunk, slave[_IFLA_BRPORT_MCAST_FLOOD])),
            suppress=_IFLA_BRPORT_NEIGH_SUPPRESS in slave
            and bool(number(self._chunk, slave[_IFLA_BRPORT_NEIGH_SUPPRESS])),
        )
