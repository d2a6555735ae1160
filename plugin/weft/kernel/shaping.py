"""How fast frames may pass a link, and which of them: the kernel's traffic control, over plain rtnetlink.

- A *bucket* (tbf) is a link's root queue: what leaves by the link is held back, and dropped if it would wait too long.
- What comes in cannot be queued. It is *diverted* into a device of kind ifb, which has a bucket, and comes back from
  there as if it had just come in. A bucket on the container's own end would need no such device, but the kernel takes
  a link's queues away when the engine moves it into the container (`dev_shutdown` in net/core/dev.c).
- What a network floods is diverted where it leaves the bridge by the tunnel, by a filter (clsact) beside the tunnel's
  queue, of which it has none: frames to one MAC are looked at, but pass without a lock. ARP and questions for IPv6
  neighbours are left alone: they would be lost in a flood of others, and containers cut off.

Filters are of kind u32, which every kernel has. pyroute2 cannot make one that looks at MACs, hence messages of our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import ENOENT
from socket import htons
from struct import Struct
from typing import NamedTuple

from weft.errors import KernelError
from weft.kernel.modules import load_module
from weft.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    Rtnetlink,
    attribute,
    attributes,
    messages,
    text,
)

RTM_NEWQDISC = 36
RTM_DELQDISC = 37
_RTM_GETQDISC = 38
RTM_NEWTFILTER = 44
RTM_DELTFILTER = 45
_RTM_GETTFILTER = 46

TRAFFIC = Struct("=IHHII B3xiIII")
"""nlmsghdr, then tcmsg: family, index of the link, handle, parent, info."""
_BUCKET = Struct("=BBHhHI 12x III")
"""tc_tbf_qopt: tc_ratespec (cell log, link layer, overhead, alignment, least packet, bytes per second), none for peaks,
limit, buffer, mtu."""
_SELECTOR = Struct("=BxBx12x")
"""tc_u32_sel: flags, number of keys."""
_KEY = Struct(">II")
"""tc_u32_key: mask and value of four bytes of the frame; `_OFFSET` follows."""
_OFFSET = Struct("=ii")
"""From the IP header, and a mask for offsets that depend on the frame."""
_MIRRED = Struct("=IIiiiiI")
"""tc_mirred: index, capabilities, verdict, references, bindings, what to do, index of the link."""
_NUMBER = Struct("=I")

_TCA_KIND = 1
_TCA_OPTIONS = 2
_TCA_TBF_PARMS = 1
_TCA_TBF_BURST = 6
_TCA_U32_CLASSID = 1
_TCA_U32_SEL = 5
_TCA_U32_ACT = 7
_TCA_ACT_KIND = 1
_TCA_ACT_OPTIONS = 2
_TCA_MIRRED_PARMS = 2

_ROOT = 0xFFFFFFFF
_BUCKET_HANDLE = 0x10000
_CLSACT = 0xFFFFFFF1
_CLSACT_HANDLE = 0xFFFF0000
_INCOMING = 0xFFFFFFF2
_OUTGOING = 0xFFFFFFF3
_LINKLAYER_ETHERNET = 1
_TERMINAL = 1
_TC_ACT_STOLEN = 4
_EGRESS_REDIRECT = 1

_ALL_PROTOCOLS = 0x0003
_ARP = 0x0806
_IPV6 = 0x86DD
_DESTINATION = -14
"""Where a frame's destination MAC is."""

_LEAST_BURST = 80_000
"""Bytes: the largest packet that a link hands over in one piece, 64 kB and the headers of its parts."""
_BURST_SECONDS = 0.01
"""A tick of the slowest kernel clocks (HZ=100)."""
_LATENCY_SECONDS = 0.05


class _Rule(NamedTuple):
    """What happens to frames of a protocol with this value in the four bytes at the offset."""

    protocol: int
    mask: int
    value: int
    offset: int
    diverts: bool

    @property
    def selector(self) -> bytes:
        return _SELECTOR.pack(_TERMINAL, 1) + _KEY.pack(self.mask, self.value) + _OFFSET.pack(self.offset, 0)


