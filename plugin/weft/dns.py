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
from collections.abc import Collection
from dataclasses import dataclass
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
_START = struct.Struct("!HH")
_QUESTION = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")
_OPCODE = 0x7800
_QR, _RD = int(QR), int(RD)
"""Of an enumeration, `&` is twenty times slower."""
_REMEMBERED = 1 << 15
"""Questions, and answers: those of some ten thousand names."""
_REFUSALS = 1 << 12
_USUAL = 320
"""Bytes behind the header: the longest name and an EDNS record with a cookie. What is longer is not remembered."""
_KINDS: dict[int, Kind] = {A: Kind.A, AAAA: Kind.AAAA, PTR: Kind.PTR}
_REFUSED_TYPES = {ANY, AXFR, IXFR, MAILA, MAILB}
"""Questions for more than one kind of record: nobody needs them, but for making much of little."""
_LEAST_UDP = 512
_MOST_UDP = 1232
"""What passes everywhere without fragments (DNS flag day 2020)."""
_MOST = 0xFFFF
_OPT_BYTES = 11
_RECORD_BYTES = {Kind.A: 16, Kind.AAAA: 28}
"""Of an answer whose name is a pointer to the question's."""


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What a message asks: the same object for the same bytes, as far as they are remembered.

    :param size: bytes of it on the wire.
    :param kind: None for what is not answered, whatever the name.
    :param payload: the largest answer over UDP that the asker takes; 0 if it did not say (no EDNS).
    """

    name: dns.name.Name
    text: str
    type: int
    rdclass: int
    size: int
    kind: Kind | None
    payload: int
    version: int


class Query(NamedTuple):
    id: int
    flags: int
    question: Question


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
    if flags & _QR:  # two servers that answer each other's answers would never stop
        return None
    if flags & _OPCODE != QUERY:
        raise NotImplementedError
    if questions != 1 or answers or authorities:
        raise dns.exception.FormError
    body = wire[_HEADER.size :]
    question = _question if len(body) <= _USUAL else _question.__wrapped__
    return Query(identifier, flags, question(body, bool(additional)))


@lru_cache(maxsize=_REMEMBERED)
def _question(body: bytes, has_more: bool) -> Question:
    """The question in what follows the header. The same ones come all the time, and parsing is dear."""
    name, used = dns.name.from_wire(body, 0)
    try:
        kind, rdclass = _QUESTION.unpack_from(body, used)
        payload, version = _edns(body, used + _QUESTION.size) if has_more else (0, 0)
    except struct.error:
        raise dns.exception.FormError from None
    text = b".".join(name.labels[:-1]).decode("latin-1")
    ours = _KINDS.get(kind, Kind.OTHER) if rdclass == IN and kind not in _REFUSED_TYPES else None
    return Question(name, text, kind, rdclass, used + _QUESTION.size, ours, payload, version)


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
        question = query.question
        if question.version:
            return _reply(query, _render(question, BADVERS, _MOST_UDP))
        if asker is not None and question.kind is not None:
            found = self._resolve(asker, question.text, question.kind, next(self._turns))
            if found is not None:
                limit = _MOST if stream else min(question.payload or _LEAST_UDP, _MOST_UDP)
                return _reply(query, _rendered(question, tuple(found), limit))
        return _reply(query, _refusal(question))


def _reply(query: Query, body: bytes) -> bytes:
    """A rendered answer as one to just this query."""
    flags = int.from_bytes(body[2:4], "big") | query.flags & _RD
    return _START.pack(query.id, flags) + body[_START.size :]


@lru_cache(maxsize=_REFUSALS)
def _refusal(question: Question) -> bytes:
    return _render(question, REFUSED, _MOST_UDP)


@lru_cache(maxsize=_REMEMBERED)
def _rendered(question: Question, found: tuple[str, ...], limit: int) -> bytes:
    kind = question.kind or Kind.OTHER
    records = [_record(kind, text) for text in found]
    if kind not in _RECORD_BYTES:
        return _render(question, NOERROR, limit, records=records)
    room = limit - _HEADER.size - question.size - (_OPT_BYTES if question.payload else 0)
    fitting = records[: room // _RECORD_BYTES[kind]]
    return _render(question, NOERROR, limit, records=fitting, cut=len(fitting) < len(records))


def _render(
    question: Question, code: int, limit: int, *, records: Collection[dns.rdata.Rdata] = (), cut: bool = False
) -> bytes:
    renderer = dns.renderer.Renderer(0, QR | AA | RA | (TC if cut else 0) | code & 0xF, limit)
    renderer.add_question(question.name, question.type, question.rdclass)
    if records:
        answers = dns.rdataset.from_rdata_list(TTL, records)
        renderer.add_rdataset(dns.renderer.ANSWER, question.name, answers, want_shuffle=False)
    if question.payload:
        renderer.add_edns(0, code >> 4 << 24, _MOST_UDP)
    renderer.write_header()
    return bytes(renderer.get_wire())


def _bare(wire: bytes, code: int) -> bytes:
    """An answer to what could not be read, but for its header."""
    identifier, flags = _START.unpack_from(wire)
    return _HEADER.pack(identifier, QR | RA | flags & (RD | _OPCODE) | code, 0, 0, 0, 0)


@lru_cache(maxsize=10_000)
def _record(kind: Kind, text: str) -> dns.rdata.Rdata:
    match kind:
        case Kind.A:
            return dns.rdtypes.IN.A.A(IN, A, text)
        case Kind.AAAA:
            return dns.rdtypes.IN.AAAA.AAAA(IN, AAAA, text)
    return dns.rdtypes.ANY.PTR.PTR(IN, PTR, dns.name.from_text(text))
