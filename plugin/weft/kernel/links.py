"""Links of the data-plane namespace through pyroute2: doing one step of a plan.

- A VXLAN device is made by one request from the host's namespace that puts it into ours at birth: its UDP socket stays
  in the host's namespace, where the underlay is, while the device is never seen there.
- An encrypted network's is made from the namespace of the WireGuard device instead, which is all that it can reach.
- A veth is made by one request from our namespace that puts its other end, the container's, into the host's.
- No link of ours may speak by itself on the overlay, so none gets an IPv6 address (the kernel would send duplicate
  address detection, router solicitations and MLD). The kernel does not take that in the request that makes a link,
  hence links come up in a later one.
- Bridges neither snoop multicast (without a querier that would block it) nor speak STP. They have no default VLAN, for
  which the kernel would double each `Station` row, and leave the second one when somebody else's is replaced.
- No port learns: a MAC learned there would stay, for five minutes, when its owner has moved to another host. What is
  behind the VXLAN port is known (`Station`), and so is the MAC of a container, a static entry of its port. Any other
  that a container uses, as VRRP's virtual one, is found by flooding, wherever it is.
- `proxyarp_wifi` lets the bridge answer ARP from its `Neighbour` rows instead of flooding it, and `neigh_suppress` ND
  as well; but with that the kernel (br_arp_nd_proxy.c) keeps gratuitous ARP and unsolicited advertisements from the
  port, so that no floating address could move to another host. Hence it is set only where the bridge has to answer ND.

- Limits are put before a link comes up (`shaping.py`): it never carries more.

The properties that all links of a kind share are in `observe.py`, which reads them back.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from socket import AF_INET
from typing import Any

from weft.dataplane import SHARED_MAC, Bridge, Link, Port, Shaper, Vxlan, source_of
from weft.errors import IN_USE, KernelError
from weft.kernel import observe
from weft.kernel.connection import Connection
from weft.kernel.modules import load_module
from weft.kernel.namespace import set_switches
from weft.kernel.netlink import Find
from weft.kernel.offload import leave_checksums
from weft.kernel.shaping import Shaping
from weft.model import VNI_MAX
from weft.reconcile import Create, Remove, Step, Update, describe


def _settings(table: Iterable[observe.Fixed]) -> dict[str, int]:
    return {fixed.name: fixed.value for fixed in table}


def _tunnel_settings(link: Vxlan) -> dict[str, int]:
    """What can be changed in place."""
    return {"vxlan_ttl": link.ttl, "vxlan_tos": link.tos, **_settings(observe.VXLAN)}


_IFB = Path("/sys/module/ifb")
_STATIC = {"state": 0x40, "flags": 0x4}
"""NUD_NOARP and NTF_MASTER: of a bridge's own table, and neither learned nor for the bridge itself (see `rows.py`)."""
_IFB_MTU = 1500
"""The kernel's own, and of no consequence: what comes is not looked at."""


