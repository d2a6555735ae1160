"""Who is meant by a name: a function of who asks, the question and the cluster. No I/O, no clock.

Docker's embedded DNS asks us only what it does not know itself, which is everything on other hosts. We answer for all
hosts alike, as it would if it knew them: container name, network aliases, hostname, short id and any of these with the
network's name behind; only of networks that the asker is on, of several the first by name that has it. A name's
endpoints on hosts that gave no sign of life are answered only when there is no other, and an endpoint that is gone
never: its names are looked at only through its own record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, Self

from weft.cluster import Cluster
from weft.model import Endpoint

_REVERSE = {".in-addr.arpa": 4, ".ip6.arpa": 32}
"""What names of addresses end with (RFC 1035, RFC 3596), and how many labels come before that."""


class Kind(Enum):
    """What a question asks for."""

    A = 4
    AAAA = 6
    PTR = 0
    OTHER = -1


class Asker(NamedTuple):
    """A container of this host. `networks` has what its engine calls each of its networks, with its VNI, in order."""

    networks: tuple[tuple[str, int], ...]

    @classmethod
    def on(cls, networks: Mapping[int, str]) -> Self:
        """:param networks: what its engine calls them, by VNI."""
        return cls(tuple(sorted((name, vni) for vni, name in networks.items())))


def lookup(cluster: Cluster, asker: Asker, me: str, question: str, kind: Kind, turn: int = 0) -> list[str] | None:
    """Addresses, or names for PTR; empty if the name is known but has none of that kind; None if it is not ours.

    :param me: id of this host, which is alive whatever the store says.
    :param question: in any case, without the dot at the end.
    :param turn: which of several addresses comes first: they are rotated by it.
    """
    question = question.lower()
    if question.endswith(".arpa") and (address := _reversed_address(question)):
        names = _names_of(cluster, asker, address)
        return names if kind is Kind.PTR or not names else []
    for name, vni in asker.networks:
        if endpoints := _called(cluster, vni, name, question):
            return _rotated(_addresses(_reachable(cluster, endpoints, me), kind), turn)
    return None


def _called(cluster: Cluster, vni: int, name_here: str, question: str) -> list[Endpoint]:
    """Endpoints of the network that have the name, plain or with the network's name behind."""
    called, endpoints = cluster.called.get(vni, {}), cluster.endpoints.get(vni, {})
    ids = called.get(question)
    if ids is None:
        network = cluster.networks.get(vni)
        for suffix in {name_here.lower(), network.name.lower() if network else ""} - {""}:
            if question.endswith(f".{suffix}"):
                ids = ids or called.get(question[: -len(suffix) - 1])
    return [endpoint for one in ids or () if (endpoint := endpoints.get(one))]


def _reachable(cluster: Cluster, endpoints: list[Endpoint], me: str) -> list[Endpoint]:
    return [e for e in endpoints if e.host in cluster.alive or e.host == me] or endpoints


def _addresses(endpoints: Iterable[Endpoint], kind: Kind) -> list[str]:
    if kind not in (Kind.A, Kind.AAAA):
        return []
    is_v6 = kind is Kind.AAAA
    return [address for e in endpoints for address in e.addresses if (":" in address) == is_v6]


def _rotated(addresses: list[str], turn: int) -> list[str]:
    first = turn % len(addresses) if addresses else 0
    return addresses[first:] + addresses[:first]


def _reversed_address(question: str) -> str | None:
    """The address in `4.3.2.10.in-addr.arpa` or its IPv6 counterpart."""
    for suffix, count in _REVERSE.items():
        labels = question.removesuffix(suffix).split(".")
        if question.endswith(suffix) and len(labels) == count:
            digits = "".join(reversed(labels))
            try:
                return str(
                    IPv4Address(".".join(reversed(labels))) if count == 4 else IPv6Address(bytes.fromhex(digits))
                )
            except ValueError:
                return None
    return None


def _names_of(cluster: Cluster, asker: Asker, address: str) -> list[str] | None:
    """`container.network`, as the embedded DNS answers for its own."""
    holder = cluster.holders.get(address)
    names = cluster.names.get(holder.vni, {}).get(holder.id) if holder else None
    here = [name for name, vni in asker.networks if holder and vni == holder.vni]
    return [f"{names.container}.{here[0]}"] if names and here else None
