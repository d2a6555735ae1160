"""Desired state against observed state: what to do to the kernel, and doing it.

`plan_links` and `plan_rows` are pure: equal inputs give equal, sorted plans, and a plan computed again after it
was applied is empty. Doing is mechanical and belongs to the `Kernel` port: one netlink request per link step,
one batch per kind for rows. A failed step does not stop the others; the caller resynchronises later.

The same `plan_rows` serves both ways of working: over a whole network (resync: observed is a dump) and over just
the rows that an event touched (observed is what those rows were before the event).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

from weft.dataplane import Bridge, Fdb, Link, Neighbour, Peer, Port, Row, Shaper, Station, Tunnel, Vxlan
from weft.keys import PrivateKey
from weft.model import IPNetwork


@dataclass(frozen=True, slots=True)
class Create:
    link: Link
    reason: str = "missing"

    def __str__(self) -> str:
        return f"create {describe(self.link)} ({self.reason})"


@dataclass(frozen=True, slots=True)
class Update:
    """Change what can be changed in place: MTU, master, up, the fixed flags of the link's kind."""

    link: Link
    reason: str

    def __str__(self) -> str:
        return f"update {describe(self.link)} ({self.reason})"


@dataclass(frozen=True, slots=True)
class Remove:
    name: str
    reason: str

    def __str__(self) -> str:
        return f"remove link {self.name} ({self.reason})"


Step = Create | Update | Remove


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Rows to put, then rows to delete. A put replaces a row of the same key, but adds a flood entry."""

    put: tuple[Row, ...] = ()
    delete: tuple[Row, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.delete or self.put)

    def __len__(self) -> int:
        return len(self.delete) + len(self.put)


@dataclass(frozen=True, slots=True)
class ObservedLink:
    """A link in the data-plane namespace as it is; `faults` names what is wrong besides the attributes.

    Faults are, for example, `down`, `learning on`, `neigh_suppress off`: fixed properties of the link's kind that
    an `Update` puts back. A link that is none of ours is a `Port` with the bridge it is enslaved to or "".
    `carrier` of a port says that both its ends are up: a running container uses it.
    """

    link: Link
    faults: tuple[str, ...] = ()
    carrier: bool = False


@dataclass(frozen=True, slots=True)
class Contact:
    """What WireGuard knows of a peer: when the last handshake was (Unix time, 0: never), and bytes of packets."""

    handshake: float = 0.0
    received: int = 0
    sent: int = 0


@dataclass(frozen=True, slots=True)
class ObservedTunnel:
    """The WireGuard device as it is.

    :param backend: `kernel` or `wireguard-go`.
    :param faults: what is wrong besides the attributes, for example `down`.
    :param contacts: by public key.
    """

    tunnel: Tunnel
    backend: str
    faults: tuple[str, ...] = ()
    contacts: Mapping[str, Contact] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TunnelPlan:
    """What is wrong with the device itself (if anything), the peers to put, then the keys of those to delete.

    A peer that is put with an address takes it from the peer that had it: a new key leaves no gap.
    """

    reasons: tuple[str, ...] = ()
    put: tuple[Peer, ...] = ()
    delete: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasons or self.put or self.delete)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that would be changed in the kernel: link steps, then rows, and the WireGuard device's part."""

    links: tuple[Step, ...] = ()
    rows: RowPlan = field(default_factory=RowPlan)
    tunnel: TunnelPlan = field(default_factory=TunnelPlan)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Each change as the object and what happens to it, in words."""
        if self.tunnel.reasons:
            yield "tunnel", f"update WireGuard device ({', '.join(self.tunnel.reasons)})"
        yield from (("peer", f"put peer {peer.endpoint}") for peer in self.tunnel.put)
        yield from (("peer", f"delete peer {key}") for key in self.tunnel.delete)
        yield from (("link", str(step)) for step in self.links)
        yield from (("row", f"put {row}") for row in sorted(map(str, self.rows.put)))
        yield from (("row", f"delete {row}") for row in sorted(map(str, self.rows.delete)))


class Tunnels(Protocol):
    """Reads and writes the WireGuard device. Every method may raise `KernelError`."""

    def intruders(self) -> list[str]:
        """Links in the device's namespace by which packets could pass it: none, unless somebody put one there."""
        ...

    def ensure_tunnel(self) -> None:
        """Make the device if it is not there; the error says what this host lacks."""
        ...

    def observe_tunnel(self) -> ObservedTunnel | None:
        """The device; None if there is none."""
        ...

    def has_tunnel(self, address: str) -> bool:
        """True if the device is there, up, and has this address. Cheap."""
        ...

    def configure_tunnel(self, tunnel: Tunnel, private: PrivateKey) -> None:
        """Give the device its key, port, address and MTU, and put it up; its peers stay. Another key is not to be known
        to any other host yet."""
        ...

    def write_peers(self, plan: TunnelPlan) -> None:
        """Put and delete peers, and greet those that were put: a handshake that came too early is not soon repeated."""
        ...

    def shake_hands(self, private: PrivateKey) -> None:
        """Begin all sessions anew under the present key: no packet is lost, but those to send wait."""
        ...

    def underlay_mtu(self, address: str, towards: Iterable[str] = ()) -> int:
        """See `Kernel`."""
        ...


