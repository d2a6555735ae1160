"""What we have to know of the host's own network: its addresses, their MTU, and where its routes go.

A host with hundreds of containers has as many links, and an address and some routes for each, and it is asked every
few seconds; so is the route to each other host, of which there may be a thousand. So these are parsed as our own tables
are. pyroute2, which takes half a millisecond each, asks for single entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from errno import EADDRNOTAVAIL, EEXIST
from functools import partial
from ipaddress import ip_address, ip_interface, ip_network
from socket import AF_INET, AF_INET6, IPPROTO_IPV6, IPV6_V6ONLY, SOCK_DGRAM, inet_ntop, socket
from typing import Any

from weft.dataplane import pack_address
from weft.errors import ConfigError, KernelError
from weft.kernel.connection import Connection
from weft.kernel.netlink import ADDRESS, ROUTE, Rtnetlink, attributes, messages, number
from weft.model import IPAddress, IPInterface, IPNetwork

_VERSION = {AF_INET: 4, AF_INET6: 6}
_FAMILY = {version: family for family, version in _VERSION.items()}
_RT_TABLE_MAIN = 254
_RT_TABLE_LOCAL = 255
_RTM_F_CLONED = 0x200
_ROUTE_TYPES = {1, 6, 7, 8}
"""unicast, blackhole, unreachable, prohibit: what else there is concerns no container."""
_RTN_UNICAST = 1
_RT_SCOPE_UNIVERSE = 0
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFA_FLAGS = 8
_RTA_DST = 1
_RTA_TABLE = 15
_IFA_F_UNFIT = 0x01 | 0x08 | 0x20
"""secondary (IPv6: temporary), failed, deprecated."""
_IFF_LOOPBACK = 0x8
_LOOPBACK = 1
"""The index of lo in each namespace."""
_RT_SCOPE_HOST = 254
"""Nothing takes such an address as its source by itself."""


@dataclass(frozen=True, slots=True)
class _Address:
    """An address of the host, and the interface that holds it."""

    interface: IPInterface
    index: int
    device: str
    fit: bool

    @property
    def ip(self) -> IPAddress:
        return self.interface.ip

    def __str__(self) -> str:
        return f"{self.ip} ({self.device})"


class Underlay:
    """:param host: the host's own namespace, twice."""

    def __init__(self, host: Connection, reader: Rtnetlink) -> None:
        self._host = host
        self._reader = reader

    def routes(self) -> list[IPNetwork]:
        """Destinations of all routes in all tables but the default routes."""
        networks = map(ip_network, set(self._destinations()))  # each container has brought the same ones
        return sorted((net for net in networks if not net.is_link_local), key=lambda net: (net.version, net))

    def route_within(self, pool: IPNetwork) -> str:
        """A route, but for the default ones, that overlaps the pool, with its device as `ip route` has it; or ""."""
        for route in self._routes():
            if route["family"] == _FAMILY[pool.version] and route["dst_len"] and pool.overlaps(_destination(route)):
                device = self._link(index).get_attr("IFLA_IFNAME") if (index := _output(route)) else ""
                return f"{_destination(route)}{device and f' dev {device}'}"
        return ""

    def _destinations(self) -> Iterator[str]:
        for family in _VERSION:
            for chunk in self._reader.routes(family):
                for start in messages(chunk):
                    size, *_head, found, bits, _, _, table, _, _, kind, flags = ROUTE.unpack_from(chunk, start)
                    if found != family or not bits or kind not in _ROUTE_TYPES or flags & _RTM_F_CLONED:
                        continue
                    at = attributes(chunk, start + ROUTE.size, start + size)
                    if (number(chunk, at[_RTA_TABLE]) if _RTA_TABLE in at else table) != _RT_TABLE_LOCAL:
                        yield f"{inet_ntop(family, chunk[at[_RTA_DST]])}/{bits}"

    def mtu(self, address: str, towards: Iterable[str] = ()) -> int:
        """The least MTU of the interface with that address and of the routes to these destinations."""
        routes = {route for one in towards if (route := self._reader.route(pack_address(one)))}
        own = {route.mtu for route in routes if route.mtu}
        links = {route.ifindex for route in routes if route.ifindex and not route.mtu}
        devices = filter(None, (self._reader.find(index=index) for index in links))
        return min([self._interface_mtu(address), *own, *(device.mtu for device in devices)])

    def _interface_mtu(self, address: str) -> int:
        """Packets to an address on the loopback take the default route."""
        holder = next((a for a in self._addresses() if a.ip == ip_address(address)), None)
        if holder is None:
            raise KernelError(f"find the interface with the underlay address {address}", EADDRNOTAVAIL)
        link = self._link(holder.index)
        if link["flags"] & _IFF_LOOPBACK and (route := self._default_route(holder.ip.version)):
            link = self._link(_output(route))
        return int(link.get_attr("IFLA_MTU"))

    def device(self, address: str) -> str:
        """Name of the interface that has this address; "" if none has."""
        return next((a.device for a in self._addresses() if a.ip == ip_address(address)), "")

    def has(self, address: str) -> bool:
        return any(a.ip == ip_address(address) for a in self._addresses())

    def address(self, spec: str, *, family: int = 0, present: str = "", towards: Iterable[str] = ()) -> str:
        """The address that is meant by an interface, an address, a CIDR, or "".

        "" means the source of the first route to one of `towards`, else of the default route. The `present` one stays
        while it can be meant. IPv4 comes before IPv6, lasting addresses before others.

        :param family: the only IP version that is possible; 0: either.
        :param towards: read as far as it is needed, and not at all if it does not decide.
        """
        candidates = sorted(self._addresses(), key=lambda a: (a.ip.version, not a.fit, a.index))
        candidates = [a for a in candidates if family in (0, a.ip.version)]
        possible = [a for a in candidates if _matches(a, spec)] if spec else candidates
        if any(str(a.ip) == present for a in possible):
            return present
        for chosen in possible if spec else self._of_all_routes(towards, candidates):
            return str(chosen.ip)
        kind = f" for IPv{family}" if family else ""
        problem = f"WEFT_UNDERLAY={spec} is none of this host's" if spec else "this host has no default route"
        known = ", ".join(map(str, candidates)) or "none at all"
        raise ConfigError(f"{problem}{kind}; set WEFT_UNDERLAY to an interface, an address or a CIDR of: {known}")

    def _of_all_routes(self, towards: Iterable[str], candidates: list[_Address]) -> Iterator[_Address]:
        yield from self._of_routes(towards, candidates)
        yield from self._of_default_route(candidates)

    def _of_routes(self, towards: Iterable[str], candidates: list[_Address]) -> Iterator[_Address]:
        """The addresses from which this host would send to these destinations."""
        for destination in towards:
            try:
                source = self._host.call("look up a route", partial(_source, destination=destination))
            except KernelError:
                continue  # there is none
            yield from (a for a in candidates if a.ip == source)

    def _of_default_route(self, candidates: list[_Address]) -> list[_Address]:
        """What the kernel would take as source, first choice first."""
        chosen: list[_Address] = []
        for version in (4, 6):
            if route := self._default_route(version):
                source, gateway = route.get_attr("RTA_PREFSRC"), route.get_attr("RTA_GATEWAY")
                here = [a for a in candidates if a.ip.version == version and a.index == _output(route)]
                if source:
                    here = [a for a in candidates if a.ip == ip_address(source)]
                elif gateway:
                    here.sort(key=lambda a: ip_address(gateway) not in a.interface.network)
                chosen += here
        return chosen

    def own(self, address: str) -> None:
        """Put an address on lo, if it is not there."""
        settings = {"index": _LOOPBACK, "address": address, "prefixlen": 32, "scope": _RT_SCOPE_HOST}
        try:
            self._host.call(f"put address {address} on lo", lambda route: route.addr("add", **settings))
        except KernelError as error:
            if error.errno != EEXIST:
                raise

    def _default_route(self, version: int) -> Any:
        """The preferred one; None if there is none."""
        routes = [
            route
            for route in self._routes()
            if not route["dst_len"]
            and _VERSION[route["family"]] == version
            and route["type"] == _RTN_UNICAST
            and route.get_attr("RTA_TABLE") == _RT_TABLE_MAIN
        ]
        return min(routes, key=lambda route: route.get_attr("RTA_PRIORITY") or 0, default=None)

    def _routes(self) -> list[Any]:
        routes = self._host.dump("read the host's routes", lambda route: route.route("dump", family=0))
        return [
            route
            for route in routes
            if route["family"] in _VERSION
            and route["type"] in _ROUTE_TYPES
            and route.get_attr("RTA_TABLE") != _RT_TABLE_LOCAL
            and not route["flags"] & _RTM_F_CLONED
        ]

    def _addresses(self) -> list[_Address]:
        """Those that others can reach."""
        found, names = [], dict[int, str]()
        for family in _VERSION:
            for chunk in self._reader.addresses(family):
                for start in messages(chunk):
                    size, *_head, has, bits, flags, scope, index = ADDRESS.unpack_from(chunk, start)
                    if has != family or scope != _RT_SCOPE_UNIVERSE:
                        continue
                    at = attributes(chunk, start + ADDRESS.size, start + size)
                    # Our own: on a point-to-point link IFA_ADDRESS is the other side's.
                    local = inet_ntop(family, chunk[at[_IFA_LOCAL if _IFA_LOCAL in at else _IFA_ADDRESS]])
                    flags = number(chunk, at[_IFA_FLAGS]) if _IFA_FLAGS in at else flags
                    if index not in names:
                        names[index] = device.name if (device := self._reader.find(index=index)) else "?"
                    found.append(
                        _Address(ip_interface(f"{local}/{bits}"), index, names[index], not flags & _IFA_F_UNFIT)
                    )
        return found

    def _link(self, index: int) -> Any:
        return self._host.call("read the underlay link", lambda route: route.link("get", index=index)[0])