_EVERYTHING = (_Rule(_ALL_PROTOCOLS, 0, 0, 0, diverts=True),)
_FLOODS = (
    _Rule(_ARP, 0, 0, 0, diverts=False),
    _Rule(_IPV6, 0xFFFFFF00, 0x3333FF00, _DESTINATION, diverts=False),  # solicited-node addresses (RFC 2464, RFC 4291)
    _Rule(_ALL_PROTOCOLS, 0x01000000, 0x01000000, _DESTINATION, diverts=True),  # the group bit
)


class Shaping:
    """Any thread may call.

    :param netlink: in the namespace of the links.
    """

    def __init__(self, netlink: Rtnetlink) -> None:
        self._netlink = netlink

    def limit(self, what: str, index: int, rate: int) -> None:
        """Let no more than `rate` bit/s leave by the link; 0: as much as there is.

        :param what: for the error, which names the module that is missing.
        """
        if rate:
            self._send(what, _request(RTM_NEWQDISC, index, _BUCKET_HANDLE, _ROOT, 0, _bucket(rate)), "sch_tbf")
        else:
            self._netlink.send([_request(RTM_DELQDISC, index, _BUCKET_HANDLE, _ROOT)])  # there may be none

    def divert(self, what: str, index: int, into: int, *, floods: bool) -> None:
        """Let what comes in by the link, or what it floods, take the way through the link `into`; nothing else."""
        self.undivert(index)
        self._send(what, _request(RTM_NEWQDISC, index, _CLSACT_HANDLE, _CLSACT, 0, _kind("clsact")), "sch_ingress")
        for parent, info, rule in _rules(floods):
            body = _filter(rule, into)
            self._send(what, _request(RTM_NEWTFILTER, index, 0, parent, info, body), "cls_u32", "act_mirred")

    def undivert(self, index: int) -> None:
        """Let all take its own way again, if it does not."""
        self._netlink.send([_request(RTM_DELQDISC, index, _CLSACT_HANDLE, _CLSACT)])

    def _send(self, what: str, request: bytes, *modules: str) -> None:
        refused = self._netlink.send([request])
        if refused and refused[0][1] == ENOENT:
            for name in modules:
                load_module(name)
            refused = self._netlink.send([request])
        for _, errno in refused:
            hint = f"load what it lacks (modprobe -a {' '.join(modules)}) or boot a kernel that has it"
            raise KernelError(what, errno, f"this kernel cannot limit a rate: {hint}" if errno == ENOENT else "")


def rates(reader: Rtnetlink) -> dict[int, int]:
    """In bit/s, by the index of each link that has a bucket of ours."""
    found = {}
    for chunk in reader.dump(
        TRAFFIC.pack(TRAFFIC.size, _RTM_GETQDISC, NLM_F_REQUEST | NLM_F_DUMP, 0, 0, 0, 0, 0, 0, 0)
    ):
        for start in messages(chunk):
            size, _, _, _, _, _, index, _, parent, _ = TRAFFIC.unpack_from(chunk, start)
            at = attributes(chunk, start + TRAFFIC.size, start + size)
            if parent == _ROOT and text(chunk, at[_TCA_KIND]) == "tbf":
                parms = attributes(chunk, at[_TCA_OPTIONS].start, at[_TCA_OPTIONS].stop)[_TCA_TBF_PARMS]
                *_, rate, limit, _, _ = _BUCKET.unpack_from(chunk, parms.start)
                if limit == _limit(rate):
                    found[index] = rate * 8
    return found


def diverts(reader: Rtnetlink, index: int, into: int, *, floods: bool) -> bool:
    """Whether the link diverts just what `Shaping.divert` lets it."""
    parent = _OUTGOING if floods else _INCOMING
    request = TRAFFIC.pack(TRAFFIC.size, _RTM_GETTFILTER, NLM_F_REQUEST | NLM_F_DUMP, 0, 0, 0, index, 0, parent, 0)
    has = [rule for chunk in reader.dump(request) for start in messages(chunk) for rule in _observed(chunk, start)]
    return has == [(info, rule.selector, into if rule.diverts else 0) for _, info, rule in _rules(floods)]