class Kernel(Protocol):
    """Reads and writes this host's data plane. Every method may raise `KernelError`."""

    def check(self) -> None:
        """Prove that this kernel can make the devices of a network."""
        ...

    def observe_links(self, names: Iterable[str] | None = None) -> dict[str, ObservedLink]:
        """Links of the data-plane namespace by name; only those of `names` that exist, if names are given."""
        ...

    def perform(self, step: Step) -> None:
        """Do one link step. Creating what exists raises `KernelError` with EEXIST; removing what is gone is done."""
        ...

    def has_links(self, names: Iterable[str]) -> bool:
        """True if all these links exist in the data-plane namespace. Cheap: microseconds."""
        ...

    def observe_rows(self, devices: Iterable[str]) -> set[Row]:
        """All permanent and static rows on these devices, except those the kernel makes for the devices' own MACs."""
        ...

    def write_rows(self, plan: RowPlan) -> None:
        """Put, then delete. Adding what exists and deleting what is gone succeed. Collects the first other error."""
        ...

    def routes(self) -> list[IPNetwork]:
        """Destinations of the host's own routes (not the default ones): a new pool must not overlap them."""
        ...

    def has_free_port(self, address: str, port: int) -> bool:
        """Whether nobody on the host has the UDP port, in the family of this address."""
        ...

    def underlay_mtu(self, address: str, towards: Iterable[str] = ()) -> int:
        """MTU of the interface with the underlay address, or of a route to one of `towards` if that is less."""
        ...


def plan_links(desired: Iterable[Link], observed: dict[str, ObservedLink]) -> list[Step]:
    """Steps that turn the observed links into exactly the desired ones: removals, changes, creations.

    Bridges come before what is enslaved to them. A difference in what a VXLAN device cannot change is a
    removal and a creation, with the attribute as the reason.
    """
    wanted = {link.name: link for link in desired}
    removals: list[Step] = [Remove(name, "not wanted") for name in sorted(observed.keys() - wanted.keys())]
    changes: list[Step] = []
    creations: list[Step] = []
    for link in sorted(wanted.values(), key=_order):
        seen = observed.get(link.name)
        if seen is None:
            creations.append(Create(link))
        elif reason := _incompatible(link, seen.link):
            removals.append(Remove(link.name, reason))
            creations.append(Create(link, reason))
        elif reasons := [*_differences(link, seen.link), *seen.faults, *_lost(link, creations)]:
            changes.append(Update(link, ", ".join(reasons)))
    # A removed bridge frees its ports: what was created may have to be enslaved to a new bridge afterwards.
    return [*removals, *sorted(creations, key=lambda s: _order(s.link)), *changes]  # type: ignore[union-attr]


def plan_rows(desired: Set[Row], observed: Set[Row]) -> RowPlan:
    """Rows to put and to delete. A row whose key stays is only put: a replaced entry leaves no gap in traffic.

    A VXLAN entry that is not wanted is always deleted, since deleting one names its VTEP: a MAC to which somebody
    added a second VTEP loses just that one.
    """
    if desired == observed:
        return RowPlan()
    missing = desired - observed
    surplus = observed - desired
    kept = {row.key for row in missing} if surplus else set()
    delete = (row for row in surplus if isinstance(row, Fdb) or row.key not in kept)
    return RowPlan(put=_by_kind(missing), delete=_by_kind(delete))


def plan_tunnel(wanted: Tunnel, seen: ObservedTunnel) -> TunnelPlan:
    """What turns the device that is there into the wanted one."""
    has = seen.tunnel
    # Not what they are: nobody needs to read keys in a log.
    differing = [
        f"other {name}" for name in ("key", "address", "port", "mtu") if getattr(wanted, name) != getattr(has, name)
    ]
    return TunnelPlan(
        reasons=(*differing, *seen.faults),
        put=tuple(sorted(wanted.peers - has.peers)),
        delete=tuple(sorted({peer.key for peer in has.peers} - {peer.key for peer in wanted.peers})),
    )


def describe(link: Link) -> str:
    match link:
        case Bridge():
            return f"bridge {link.name}"
        case Vxlan():
            return f"VXLAN device {link.name} (VNI {link.vni}, UDP port {link.port})"
        case Port():
            return f"port {link.name}"
        case Shaper():
            return f"rate limit {link.name} ({'floods' if link.floods else 'frames'} of {link.source})"


_ORDER: tuple[type[Link], ...] = (Bridge, Vxlan, Port, Shaper)


def _order(link: Link) -> tuple[int, str]:
    return _ORDER.index(type(link)), link.name


def _by_kind(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The kernel's echoes of rows of one kind are read many at once."""
    kinds: dict[type[Row], list[Row]] = {Fdb: [], Station: [], Neighbour: []}
    for row in rows:
        kinds[type(row)].append(row)
    return tuple(chain.from_iterable(kinds.values()))


def _incompatible(wanted: Link, seen: Link) -> str:
    """Why the link that is there cannot become the wanted one, or ''."""
    if type(wanted) is not type(seen):
        return f"is a {type(seen).__name__.lower()}"
    if isinstance(wanted, Vxlan) and isinstance(seen, Vxlan):
        if wanted.encrypted != seen.encrypted:
            return "it is encrypted" if seen.encrypted else "it is not encrypted"
        for name in ("vni", "local", "port", "whole", "source_ports", "checksum"):
            if (has := getattr(seen, name)) != (want := getattr(wanted, name)):
                return f"{name.replace('_', ' ')} is {_shown(has)}, not {_shown(want)}"
    return ""


def _differences(wanted: Link, seen: Link) -> list[str]:
    return [
        f"{name} is {_shown(getattr(seen, name))}"
        for name in ("mtu", "bridge", "addresses", "ttl", "tos", "multicast", "suppress", "offload", "rate")
        if getattr(wanted, name, None) != getattr(seen, name, None)
    ]


def _lost(link: Link, creations: Iterable[Step]) -> list[str]:
    """A link that is made anew does not know yet that a shaper serves it."""
    sources = {step.link.name for step in creations if isinstance(step, Create)}
    return ["its link is made again"] if isinstance(link, Shaper) and link.source in sources else []


def _shown(value: object) -> object:
    return ("on" if value else "off") if isinstance(value, bool) else value or "none"
