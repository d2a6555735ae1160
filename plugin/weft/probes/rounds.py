"""Counting probes: what one measurement says of a link, at the host that asks and at the one that is asked (pure).

The asker's `Round` sends probes of each kind and gets answers, each of which carries what has arrived over there so
far: so it knows the losses of both directions apart. The other's `Heard` counts the same probes. When no answer comes
at all, that count is the only witness.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from secrets import token_bytes
from typing import NamedTuple

from weft.probes.echo import NONCE_BYTES, SMALL_SIZE, Counts, Probe, Protocol, Purpose
from weft.probes.links import Kind, ProbeLink

PLAN = Counts(small=6, full=6, offloaded=6)
_RUNGS = 16
_COPIES = 2
_MOST_ROUNDS = 4


class Way(NamedTuple):
    """The first fields of a `ProbeLink`."""

    sender: str
    receiver: str
    kind: Kind
    size: int
    when: float
    round: str


@dataclass(slots=True)
class Round:
    """One host measures the ways to and from one other.

    :param me: id of this host; `peer` of the other.
    :param size: of a full probe.
    :param when: Unix time.
    """

    me: str
    peer: str
    kind: Kind
    size: int
    when: float
    nonce: bytes = field(default_factory=lambda: token_bytes(NONCE_BYTES))
    there: Counts = field(default_factory=Counts)
    """What the other host has received."""
    rtt: float | None = None
    _sent: dict[int, tuple[Purpose, int, float]] = field(default_factory=dict)
    _answered: dict[Purpose, set[int]] = field(default_factory=lambda: defaultdict(set))
    _corrupt: int = 0
    _largest: int = 0
    _size_there: int = 0
    _heard_from: bool = False
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def probes(self) -> list[Probe]:
        """Those to send at first. The small ones are last: their answers tell of all the others."""
        protocols = (Protocol.TCP, Protocol.UDP)
        return [
            *(self._probe(Purpose.FULL, self.size) for _ in range(PLAN.full)),
            *(self._probe(Purpose.OFFLOADED, SMALL_SIZE, protocols[n % 2]) for n in range(PLAN.offloaded)),
            *(self._probe(Purpose.SMALL, SMALL_SIZE) for _ in range(PLAN.small)),
        ]

    def ladder(self) -> list[Probe]:
        """Those of the sizes between the largest that passed and the next that did not; none if there is no such."""
        whole = self.there.full and self._answered[Purpose.FULL]
        if whole or not self.answered or self._corrupt or self.there.corrupt:
            return []
        low, high = self._between(self.there.largest)
        if high - low < 2:
            low, high = self._between(self._largest)
        step = -(-(high - low) // (_RUNGS + 1))
        sizes = range(low + step, high, max(1, step))
        return [self._probe(Purpose.LADDER, size) for size in sizes for _ in range(_COPIES)]

    def sent(self, probe: Probe, now: float) -> None:
        self._sent[probe.number] = (probe.purpose, probe.size, now)

    def receive(self, probe: Probe, intact: bool, now: float) -> None:
        """Count an answer, however often it comes."""
        if probe.number not in self._sent:
            return
        purpose, _, began = self._sent[probe.number]
        self._heard_from = True
        self.there = _most(self.there, probe.counts)
        if not intact:
            self._corrupt += 1
            return
        self._largest = max(self._largest, probe.size)
        if probe.purpose is purpose:
            self._answered[purpose].add(probe.number)
        if purpose is Purpose.FULL and probe.purpose is purpose:
            self._size_there = probe.size
        if purpose is Purpose.SMALL:
            self.rtt = min(self.rtt or 60.0, now - began)

    @property
    def answered(self) -> bool:
        return self._heard_from

    @property
    def settled(self) -> bool:
        """The probes that were sent last are answered: what has not come by now is hardly to come."""
        small = {number for number, (purpose, _, _) in self._sent.items() if purpose is Purpose.SMALL}
        return small <= self._answered[Purpose.SMALL]

    @property
    def complete(self) -> bool:
        """Every probe was answered in kind."""
        return all(number in self._answered[purpose] for number, (purpose, _, _) in self._sent.items())

    def links(self) -> list[ProbeLink]:
        """To the other host, and back as far as this one can tell."""
        if not self.answered:
            return [ProbeLink(*self._way(self.size), 1.0, 1.0, 1.0, attested=False)]
        here = _counts(self._answered, self._corrupt, self._largest)
        there = _most(self.there, replace(here, corrupt=0))  # the last answers may be missing
        there_to_here = self._way(self._size_there or self.size)._replace(sender=self.peer, receiver=self.me)
        return [
            measured(self._way(self.size), PLAN, there, self.rtt),
            measured(there_to_here, there, here, self.rtt),
        ]

    def _way(self, size: int) -> Way:
        return Way(self.me, self.peer, self.kind, size, self.when, self.nonce.hex())

    def _probe(self, purpose: Purpose, size: int, protocol: Protocol = Protocol.ICMP) -> Probe:
        return Probe(False, purpose, self.nonce, next(self._numbers), size, PLAN, protocol)

    def _between(self, largest: int) -> tuple[int, int]:
        """The largest size that passed, and the smallest larger one that was tried."""
        low = max(largest, SMALL_SIZE)
        return low, min((size for _, size, _ in self._sent.values() if size > low), default=low)


@dataclass(slots=True)
class Heard:
    """What has arrived of the latest rounds of one other host.

    :param when: Unix time of the last arrival.
    """

    when: float = 0.0
    _rounds: dict[bytes, _Count] = field(default_factory=dict)

    def knows(self, nonce: bytes) -> bool:
        return nonce in self._rounds

    def take(self, probe: Probe, intact: bool, when: float) -> Counts:
        """Count a probe; return what of its round has arrived."""
        if probe.nonce not in self._rounds:
            self._rounds[probe.nonce] = _Count(probe.counts)
            while len(self._rounds) > _MOST_ROUNDS:
                del self._rounds[next(iter(self._rounds))]
        self.when = when
        found = self._rounds[probe.nonce]
        found.take(probe, intact)
        return found.counts

    def link(self, sender: str, receiver: str, kind: Kind, size: int) -> ProbeLink:
        """What the latest round says of the way here; there is one."""
        nonce = next(reversed(self._rounds))
        found = self._rounds[nonce]
        way = Way(sender, receiver, kind, found.full_size or size, self.when, nonce.hex())
        return measured(way, found.plan, found.counts)


@dataclass(slots=True)
class _Count:
    plan: Counts
    full_size: int = 0
    _seen: dict[Purpose, set[int]] = field(default_factory=lambda: defaultdict(set))
    _corrupt: set[int] = field(default_factory=set)
    _largest: int = 0

    def take(self, probe: Probe, intact: bool) -> None:
        if not intact:
            self._corrupt.add(probe.number)
            return
        self._seen[probe.purpose].add(probe.number)
        self._largest = max(self._largest, probe.size)
        if probe.purpose is Purpose.FULL:
            self.full_size = probe.size

    @property
    def counts(self) -> Counts:
        return _counts(self._seen, len(self._corrupt), self._largest)


def measured(way: Way, sent: Counts, got: Counts, rtt: float | None = None) -> ProbeLink:
    """The link of which so much was sent and so much came."""
    small = _loss(sent.small, got.small)
    offloaded = _loss(sent.offloaded, got.offloaded)
    corrupt = got.corrupt
    if not corrupt and small == 0 and offloaded and offloaded >= 0.5:
        corrupt = sent.offloaded - got.offloaded  # chance would not choose these: the receiver's kernel dropped them
    return ProbeLink(
        *way,
        small=small,
        full=_loss(sent.full, got.full),
        offloaded=offloaded,
        mtu=got.largest or None,
        corrupt=corrupt,
        rtt=rtt,
    )


def _counts(seen: Mapping[Purpose, Collection[int]], corrupt: int, largest: int) -> Counts:
    small, full, offloaded = (len(seen.get(one, ())) for one in (Purpose.SMALL, Purpose.FULL, Purpose.OFFLOADED))
    return Counts(small, full, offloaded, corrupt, largest)


def _loss(sent: int, got: int) -> float | None:
    return max(0.0, 1 - got / sent) if sent else None


def _most(one: Counts, other: Counts) -> Counts:
    return Counts(
        small=max(one.small, other.small),
        full=max(one.full, other.full),
        offloaded=max(one.offloaded, other.offloaded),
        corrupt=max(one.corrupt, other.corrupt),
        largest=max(one.largest, other.largest),
    )
