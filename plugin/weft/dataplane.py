"""What can stand in a host's data-plane namespace, as values.

Per network there is a bridge `br<vni>` and a VXLAN device `vx<vni>` enslaved to it; per local endpoint a
veth whose host end, the *port*, is enslaved to the bridge and whose other end goes to the engine.

A packet's way from container A here to container B on another host, and the row that decides each step:

1. A asks who has B's address. The bridge answers for B from its `Neighbour` row (ARP and ND suppression),
   so the question does not cross the underlay.
2. A's frame to B's MAC enters the bridge, whose `Station` row says that this MAC is behind the VXLAN port.
3. The VXLAN device's `Fdb` row names the VTEP (underlay address) of B's host: encapsulate, send there.

Frames to unknown, broadcast and multicast addresses go to the VTEP of every `Fdb` row with the all-zero MAC
(flood entries: head-end replication).

Links are dataclasses. Rows are named tuples of packed bytes, since one network may have 100,000 of each.
All of them are values: two equal objects are the same wish, a difference is work to do.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

FLOOD_MAC = bytes(6)
SHARED_MAC = "02:77:65:66:74:35"
"""Of every bridge with an address of its own: all hosts' have the same address, and any of them may answer for it."""
IPV6_MIN_MTU = 1280
"""Of every link that carries IPv6 (RFC 8200)."""


@dataclass(frozen=True, slots=True)
class Bridge:
    """The switch of one network on this host.

    :param addresses: its own, each with the CIDR that is reached from it: none but the resolver's, on networks whose
        containers have no other way to it.
    """

    name: str
    mtu: int
    addresses: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Vxlan:
    """The tunnel device of one network: its UDP socket is in the host's namespace, the device is not.

    :param local: this host's VTEP address.
    :param port: UDP destination port (RFC 7348 says 4789).
    :param encrypted: its socket is in the namespace that has no way out but WireGuard, see `Tunnel`.
    :param whole: its packets are not fragmented on the way (DF set).
    :param source_ports: first and last UDP port to send from; none: the kernel's own range.
    :param ttl: of the packets; 0: the kernel's own.
    :param tos: of the packets: the DSCP and two zero bits; 1: that of the packet inside.
    :param checksum: the UDP packets have one.
    :param multicast: the bridge floods multicast into it.
    :param suppress: the bridge answers ND as well as ARP. Then neither gratuitous ARP nor its like of ND passes.
    :param offload: checksums of the frames inside are left to whoever sends the packets, such as a network card.
    """

    name: str
    vni: int
    local: str
    port: int
    mtu: int
    bridge: str
    encrypted: bool = False
    whole: bool = False
    source_ports: tuple[int, ...] = ()
    ttl: int = 0
    tos: int = 0
    checksum: bool = True
    multicast: bool = True
    suppress: bool = False
    offload: bool = True


@dataclass(frozen=True, slots=True)
class Port:
    """The host end of one endpoint's veth.

    :param rate: bit/s that the container gets at most; 0: no limit.

    `peer` and `mac` describe the container's end, which the engine takes away: they are used to create it and
    cannot be observed afterwards.
    """

    name: str
    bridge: str
    mtu: int
    peer: str = field(default="", compare=False)
    mac: str = field(default="", compare=False)
    rate: int = 0


@dataclass(frozen=True, slots=True)
class Shaper:
    """The device through which frames of another link take their way, no faster than at its rate.

    Of a port's, those that the container sends; of a VXLAN device's, those that are flooded.

    :param source: name of that link.
    :param rate: in bit/s.
    """

    source: str
    rate: int

    @property
    def name(self) -> str:
        return shaper_name(self.source)

    @property
    def floods(self) -> bool:
        return vni_of(self.source) is not None


Link = Bridge | Vxlan | Port | Shaper


class Fdb(NamedTuple):
    """VXLAN forwarding entry (`bridge fdb ... self permanent`): frames to `mac` go to the host `vtep`."""

    device: str
    mac: bytes
    vtep: bytes

    @property
    def key(self) -> Hashable:
        """A unicast MAC has one VTEP; the flood entries of a device share a MAC and differ by VTEP."""
        return ("fdb", self.device, self.mac, self.vtep if self.mac == FLOOD_MAC else b"")

    def __str__(self) -> str:
        return f"{self.device} {self.mac.hex(':')} via {_text(self.vtep)}"


