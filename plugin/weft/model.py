"""The records that hosts share, and where the store keeps them.

    schema                                   version of these records; see SCHEMA
    topology/hosts/<host>                    Host
    topology/alive/<host>                    instance of weft that runs there; goes by itself when that one is silent
    topology/networks/<vni>                  Network
    topology/members/<vni>/<host>            Member: this host's engine has the network
    topology/endpoints/<vni>/<endpoint>      Endpoint
    topology/names/<vni>/<endpoint>          EndpointNames: what the container is called; gone with its endpoint
    topology/questions/<question>            id of the host whose doctor wants every host's report; gone by itself
    reports/<question>/<host>                facts.Report, the answer; gone by itself
    ipam/pools/<cidr>                        PoolClaim: reserved by a host, then owned by a network
    ipam/addresses/<cidr>/<ip>               Allocation
    ipam/pending/<host>/<cidr>/<ip>          an allocation that no endpoint holds (yet, or any more)
    macs/<vni>/<mac>                         id of the endpoint that has the MAC
    bindings/<host>/<engine's NetworkID>     Binding: which VNI that is
    names/<network name>                     VNI of the one network that all hosts know under that name
    engines/<host>                           identity of the engine's own store, as this host last saw it
    probes/results/<host>                    links.Results: what this host has measured of its links
    probes/requests/<host>/<asker>           id of the request to probe the asker now; gone when that is done

Everything under `topology/` is mirrored in the memory of every host (`cluster.py`); the rest is read on demand.
Records are frozen; addresses and CIDRs are text in canonical form (`ipaddress`), MACs are lower-case with colons.
A host that starts reads all of `topology/`, maybe a hundred thousand records: msgspec makes them from JSON, and sees
that each field is of its type.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any, Self, TypeVar

import msgspec

from weft.errors import Unreadable
from weft.store import Entry

log = logging.getLogger(__name__)

T = TypeVar("T")

_left_out: set[str] = set()
"""Keys of unreadable entries that the log has named."""

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
IPInterface = IPv4Interface | IPv6Interface

SCHEMA = 1
"""Raised when an older weft could damage what a newer one writes. Records may gain fields without that."""
SCHEMA_KEY = "schema"

TOPOLOGY = "topology/"
HOSTS = "topology/hosts/"
ALIVE = "topology/alive/"
NETWORKS = "topology/networks/"
MEMBERS = "topology/members/"
ENDPOINTS = "topology/endpoints/"
ENDPOINT_NAMES = "topology/names/"
QUESTIONS = "topology/questions/"
POOLS = "ipam/pools/"
ADDRESSES = "ipam/addresses/"
PENDING = "ipam/pending/"
MACS = "macs/"
BINDINGS = "bindings/"
NAMES = "names/"
ENGINES = "engines/"
REPORTS = "reports/"

WIREGUARD_POOL = IPv4Network("100.64.0.0/10")
"""VTEP addresses of encrypted networks (RFC 6598), unless WEFT_WG_POOL says otherwise. They exist in a namespace of
their own only: no route of a host or of a container can collide with them."""

INHERIT = -1
"""As a DSCP: that of the packet inside."""
UNLIMITED = -1
"""As a rate of multicast, of which 0 means none."""
RATE_MAX = 32_000_000_000
"""In bit/s. What the kernel has four bytes for, in bytes per second (tc_ratespec)."""
MTU_MAX = 65535
PORT_MAX = 65535

VNI_MAX = 2**24 - 1
PROBE_VNI = VNI_MAX - 1
"""Of the network that spans all hosts and has no containers: probes of the underlay take it."""
ENCRYPTED_PROBE_VNI = VNI_MAX
"""The same for the way that encrypted networks take."""
VNI_USER_MAX = VNI_MAX - 2
VNI_AUTO_MIN = 4096
"""Chosen VNIs start here, as Docker's overlay does, to leave the low ones to people (moby ovmanager.go)."""


_FIRST_FIELDS = frozenset(
    ("vni", "name", "pools", "mtu", "internal", "creator", "published", "retired", "generation", "encrypted")
)
"""Of networks: every weft that there is keeps these when it writes a record again."""

_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
_json = msgspec.json.Encoder()
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Whatever is wrong with what the store has under `key` becomes an `Unreadable` that names the key."""
    try:
        yield
    except _UNREADABLE as error:
        raise unreadable(key, error) from error


def unreadable(key: str, error: Exception) -> Unreadable:
    what = f"{type(error).__name__}: {error}"
    return Unreadable(f"the store's entry {key} cannot be read ({what}): was it written by hand or by a newer weft?")


def readable(read: Callable[[Entry], T], entries: Iterable[Entry]) -> Iterator[tuple[Entry, T]]:
    """Entries with what `read` makes of them; those that are `Unreadable` stop nothing else, and are said once."""
    for entry in entries:
        try:
            record = read(entry)
        except Unreadable as error:
            if entry.key not in _left_out:
                _left_out.add(entry.key)
                log.error("left out: %s", error)
        else:
            yield entry, record


@cache
def _decoder(record: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(record)


def check_address(text: str) -> None:
    """Raise `ValueError` unless it is an IP address. A dozen times as fast as making one of it."""
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except OSError:
        ip_address(text)


def _check_range(name: str, value: int, least: int, most: int) -> None:
    """What the kernel's fields cannot hold would stop all networks, not just this one."""
    if not least <= value <= most:
        raise ValueError(f"{name} {value} is not from {least} to {most}")


