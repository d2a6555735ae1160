"""What hosts have measured of the ways between them, and what follows from all of it together (pure).

Whoever sends knows only whether an answer came, which takes both directions. What a host has *received* is what tells
them apart: a link that its receiver speaks for is `attested`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from weft.model import reading
from weft.store import Entry

RESULTS = "probes/results/"
REQUESTS = "probes/requests/"

Kind = Literal["plain", "encrypted"]

_SAME_SECONDS = 60.0
"""Measurements within that time may complete each other."""
_MEASURED = ("small", "full", "offloaded", "mtu", "rtt")


@dataclass(frozen=True, slots=True)
class ProbeLink:
    """One direction between two hosts: `sender` sent, `receiver` did or did not receive. Losses are from 0 to 1.

    None is *unknown*: not measured, or the other host is too old to know probes.

    :param sender: id of the host; `from` in JSON. `receiver` likewise is `to`.
    :param size: MTU inside the tunnel, which is the size of a full probe.
    :param when: Unix time of the measurement; 0 if there was none.
    :param round: which measurement that was.
    :param small: loss of small probes whose checksum was ready.
    :param full: loss of those of full size.
    :param offloaded: loss of small probes whose checksum was left to the network card, as containers' TCP and UDP does.
    :param mtu: largest inner size that passed.
    :param corrupt: probes that arrived with a wrong payload or checksum, or were lost for their checksum alone.
    :param rtt: seconds.
    :param attested: the receiver itself says so. If not, all that is known is that nothing was answered.
    """

    sender: str
    receiver: str
    kind: Kind
    size: int
    when: float
    round: str = ""
    small: float | None = None
    full: float | None = None
    offloaded: float | None = None
    mtu: int | None = None
    corrupt: int = 0
    rtt: float | None = None
    attested: bool = True

    @property
    def key(self) -> tuple[str, str, Kind]:
        return self.sender, self.receiver, self.kind

    @property
    def faulty(self) -> bool:
        return bool(self.small or self.full or self.offloaded or self.corrupt)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {"from": values.pop("sender"), "to": values.pop("receiver"), **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ProbeLink:
        """`KeyError`, `TypeError` or `ValueError` if it is none; fields of newer versions are left out."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        link = cls(**{**known, "sender": values["from"], "receiver": values["to"]})
        _check(link)
        return link


@dataclass(frozen=True, slots=True)
class Results:
    """What one host says of its links, in both directions: one record of the store, gone with its host."""

    host: str
    links: tuple[ProbeLink, ...] = ()

    @property
    def key(self) -> str:
        return RESULTS + self.host

    def encode(self) -> str:
        values = {"host": self.host, "links": [link.to_json() for link in self.links]}
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def read(cls, entry: Entry) -> Results:
        """`Unreadable` if it is none."""
        with reading(entry.key):
            values = json.loads(entry.value)
            links = tuple(ProbeLink.from_json(link) for link in values["links"])
            return cls(str(values["host"]), links)


def requests_prefix(host: str) -> str:
    """What other hosts ask of this one."""
    return f"{REQUESTS}{host}/"


def request_key(host: str, asker: str) -> str:
    """There until the host has done what was asked, and said so in its record."""
    return requests_prefix(host) + asker


def merge(links: Iterable[ProbeLink]) -> list[ProbeLink]:
    """The one truth for each direction, of what several hosts say; sorted."""
    said: dict[tuple[str, str, Kind], list[ProbeLink]] = defaultdict(list)
    for link in links:
        said[link.key].append(link)
    return [_best(said[key]) for key in sorted(said)]


def _best(said: Sequence[ProbeLink]) -> ProbeLink:
    """The newest, unless that had no answer and the receiver has seen just this measurement arrive."""
    newest = max(said, key=lambda link: (link.when, link.attested))
    best = next((link for link in said if link.attested and link.round == newest.round), newest)
    return _completed(best, said) if best.attested else best


def _completed(link: ProbeLink, said: Iterable[ProbeLink]) -> ProbeLink:
    """With what it does not know, but another measurement of the same time does."""
    near = [one for one in said if one.attested and abs(one.when - link.when) < _SAME_SECONDS]
    known = {name: value for one in near for name in _MEASURED if (value := getattr(one, name)) is not None}
    return replace(link, **{name: value for name, value in known.items() if getattr(link, name) is None})


def _check(link: ProbeLink) -> None:
    numbers = (link.size, link.when, link.corrupt)
    maybe = (link.small, link.full, link.offloaded, link.mtu, link.rtt)
    if not all(isinstance(one, int | float) for one in (*numbers, *(one for one in maybe if one is not None))):
        raise TypeError("a measurement must be a number")
    if link.kind not in ("plain", "encrypted"):
        raise ValueError(f"{link.kind!r} is no kind of link")
    if not all(isinstance(host, str) and host for host in (link.sender, link.receiver)):
        raise TypeError("a host must be named by its id")
