"""Links of the data-plane namespace through pyroute2: observe them, and do one step of a plan.

- A VXLAN device is made by one request from the host's namespace that puts it into ours at birth: its UDP socket stays
  in the host's namespace, where the underlay is, while the device is never seen there.
- A veth is made by one request from our namespace that puts its other end, the container's, into the host's.
- No link of ours may speak by itself on the overlay, so none gets an IPv6 address (the kernel would send duplicate
  address detection, router solicitations and MLD). The kernel does not take that in the request that makes a link,
  hence links come up in a later one.
- Bridges neither snoop multicast (without a querier that would block it) nor speak STP. The VXLAN port does not learn:
  what is behind it is known (`Station`), and a MAC learned there would stay when its owner has moved.
  `neigh_suppress` lets the bridge answer ARP and ND from its `Neighbour` rows instead of flooding them.

The same tables say what is set and, read back from the kernel, what is a fault.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from weft.dataplane import Bridge, Link, Port, Vxlan
from weft.errors import KernelError
from weft.kernel.connection import Connection
from weft.kernel.namespace import spare_netfilter
from weft.kernel.netlink import Find
from weft.model import VNI_MAX
from weft.reconcile import Create, ObservedLink, Remove, Step, Update, describe

_BRIDGE = {"br_mcast_snooping": 0, "br_stp_state": 0}
_VXLAN = {"vxlan_learning": 0}
_VXLAN_PORT = {"learning": 0, "neigh_suppress": 1}
_ADDR_GEN_MODE_NONE = 1
_NO_IPV6_ADDRESS = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _ADDR_GEN_MODE_NONE)]})]}

_NOT_OURS = {"lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"}
"""What the kernel puts into each namespace by itself, and nobody can remove."""

_IFF_UP = 1
_SKIP_STATISTICS = 8
_IPV6_MIN_MTU = 1280


class Links:
    """Any thread may call; the requests queue up for the namespace's thread.

    :param dp: the data-plane namespace, also as a file descriptor; `host` likewise.
    """

    def __init__(self, dp: Connection, host: Connection, find: Find, *, dp_fd: int, host_fd: int) -> None:
        self._dp = dp
        self._host = host
        self._find = find
        self._dp_fd = dp_fd
        self._host_fd = host_fd
        self._checking = threading.Lock()

    def observe(self, names: Iterable[str] | None) -> dict[str, ObservedLink]:
        if names is None:
            links = self._dp.dump("observe links", lambda route: route.link("dump", ext_mask=_SKIP_STATISTICS))
        else:
            links = [link for name in names for link in self._get(name)]
        observed = map(self._observed, links)
        return {seen.link.name: seen for seen in observed if seen.link.name not in _NOT_OURS}

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
            try:
                self._add(Bridge(bridge, 0))
                self._add(Vxlan(vxlan, random.randint(1, VNI_MAX), "", random.randint(1024, 65535), 1500, bridge))
            finally:
                self._remove(vxlan)
                self._remove(bridge)

    def _get(self, name: str) -> Iterable[Any]:
        if not self._find(name=name):
            return ()
        try:
            request = {"ifname": name, "ext_mask": _SKIP_STATISTICS}
            return self._dp.call(f"observe link {name}", lambda route: list(route.link("get", **request)))
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return ()
            raise

    def _observed(self, link: Any) -> ObservedLink:
        name, mtu = link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_MTU")
        data = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
        faults = list(_common_faults(link))
        match link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND"):
            case "bridge":
                return ObservedLink(Bridge(name, mtu), (*faults, *_faults(_BRIDGE, "IFLA_", data)))
            case "vxlan" if _is_like_ours(link, data):
                port = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA")
                faults += [*_faults(_VXLAN, "IFLA_", data), *_faults(_VXLAN_PORT, "IFLA_BRPORT_", port)]
                return ObservedLink(_vxlan(name, mtu, self._master(link), data), tuple(faults))
        return ObservedLink(Port(name, self._master(link), mtu), tuple(faults))

    def _master(self, link: Any) -> str:
        index = link.get_attr("IFLA_MASTER")
        bridge = self._find(index=index) if index else None
        return bridge.name if bridge else ""

    def _create(self, link: Link) -> None:
        self._add(link)
        try:
            self._configure(f"create {describe(link)}", link)
        except KernelError:
            with suppress(KernelError):
                self._remove(link.name)
            raise

    def _add(self, link: Link) -> None:
        """Make the link, down."""
        creator, settings = self._dp, self._settings(link)
        if isinstance(link, Vxlan):
            creator = self._host
        if isinstance(link, Bridge):
            self._dp.call("prepare for a bridge", lambda _: spare_netfilter())
        creator.call(
            f"create {describe(link)}",
            lambda route: route.link("add", ifname=link.name, **settings),
            lambda error: self._hint(link, error),
        )

    def _settings(self, link: Link) -> dict[str, Any]:
        """What pyroute2 has to know to make the link."""
        match link:
            case Bridge():
                # An address of its own: otherwise it would always take the lowest one of its ports.
                return {"kind": "bridge", "address": f"02:{os.urandom(5).hex(':')}", **_BRIDGE}
            case Vxlan():
                local = {"vxlan_local6" if ":" in link.local else "vxlan_local": link.local} if link.local else {}
                where = {"vxlan_id": link.vni, "vxlan_port": link.port, "net_ns_fd": self._dp_fd}
                return {"kind": "vxlan", "mtu": link.mtu, **where, **local, **_VXLAN}
            case Port():
                address = {"address": link.mac} if link.mac else {}
                peer = {"ifname": link.peer, "net_ns_fd": self._host_fd, "mtu": link.mtu, **address}
                return {"kind": "veth", "mtu": link.mtu, "peer": peer}

    def _configure(self, what: str, link: Link) -> None:
        """Everything that can be changed in place, then up."""
        index = self._index(what, link.name)
        settings: dict[str, Any] = {"mtu": link.mtu}
        if link.mtu >= _IPV6_MIN_MTU and os.path.exists("/proc/sys/net/ipv6"):
            settings["IFLA_AF_SPEC"] = _NO_IPV6_ADDRESS
        if not isinstance(link, Bridge):
            settings["master"] = self._index(what, link.bridge)

        def configure(route: Any) -> None:
            # The fixed flags in a request of their own: with an MTU beside them the kernel refuses it.
            if isinstance(link, Bridge):
                route.link("set", index=index, kind="bridge", **_BRIDGE)
            route.link("set", index=index, **settings)
            if isinstance(link, Vxlan):
                route.link("set", index=index, kind="vxlan", **_VXLAN)
                route.brport("set", index=index, **_VXLAN_PORT)
            route.link("set", index=index, state="up")

        self._dp.call(what, configure, lambda error: self._hint(link, error))

    def _index(self, what: str, name: str) -> int:
        device = self._find(name=name)
        if device is None:
            raise KernelError(what, errno.ENODEV, f"{name} is missing")
        return device.ifindex

    def _remove(self, name: str) -> None:
        device = self._find(name=name)
        if device is None:
            return
        try:
            self._dp.call(f"remove link {name}", lambda route: route.link("del", index=device.ifindex))
        except KernelError as error:
            if error.errno != errno.ENODEV:
                raise

    def _hint(self, link: Link, error: int) -> str:
        kind = type(link).__name__.lower().replace("port", "veth")
        match link, error:
            case _, errno.EPERM:
                return "weft needs the capability CAP_NET_ADMIN"
            case _, errno.EOPNOTSUPP:
                title = {"vxlan": "VXLAN"}.get(kind, kind)
                return (
                    f"this kernel cannot make {title} devices: load the {kind} module (modprobe {kind}) "
                    "or boot a kernel that has it"
                )
            case Vxlan(), errno.EEXIST if not self._find(name=link.name):
                return (
                    f"VNI {link.vni} on UDP port {link.port} is already used by another VXLAN device of this host: "
                    "choose another with -o weft.vni=..."
                )
            case Vxlan(), errno.EADDRINUSE:
                return f"UDP port {link.port} is used by another program on this host: see ss -lunp"
            case Vxlan(), errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
                return f"this host cannot use {link.local} as its VTEP address"
        return ""


def _common_faults(link: Any) -> Iterator[str]:
    if not link["flags"] & _IFF_UP:
        yield "down"
    mode = link.get_nested("IFLA_AF_SPEC", "AF_INET6", "IFLA_INET6_ADDR_GEN_MODE")
    if mode not in (None, _ADDR_GEN_MODE_NONE):
        yield "makes IPv6 addresses"


def _faults(wanted: Mapping[str, int], prefix: str, attributes: Any) -> Iterator[str]:
    for key, value in wanted.items():
        has = attributes.get_attr(prefix + key.upper()) if attributes else value
        if has not in (None, value):
            yield f"{key.removeprefix('br_')} {'on' if has else 'off'}"


def _is_like_ours(link: Any, data: Any) -> bool:
    """A VXLAN device with its socket in another namespace, and no proxy: that one swallows ARP it cannot answer."""
    return link.get_attr("IFLA_LINK_NETNSID") is not None and not data.get_attr("IFLA_VXLAN_PROXY")


def _vxlan(name: str, mtu: int, bridge: str, data: Any) -> Vxlan:
    local = data.get_attr("IFLA_VXLAN_LOCAL") or data.get_attr("IFLA_VXLAN_LOCAL6") or ""
    return Vxlan(name, data.get_attr("IFLA_VXLAN_ID"), local, data.get_attr("IFLA_VXLAN_PORT"), mtu, bridge)