def _rules(floods: bool) -> Iterator[tuple[int, int, _Rule]]:
    """Each with where it is attached, and its place and protocol as the kernel has them."""
    for place, rule in enumerate(_FLOODS if floods else _EVERYTHING, 1):
        yield _OUTGOING if floods else _INCOMING, place << 16 | htons(rule.protocol), rule


def _observed(chunk: bytes, start: int) -> Iterator[tuple[int, bytes, int]]:
    """A filter's place and protocol, its selector, and the link that it diverts to. A hash table is no filter."""
    size, _, _, _, _, _, _, _, _, info = TRAFFIC.unpack_from(chunk, start)
    at = attributes(chunk, start + TRAFFIC.size, start + size)
    options = _nested(chunk, at, _TCA_OPTIONS)
    if text(chunk, at[_TCA_KIND]) != "u32":
        yield info, b"", 0
    elif _TCA_U32_SEL in options:
        yield info, chunk[options[_TCA_U32_SEL]], _target(chunk, options)


def _target(chunk: bytes, options: dict[int, slice]) -> int:
    for one in _nested(chunk, options, _TCA_U32_ACT).values():
        action = attributes(chunk, one.start, one.stop)
        if text(chunk, action[_TCA_ACT_KIND]) == "mirred":
            parms = _nested(chunk, action, _TCA_ACT_OPTIONS)[_TCA_MIRRED_PARMS]
            *_, index = _MIRRED.unpack_from(chunk, parms.start)
            return int(index)
    return 0


def _nested(chunk: bytes, at: dict[int, slice], kind: int) -> dict[int, slice]:
    return attributes(chunk, at[kind].start, at[kind].stop) if kind in at else {}


def _request(verb: int, index: int, handle: int, parent: int, info: int = 0, body: bytes = b"") -> bytes:
    flags = NLM_F_REQUEST | (NLM_F_CREATE | NLM_F_REPLACE if body else 0)
    return TRAFFIC.pack(TRAFFIC.size + len(body), verb, flags, 1, 0, 0, index, handle, parent, info) + body


def _kind(name: str) -> bytes:
    return attribute(_TCA_KIND, name.encode() + b"\0")


def _bucket(rate: int) -> bytes:
    rate //= 8
    parms = _BUCKET.pack(0, _LINKLAYER_ETHERNET, 0, 0, 0, rate, _limit(rate), 0, 0)
    options = attribute(_TCA_TBF_PARMS, parms) + attribute(_TCA_TBF_BURST, _NUMBER.pack(_burst(rate)))
    return _kind("tbf") + attribute(_TCA_OPTIONS, options)


def _burst(rate: int) -> int:
    """Bytes that may pass at once, at a rate in bytes per second."""
    return max(_LEAST_BURST, int(rate * _BURST_SECONDS))


def _limit(rate: int) -> int:
    """Bytes that may wait."""
    return _burst(rate) + int(rate * _LATENCY_SECONDS)


def _filter(rule: _Rule, into: int) -> bytes:
    options = attribute(_TCA_U32_CLASSID, _NUMBER.pack(1)) + attribute(_TCA_U32_SEL, rule.selector)
    if rule.diverts:
        parms = _MIRRED.pack(0, 0, _TC_ACT_STOLEN, 0, 0, _EGRESS_REDIRECT, into)
        action = attribute(_TCA_ACT_KIND, b"mirred\0") + attribute(
            _TCA_ACT_OPTIONS, attribute(_TCA_MIRRED_PARMS, parms)
        )
        options += attribute(_TCA_U32_ACT, attribute(1, action))
    return _kind("u32") + attribute(_TCA_OPTIONS, options)