class Station(NamedTuple):
    """Bridge forwarding entry (`bridge fdb ... master static`): `mac` is behind the port `device`.

    `local` entries (`permanent`) make the MAC the bridge's own, so its frames end here. They are never wanted, but
    somebody may have put one.
    """

    device: str
    mac: bytes
    local: bool = False

    @property
    def key(self) -> Hashable:
        return ("station", self.device, self.mac)

    def __str__(self) -> str:
        return f"{self.device} {self.mac.hex(':')} behind the bridge port"


class Neighbour(NamedTuple):
    """Permanent neighbour on the bridge: lets it answer ARP and ND for `address` in the owner's stead."""

    device: str
    address: bytes
    mac: bytes

    @property
    def key(self) -> Hashable:
        return ("neighbour", self.device, self.address)

    def __str__(self) -> str:
        return f"{self.device} {_text(self.address)} is at {self.mac.hex(':')}"


Row = Fdb | Station | Neighbour


# One string for all rows of a device.
def bridge_name(vni: int) -> str:
    return sys.intern(f"br{vni}")


def vxlan_name(vni: int) -> str:
    return sys.intern(f"vx{vni}")


def device_names(vni: int) -> tuple[str, str]:
    """The bridge and the VXLAN device of a network."""
    return bridge_name(vni), vxlan_name(vni)


def shaper_name(source: str) -> str:
    return f"s{source}"


def shaper_names(links: Iterable[str]) -> set[str]:
    """Of those of these links that can have one."""
    return {shaper_name(name) for name in links if name[:2] in ("vx", "wp")}


def source_of(shaper: str) -> str:
    """The link that a shaper of this name serves; "" if it is no shaper's."""
    return shaper[1:] if shaper.startswith(("svx", "swp")) else ""


def vni_of(name: str) -> int | None:
    """The VNI of a bridge or VXLAN device; None for any other link."""
    return int(name[2:]) if name[:2] in ("br", "vx") and name[2:].isdecimal() else None


def vnis_of(names: Iterable[str]) -> set[int]:
    """The VNIs of the bridges and VXLAN devices among these links."""
    return set(filter(None, map(vni_of, names)))


def pack_address(text: str) -> bytes:
    """4 or 16 bytes of an IP address in its usual text form."""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def pack_mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _text(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


class Peer(NamedTuple):
    """Another host of the WireGuard mesh.

    What comes from `address` was encrypted by the owner of `key`, and what goes there can be read by nobody else.

    :param key: its public key in base64.
    :param address: its VTEP address in encrypted networks, the only one that WireGuard lets it use.
    :param endpoint: its underlay address.
    :param port: UDP port of WireGuard there.
    """

    key: str
    address: str
    endpoint: str
    port: int

    def __str__(self) -> str:
        return f"WireGuard peer {self.address} at {self.endpoint}"


@dataclass(frozen=True, slots=True)
class Tunnel:
    """This host's WireGuard device, in a namespace where nothing else is.

    The sockets of encrypted networks' VXLAN devices are made in that namespace, that of WireGuard stays in the host's.
    So an encrypted network's frame has one way to other hosts, whatever routes and firewalls the host has; and what
    arrives on the underlay has one way to those sockets, whatever its ports, addresses or fragments.

    :param key: public key in base64. The private one is no part of this value: values are compared and logged.
    :param address: this host's VTEP address in encrypted networks, with the prefix length of all hosts' pool.
    :param port: UDP port of WireGuard on the underlay.
    """

    key: str
    address: str
    port: int
    mtu: int
    peers: frozenset[Peer] = frozenset()


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """A link of the data-plane namespace appeared, changed or went away."""

    name: str
    present: bool


@dataclass(frozen=True, slots=True)
class RowEvent:
    """A permanent or static row was put or deleted, by us or by somebody else."""

    row: Row
    present: bool


@dataclass(frozen=True, slots=True)
class Overflow:
    """Events were lost: anything may have changed."""


@dataclass(frozen=True, slots=True)
class TunnelEvent:
    """Something changed in the namespace of the WireGuard device."""


KernelEvent = TunnelEvent | LinkEvent | RowEvent | Overflow
News = Callable[[Iterable[Row], bool], Iterable[Row]]
"""Of rows that were put (True) or deleted, those that shall be told."""