@dataclass(frozen=True, slots=True)
class _Record:
    """JSON form shared by all records: field names as keys; unknown keys of newer versions are ignored."""

    def encode(self) -> str:
        return _json.encode(self).decode()

    @classmethod
    def read(cls, entry: Entry) -> Self:
        """The record in an entry; `Unreadable` if it is none, or another one's."""
        try:  # not `reading`: this is done for every entry of the cluster
            record = cls.decode(entry.value)
            record.check()
            key = getattr(record, "key", entry.key)
            if key != entry.key and isinstance(key, str):
                raise ValueError(f"it belongs to {key}")
        except _UNREADABLE as error:
            raise unreadable(entry.key, error) from error
        return record

    @classmethod
    def decode(cls, text: str) -> Self:
        kind: Any = cls  # mypy does not know that a class is hashable
        record: Self = _decoder(kind).decode(text)
        return record

    def check(self) -> None:
        """Raise `ValueError` for a field of the right type that would make trouble later."""


@dataclass(frozen=True, slots=True)
class Host(_Record):
    """A machine that runs weft. `underlay` is its VTEP address: data that may change, not its identity.

    :param mtu: of the narrowest route from there to another host; 0 if an older weft does not tell.
    :param path_mtu: of the narrowest path to another host, if probes found that less than `mtu` passes; else 0.
    :param wg_key: WireGuard public key in base64; "" until the host has its first encrypted network.
    :param wg_address: its VTEP address in encrypted networks.
    :param wg_port: UDP port of WireGuard at `underlay`.
    :param probes: it answers probes; an older weft does not.
    :param wg_pool: where WireGuard addresses are from, the same on all hosts; an older weft does not tell.
    """

    id: str
    name: str
    underlay: str
    version: str = ""
    wg_key: str = ""
    wg_address: str = ""
    wg_port: int = 0
    mtu: int = 0
    probes: bool = False
    path_mtu: int = 0
    wg_pool: str = str(WIREGUARD_POOL)

    @property
    def key(self) -> str:
        return HOSTS + self.id

    def check(self) -> None:
        check_address(self.underlay)
        _check_range("mtu", self.mtu, 0, MTU_MAX)
        _check_range("path_mtu", self.path_mtu, 0, MTU_MAX)
        _check_range("wg_port", self.wg_port, 0, PORT_MAX)

    @property
    def family(self) -> int:
        """IP version of its underlay."""
        return 6 if ":" in self.underlay else 4

    @property
    def reached(self) -> tuple[str, str, str, int, int, int]:
        """All that decides how others send to it."""
        return self.underlay, self.wg_key, self.wg_address, self.wg_port, self.mtu, self.path_mtu

    @property
    def can_encrypt(self) -> bool:
        """True if others can send to it encrypted. Whatever else stands there, it is no reason to send in plain."""
        try:
            key = base64.b64decode(self.wg_key, validate=True)
            address, pool = IPv4Address(self.wg_address), IPv4Network(self.wg_pool)
        except (binascii.Error, ValueError):
            return False
        return len(key) == 32 and address in pool and 0 < self.wg_port < 65536

    @property
    def wg_interface(self) -> str:
        """`wg_address` as the WireGuard device has it: with the prefix length of the pool."""
        return f"{self.wg_address}/{self.wg_pool.rpartition('/')[2]}"

    @property
    def alive_key(self) -> str:
        return ALIVE + self.id

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"host {self.name} ({self.id[:12]}, {self.underlay})"


@dataclass(frozen=True, slots=True)
class Pool(_Record):
    """One subnet of a network. `auxiliary` maps the user's names to reserved addresses."""

    cidr: str
    gateway: str = ""
    auxiliary: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        ip_network(self.cidr)


