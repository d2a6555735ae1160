"""DNS as it stands on the wire: parse, ask `names`, write. Decides nothing about names.

Only what is ours is answered. Everything else, be it another name, class, opcode or type of question, is REFUSED at
once, and Docker's embedded DNS goes on to the next server of its list: so nothing of ours can break the user's DNS.
There is no recursion and no zone transfer, and no answer larger than what the asker said it takes (512 bytes over UDP
without EDNS, `_MOST_UDP` with it; the rest of it is for TCP), so there is nothing to amplify.

dnspython parses names and renders messages; its `Message` is not used, since what one question needs of it is a
quarter of the work.
"""

from __future__ import annotations

import itertools
import logging
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple, Protocol

import dns.exception
import dns.name
import dns.rdata
import dns.rdataset
import dns.rdtypes.ANY.PTR
import dns.rdtypes.IN.A
import dns.rdtypes.IN.AAAA
import dns.renderer
from dns.flags import AA, QR, RA, RD, TC
from dns.opcode import QUERY
from dns.rcode import BADVERS, FORMERR, NOERROR, NOTIMP, REFUSED, SERVFAIL
from dns.rdataclass import IN
from dns.rdatatype import AAAA, ANY, AXFR, IXFR, MAILA, MAILB, OPT, PTR, A

from weft.names import Asker, Kind

log = logging.getLogger(__name__)

TTL = 1
"""Seconds. A name follows its container within a fraction of one; asking again costs 0.1 ms and no network."""

_HEADER = struct.Struct("!HHHHHH")
_QUESTION = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")
_OPCODE = 0x7800
_KINDS: dict[int, Kind] = {A: Kind.A, AAAA: Kind.AAAA, PTR: Kind.PTR}
_REFUSED_TYPES = {ANY, AXFR, IXFR, MAILA, MAILB}
"""Questions for more than one kind of record: nobody needs them, but for making much of little."""
_LEAST_UDP = 512
_MOST_UDP = 1232
"""What passes everywhere without fragments (DNS flag day 2020)."""
_OPT_BYTES = 11
_RECORD_BYTES = {Kind.A: 16, Kind.AAAA: 28}
"""Of an answer whose name is a pointer to the question's."""


class Query(NamedTuple):
    """What a message asks. `payload` is the largest answer over UDP that the asker takes; 0 if it did not say."""

    id: int
    flags: int
    name: dns.name.Name
    type: int
    rdclass: int
    payload: int
    version: int

    @property
    def text(self) -> str:
        return b".".join(self.name.labels[:-1]).decode("latin-1")


class Resolve(Protocol):
    """See `names.lookup`, of which the first arguments are given."""

    def __call__(self, asker: Asker, question: str, kind: Kind, turn: int) -> list[str] | None: ...


def parse(wire: bytes) -> Query | None:
    """The question of a message; None for what is no question at all.

    Raises `dns.exception.DNSException` for what cannot be read, `NotImplementedError` for what is not QUERY.
    """
    if len(wire) < _HEADER.size:
        return None
    identifier, flags, questions, answers, authorities, additional = _HEADER.unpack_from(wire)
    if flags & QR:  # two servers that answer each other's answers would never stop
        return None
    if flags & _OPCODE != QUERY:
        raise NotImplementedError
    if questions != 1 or answers or authorities:
        raise dns.exception.FormError
    name, used = dns.name.from_wire(wire, _HEADER.size)
    try:
        at = _HEADER.size + used
        kind, rdclass = _QUESTION.unpack_from(wire, at)
        payload, version = _edns(wire, at + _QUESTION.size) if additional else (0, 0)
    except struct.error:
        raise dns.exception.FormError from None
    return Query(identifier, flags, name, kind, rdclass, payload, version)


def _edns(wire: bytes, at: int) -> tuple[int, int]:
    """Size and version in an OPT record, which must be the first additional one to count (RFC 6891)."""
    if wire[at : at + 1] != b"\0":
        return 0, 0
    kind, payload, flags, size = _RECORD.unpack_from(wire, at + 1)
    if kind != OPT:
        return 0, 0
    if at + 1 + _RECORD.size + size > len(wire):
        raise dns.exception.FormError
    return max(payload, _LEAST_UDP), flags >> 16 & 0xFF


class Responder:
    """From a message's bytes to the answer's."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._turns = itertools.count()

    def respond(self, wire: bytes, asker: Asker | None, *, stream: bool = False) -> bytes | None:
        """The answer to send, if any; an asker whom nobody knows is refused. `stream`: there is no small limit."""
        try:
            query = parse(wire)
        except NotImplementedError:
            return _bare(wire, NOTIMP)
        except dns.exception.DNSException:
            return _bare(wire, FORMERR)
        if query is None:
            return None
        try:
            return self._answer(query, asker, stream)
        except Exception:
            log.exception("answering a question for names met a bug")
            return _bare(wire, SERVFAIL)

    def _answer(self, query: Query, asker: Asker | None, stream: bool) -> bytes:
        if query.version:
            return _render(query, BADVERS)
        if asker is None or query.rdclass != IN or query.type in _REFUSED_TYPES:
            return _render(query, REFUSED)
        kind = _KINDS.get(query.type, Kind.OTHER)
        found = self._resolve(asker, query.text, kind, next(self._turns))
        if found is None:
            return _render(query, REFUSED)
        return _render(query, NOERROR, [_record(kind, text) for text in found], kind, stream)


def _render(
    query: Query,
    code: int,
    records: Iterable[dns.rdata.Rdata] = (),
    kind: Kind = Kind.OTHER,
    stream: bool = False,
) -> bytes:
    limit = 0xFFFF if stream else min(query.payload or _LEAST_UDP, _MOST_UDP)
    renderer = dns.renderer.Renderer(query.id, QR | AA | RA | query.flags & RD | code & 0xF, limit)
    renderer.add_question(query.name, query.type, query.rdclass)
    if records := list(records):
        room = limit - len(renderer.get_wire()) - (_OPT_BYTES if query.payload else 0)
        fitting = records[: room // _RECORD_BYTES[kind]] if kind in _RECORD_BYTES else records
        if len(fitting) < len(records):
            renderer.flags |= TC
        try:
            if fitting:
                answers = dns.rdataset.from_rdata_list(TTL, fitting)
                renderer.add_rdataset(dns.renderer.ANSWER, query.name, answers, want_shuffle=False)
        except dns.exception.TooBig:
            renderer.flags |= TC
    if query.payload:
        renderer.add_edns(0, code >> 4 << 24, _MOST_UDP)
    renderer.write_header()
    return bytes(renderer.get_wire())


def _bare(wire: bytes, code: int) -> bytes:
    """An answer to what could not be read, but for its header."""
    identifier, flags = struct.unpack_from("!HH", wire)
    return _HEADER.pack(identifier, QR | RA | flags & (RD | _OPCODE) | code, 0, 0, 0, 0)


@lru_cache(maxsize=10_000)
def _record(kind: Kind, text: str) -> dns.rdata.Rdata:
    match kind:
        case Kind.A:
            return dns.rdtypes.IN.A.A(IN, A, text)
        case Kind.AAAA:
            return dns.rdtypes.IN.AAAA.AAAA(IN, AAAA, text)
    return dns.rdtypes.ANY.PTR.PTR(IN, PTR, dns.name.from_text(text))