def has_free_port(address: str, port: int) -> bool:
    """Whether a VXLAN device could have the UDP port: it takes it on all addresses of the family."""
    with socket(AF_INET6 if ":" in address else AF_INET, SOCK_DGRAM) as udp:
        if udp.family == AF_INET6:
            udp.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 1)
        try:
            udp.bind(("", port))
        except OSError:
            return False
    return True


def _source(route: Any, destination: str) -> IPAddress | None:
    """The source address that the kernel would choose; None if the destination is this host."""
    found = route.route("get", dst=destination)[0]
    local = found["type"] != _RTN_UNICAST
    return None if local else ip_address(found.get_attr("RTA_PREFSRC"))


def _matches(address: _Address, spec: str) -> bool:
    if address.device == spec:
        return True
    try:
        return address.ip in ip_network(spec)
    except ValueError:
        return False


def _destination(route: Any) -> IPNetwork:
    return ip_network(f"{route.get_attr('RTA_DST')}/{route['dst_len']}")


def _output(route: Any) -> int:
    """Index of the link by which a route leaves; of several, the first. 0 if it leaves by none, as a blackhole."""
    paths = route.get_attr("RTA_MULTIPATH")
    return int(paths[0]["oif"] if paths else route.get_attr("RTA_OIF") or 0)