@dataclass(frozen=True, slots=True)
class Published(_Record):
    """What only Docker's API tells of a network, and other engines need to make the same one.

    :param options: `-o`, as typed.
    :param ipam_options: `--ipam-opt`, as typed.
    :param ranges: `--ip-range` by the pool's CIDR.
    :param gateways: the pools' gateways as far as Docker shows them: those that were typed or chosen with the pool.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    ipam_options: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, str] = field(default_factory=dict)
    gateways: Mapping[str, str] = field(default_factory=dict)
    ipv6: bool = False
    attachable: bool = False


@dataclass(frozen=True, slots=True)
class Network(_Record):
    """A network, the same on every host; its identity is the VNI.

    :param name: Docker's name for it, learned from the Docker API after creation, so "" at first.
    :param mtu: 0 means: what the underlay of each host allows.
    :param creator: name of the host on which it was made.
    :param published: if not None, every host's engine shall have it, and `names/<name>` is this network's.
    :param retired: somebody removed it: every engine shall drop it as soon as no container there uses it.
    :param generation: how often it was wanted again after that: who removed an earlier one did not mean this one.
    :param encrypted: it is carried by WireGuard, or not at all.
    :param port: UDP port of its tunnels; 0: that of all hosts' settings.
    :param source_ports: UDP ports that they send from, as LOW-HIGH; "": as the kernel of each host chooses.
    :param ttl: of their packets; 0: as each host's kernel has it.
    :param dscp: of their packets, or `INHERIT`: that of the packet inside.
    :param udp_checksum: their packets have one.
    :param multicast: bit/s of multicast and broadcast that a host sends to each other one; or `UNLIMITED`; 0: broadcast
        only, without a limit.
    :param rate: bit/s that a container gets, and that it sends, unless it was attached with another limit; 0: no limit.
    :param tx_checksum: checksums of the frames inside are left to network cards.
    :param ifname: what the names of containers' interfaces begin with; "": as Docker's own.
    :param floating: addresses may move by themselves, IPv6 ones too.
    """

    vni: int
    name: str
    pools: tuple[Pool, ...]
    mtu: int
    internal: bool
    creator: str
    published: Published | None = None
    retired: bool = False
    generation: int = 0
    encrypted: bool = False
    port: int = 0
    source_ports: str = ""
    ttl: int = 0
    dscp: int = 0
    udp_checksum: bool = True
    multicast: int = UNLIMITED
    ifname: str = ""
    rate: int = 0
    tx_checksum: bool = True
    floating: bool = False

    @property
    def key(self) -> str:
        return network_key(self.vni)

    def encode(self) -> str:
        """What an older weft would damage is wrapped, so that it cannot read it.

        One that knows nothing of encryption would carry the network in plain, and one that does not know an option
        would write the record without it; so it leaves the entry out, and refuses to join the network's subnet.
        """
        fields = self.__dataclass_fields__
        values = {name: getattr(self, name) for name in fields}  # `asdict` takes 20 times as long
        if chosen := {name for name in fields.keys() - _FIRST_FIELDS if values[name] != fields[name].default}:
            values = {"network": {name: value for name, value in values.items() if name in _FIRST_FIELDS | chosen}}
        elif self.encrypted:
            values = {"encrypted": values}
        return _json.encode(values).decode()

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"network {self.name} (VNI {self.vni})" if self.name else f"network with VNI {self.vni}"

    def check(self) -> None:
        for pool in self.pools:
            pool.check()
        _check_range("mtu", self.mtu, 0, MTU_MAX)
        _check_range("rate", self.rate, 0, RATE_MAX)
        _check_range("multicast", self.multicast, UNLIMITED, RATE_MAX)
        _check_range("port", self.port, 0, PORT_MAX)
        _check_range("ttl", self.ttl, 0, 255)
        _check_range("dscp", self.dscp, INHERIT, 63)
        if self.source_ports:
            low, high = map(int, self.source_ports.split("-"))
            _check_range("source_ports", high, 2, PORT_MAX)
            _check_range("source_ports", low, 1, high - 1)

    @property
    def wanted(self) -> bool:
        """True if every engine shall have it."""
        return self.published is not None and not self.retired

    def revived(self) -> Network:
        """Every engine shall have it (again)."""
        return replace(self, retired=False, generation=self.generation + self.retired)

    def cidr_of(self, address: str) -> str | None:
        """CIDR of the pool that an address is in."""
        parsed = ip_address(address)
        return next((pool.cidr for pool in self.pools if parsed in ip_network(pool.cidr)), None)

    @classmethod
    def decode(cls, text: str) -> Self:
        values = msgspec.json.decode(text)
        if isinstance(encrypted := values.get("encrypted"), dict):
            values = {**encrypted, "encrypted": True}
        elif "network" in values:
            values = dict(values["network"])
            if unknown := values.keys() - cls.__dataclass_fields__.keys():
                raise ValueError(f"it has options that this weft does not know: {', '.join(sorted(unknown))}")
        return msgspec.convert(values, cls)


@dataclass(frozen=True, slots=True)
class Member(_Record):
    """The engine of `host` knows the network under its own `network_id`.

    :param seen: it was among the engine's networks, so that if it is missing, somebody removed it.
    """

    vni: int
    host: str
    network_id: str
    seen: bool = False

    @property
    def key(self) -> str:
        return f"{members_prefix(self.vni)}{self.host}"


@dataclass(frozen=True, slots=True)
class Binding(_Record):
    """An engine's NetworkID stands for a VNI on one host."""

    vni: int
    network_id: str

    def key(self, host: str) -> str:
        return binding_key(host, self.network_id)