class Links:
    """Any thread may call; the requests queue up for the namespace's thread.

    :param dp: the data-plane namespace, also as a file descriptor; `host` likewise.
    :param tunnel: the namespace in which sockets of encrypted networks are; `KernelError` if there is none.
    :param shaping: limits of the data-plane namespace.
    :param plain: any socket there.
    :param removals: the data-plane namespace by a thread of its own: the kernel takes 20 ms to let go of a link, most
        of it waiting, and nobody who makes one shall wait behind that.
    """

    def __init__(
        self,
        dp: Connection,
        removals: Connection,
        host: Connection,
        tunnel: Callable[[], Connection],
        find: Find,
        shaping: Shaping,
        plain: socket.socket,
        *,
        dp_fd: int,
        host_fd: int,
    ) -> None:
        self._dp = dp
        self._removals = removals
        self._host = host
        self._tunnel = tunnel
        self._find = find
        self._shaping = shaping
        self._plain = plain
        self._dp_fd = dp_fd
        self._host_fd = host_fd
        self._checking = threading.Lock()

    def perform(self, step: Step) -> None:
        match step:
            case Create(link):
                self._create(link)
            case Update(link):
                self._configure(f"update {describe(link)}", link)
            case Remove(name):
                self._remove(name)

    def check(self) -> None:
        """Prove that bridges and VXLAN devices can be made, by making some. They are not up, so no port is taken."""
        bridge, vxlan = "brcheck", "vxcheck"
        with self._checking:
            self._remove(vxlan)
            self._remove(bridge)
            try:
                self._add(Bridge(bridge, 0))
                self._add(Vxlan(vxlan, random.randint(1, VNI_MAX), "", random.randint(1024, 65535), 1500, bridge))
            finally:
                self._remove(vxlan)
                self._remove(bridge)

    def _create(self, link: Link) -> None:
        self._add(link)
        try:
            self._configure(f"create {describe(link)}", link, new=True)
        except KernelError:
            with suppress(KernelError):
                self._remove(link.name)
            raise

    def _add(self, link: Link) -> None:
        """Make the link, down."""
        creator = self._dp
        if isinstance(link, Vxlan):
            creator = self._tunnel() if link.encrypted else self._host
        settings = self._description(link)
        if isinstance(link, Shaper) and not _IFB.exists():
            load_module("ifb", "numifbs=0")  # by itself it makes two devices that nobody asked for
        if isinstance(link, Bridge):
            self._dp.call("prepare for a bridge", lambda _: set_switches())

        def add() -> None:
            creator.call(
                f"create {describe(link)}",
                lambda route: route.link("add", ifname=link.name, **settings),
                lambda error: _no_module(settings["kind"]) if error == errno.EOPNOTSUPP else self._hint(link, error),
            )

        try:
            add()
        except KernelError as error:
            if error.errno != errno.EOPNOTSUPP or not load_module(settings["kind"]):
                raise
            add()

    def _description(self, link: Link) -> dict[str, Any]:
        """What pyroute2 has to know to make the link."""
        match link:
            case Bridge():
                # Otherwise it would always take the lowest one of its ports.
                mac = SHARED_MAC if link.addresses else f"02:{os.urandom(5).hex(':')}"
                return {"kind": "bridge", "address": mac, **_settings(observe.BRIDGE)}
            case Vxlan():
                local = {"vxlan_local6" if ":" in link.local else "vxlan_local": link.local} if link.local else {}
                where: dict[str, Any] = {"vxlan_id": link.vni, "vxlan_port": link.port, "net_ns_fd": self._dp_fd}
                if link.source_ports:
                    where["vxlan_port_range"] = dict(zip(("low", "high"), link.source_ports, strict=True))
                if not link.checksum:  # over IPv6 the receiver has to be told as well
                    where |= {"vxlan_udp_csum": 0, "vxlan_udp_zero_csum6_tx": 1, "vxlan_udp_zero_csum6_rx": 1}
                if link.whole:
                    where["vxlan_df"] = 1
                return {"kind": "vxlan", "mtu": link.mtu, **where, **local, **_tunnel_settings(link)}
            case Shaper():
                return {"kind": "ifb"}
            case Port():
                address = {"address": link.mac} if link.mac else {}
                peer = {"ifname": link.peer, "net_ns_fd": self._host_fd, "mtu": link.mtu, **address}
                return {"kind": "veth", "mtu": link.mtu, "peer": peer}

    def _configure(self, what: str, link: Link, *, new: bool = False) -> None:
        """Everything that can be changed in place, then up."""
        index = self._index(what, link.name)
        if isinstance(link, Shaper):
            self._shape(what, link, index)
            return
        if isinstance(link, Port) and (link.rate or not new):
            self._shaping.limit(what, index, link.rate)
        if isinstance(link, Vxlan) and not (link.offload and new):
            self._leave_checksums(what, link)
        settings = observe.no_ipv6_address(link.mtu)
        if not isinstance(link, Bridge):
            settings["master"] = self._index(what, link.bridge)

        def configure(route: Any) -> None:
            # The fixed flags and the MTU in requests of their own: with an MTU beside them the kernel refuses those,
            # and the MTU may be what lets the link have IPv6.
            if isinstance(link, Bridge):
                route.link("set", index=index, kind="bridge", **_settings(observe.BRIDGE))
                if link.addresses:
                    route.link("set", index=index, address=SHARED_MAC)
            if isinstance(link, Bridge) or not new:  # any other has had it from the beginning
                route.link("set", index=index, mtu=link.mtu)
            if settings:
                route.link("set", index=index, **settings)
            if isinstance(link, Vxlan):
                route.link("set", index=index, kind="vxlan", **_tunnel_settings(link))
                chosen = {"mcast_flood": int(link.multicast), "neigh_suppress": int(link.suppress)}
                route.brport("set", index=index, **_settings(observe.VXLAN_PORT), **chosen)
            if isinstance(link, Port):
                route.brport("set", index=index, **_settings(observe.PORT))
                if link.mac:
                    route.fdb("replace", ifindex=index, lladdr=link.mac, **_STATIC)
            route.link("set", index=index, state="up")
            if isinstance(link, Bridge):
                _set_addresses(route, index, link.addresses)

        self._dp.call(what, configure, lambda error: self._hint(link, error))

    def _shape(self, what: str, link: Shaper, index: int) -> None:
        source = self._index(what, link.source)
        self._shaping.limit(what, index, link.rate)
        if settings := observe.no_ipv6_address(_IFB_MTU):
            self._dp.call(what, lambda route: route.link("set", index=index, **settings))
        self._dp.call(what, lambda route: route.link("set", index=index, state="up"))
        self._shaping.divert(what, source, index, floods=link.floods)

    def _leave_checksums(self, what: str, link: Vxlan) -> None:
        try:
            leave_checksums(self._plain, link.name, link.offload)
        except OSError as error:
            raise KernelError(what, error.errno or 0, "its checksums cannot be left to the kernel") from error

    def _index(self, what: str, name: str) -> int:
        device = self._find(name=name)
        if device is None:
            raise KernelError(what, errno.ENODEV, f"{name} is missing")
        return device.ifindex

    def _remove(self, name: str) -> None:
        device = self._find(name=name)
        if device is None:
            return
        if (diverted := source_of(name)) and (source := self._find(name=diverted)):
            self._shaping.undivert(source.ifindex)  # what is diverted to a link that is gone is lost
        try:
            self._removals.call(f"remove link {name}", lambda route: route.link("del", index=device.ifindex))
        except KernelError as error:
            if error.errno != errno.ENODEV:
                raise

    def _hint(self, link: Link, error: int) -> str:
        match link, error:
            case _, errno.EPERM:
                return "weft needs the capability CAP_NET_ADMIN"
            case Vxlan(), errno.EEXIST if not self._find(name=link.name):
                return (
                    f"VNI {link.vni} on UDP port {link.port} is already used by another VXLAN device of this host: "
                    "choose another with -o weft.vni=..."
                )
            case Vxlan(), errno.EADDRINUSE:
                return f"UDP port {link.port} {IN_USE}: see ss -lunp"
            case Vxlan(), errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
                return f"this host cannot use {link.local} as its VTEP address"
        return ""


def _set_addresses(route: Any, index: int, wanted: Iterable[tuple[str, str]]) -> None:
    """Its IPv4 addresses, each with the CIDR that is reached from it. On a link that is up: that makes the routes."""
    has = {
        (one.get_attr("IFA_LOCAL"), f"{one.get_attr('IFA_ADDRESS')}/{one['prefixlen']}")
        for one in route.addr("dump", index=index, family=AF_INET)
    }
    for command, addresses in (("del", has - set(wanted)), ("add", [one for one in wanted if one not in has])):
        for local, cidr in addresses:
            peer, _, prefix = cidr.partition("/")
            route.addr(command, index=index, local=local, address=peer, prefixlen=int(prefix))


def _no_module(kind: str) -> str:
    return (
        f"this kernel cannot make {kind.replace('vxlan', 'VXLAN')} devices: load the {kind} module (modprobe {kind}) "
        "or boot a kernel that has it"
    )