@dataclass(frozen=True, slots=True)
class Endpoint(_Record):
    """A container's attachment to a network. `addresses` are plain IPs, IPv4 first.

    :param mtu: what its interface was given at its start, and keeps; 0 if an older weft made it.
    :param rate: bit/s that it gets, and that it sends; 0: no limit.
    """

    id: str
    vni: int
    mac: str
    addresses: tuple[str, ...]
    host: str
    mtu: int = 0
    rate: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", sys.intern(self.host))  # a hundred endpoints share it

    @property
    def key(self) -> str:
        return endpoint_key(self.vni, self.id)

    def check(self) -> None:
        for address in self.addresses:
            check_address(address)
        if not _MAC.fullmatch(self.mac):
            raise ValueError(f"{self.mac} is no MAC address")
        _check_range("mtu", self.mtu, 0, MTU_MAX)
        _check_range("rate", self.rate, 0, RATE_MAX)


@dataclass(frozen=True, slots=True)
class EndpointNames(_Record):
    """By which names the containers of its network may ask for an endpoint; only Docker's API tells them.

    :param container: its name, as typed.
    :param aliases: `--network-alias`, Compose's service name, as typed.
    :param short_id: the first twelve digits of the container's id.
    """

    vni: int
    endpoint: str
    host: str
    container: str
    aliases: tuple[str, ...] = ()
    hostname: str = ""
    short_id: str = ""

    @property
    def key(self) -> str:
        return endpoint_names_key(self.vni, self.endpoint)

    @property
    def all(self) -> frozenset[str]:
        """Every one of them, in lower case: names are the same in any case (RFC 4343)."""
        names = (self.container, self.hostname, self.short_id, *self.aliases)
        return frozenset(name.lower() for name in names if name)


@dataclass(frozen=True, slots=True)
class PoolClaim(_Record):
    """Who holds a pool: the network `vni` if not 0, and the engines that asked for it.

    :param gateway: the pool's gateway once one was asked for, the same for all.
    :param users: by host, how many networks of its engine have the pool (weft's own and those that only use our IPAM).
    """

    cidr: str
    vni: int = 0
    gateway: str = ""
    users: Mapping[str, int] = field(default_factory=dict)

    def check(self) -> None:
        ip_network(self.cidr)
        if self.gateway:
            ip_address(self.gateway)

    def used(self, host: str, by: int) -> PoolClaim:
        """The claim with `by` more networks of a host."""
        users = {**self.users, host: self.users.get(host, 0) + by}
        return replace(self, users={h: n for h, n in users.items() if n > 0})

    @property
    def key(self) -> str:
        return POOLS + self.cidr


@dataclass(frozen=True, slots=True)
class Allocation(_Record):
    """One address that is taken.

    :param kind: `endpoint`, `gateway` or `auxiliary`; the last two belong to the network, not to a host.
    :param endpoint: the endpoint that holds it; "" while it is only requested.
    :param space: address space of the request; `weft-global` ones come from a Swarm manager.
    """

    cidr: str
    address: str
    host: str
    kind: str = "endpoint"
    endpoint: str = ""
    space: str = ""

    @property
    def key(self) -> str:
        return address_key(self.cidr, self.address)

    @property
    def pending_key(self) -> str:
        return f"{pending_prefix(self.host)}{self.cidr}/{self.address}"


def network_key(vni: int) -> str:
    return f"{NETWORKS}{vni}"


def members_prefix(vni: int) -> str:
    return f"{MEMBERS}{vni}/"


def endpoints_prefix(vni: int) -> str:
    return f"{ENDPOINTS}{vni}/"


def endpoint_key(vni: int, endpoint_id: str) -> str:
    return f"{ENDPOINTS}{vni}/{endpoint_id}"


def endpoint_names_prefix(vni: int) -> str:
    return f"{ENDPOINT_NAMES}{vni}/"


def endpoint_names_key(vni: int, endpoint_id: str) -> str:
    return f"{endpoint_names_prefix(vni)}{endpoint_id}"


def address_key(cidr: str, address: str) -> str:
    return f"{ADDRESSES}{cidr}/{address}"


def pending_prefix(host: str) -> str:
    return f"{PENDING}{host}/"


def mac_key(vni: int, mac: str) -> str:
    return f"{MACS}{vni}/{mac}"


def name_key(name: str) -> str:
    return f"{NAMES}{name}"


def binding_key(host: str, network_id: str) -> str:
    return f"{BINDINGS}{host}/{network_id}"
