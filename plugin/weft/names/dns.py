"""DNS as it stands on the wire: parse, ask `names`, write. Decides nothing about names.

Only what is ours is answered. Everything else, be it another name, class, opcode or type of question, is REFUSED at
once, and Docker's embedded DNS goes on to the next server of its list: so nothing of ours can break the user's DNS.
There is no recursion and no zone transfer, and no answer larger than what the asker said it takes (512 bytes over UDP
without EDNS, `_MOST_UDP` with it; the rest of it is for TCP), so there is nothing to amplify.

dnspython knows the numbers, writes names and judges the tests. What every question needs is done by hand, since 5,000 a
second leave 200 µs of a processor for each, and two thirds of these to the kernel: dnspython takes 35 µs to read a name
and 400 to write an answer, which here is the question as it came with addresses behind it (same machine, Python 3.11:
10 µs for all). An answer that is the same at every turn is kept until anything changes in the cluster: 2 µs.
"""

from __future__ import annotations

import itertools
import logging
import struct
from collections import defaultdict
from collections.abc import Callable, Collection
from itertools import accumulate
from socket import AF_INET, AF_INET6, inet_pton
from typing import NamedTuple, Protocol

import dns.exception
import dns.name
from dns.flags import AA, QR, RA, RD, TC
from dns.opcode import QUERY
from dns.rcode import BADVERS, FORMERR, NOERROR, NOTIMP, REFUSED, SERVFAIL
from dns.rdataclass import IN
from dns.rdatatype import AAAA, ANY, AXFR, IXFR, MAILA, MAILB, OPT, PTR, A

from weft.names.lookup import Asker, Kind

log = logging.getLogger(__name__)

TTL = 1
"""Seconds. A name follows its container within a fraction of one; asking again costs 0.1 ms and no network."""

_HEADER = struct.Struct("!HHHHHH")
_AFTER_ID = struct.Struct("!HHHHH")
_ID_BYTES = 2
_QUESTION = struct.Struct("!HH")
_ANSWER = struct.Struct("!HHHIH")
_RECORD = struct.Struct("!HHIH")
_OPCODE = 0x7800
_QR, _RD, _TC, _QUERY, _UNREAD, _ANSWERED = int(QR), int(RD), int(TC), int(QUERY), int(QR | RA), int(QR | AA | RA)
_NOERROR, _REFUSED, _BADVERS = int(NOERROR), int(REFUSED), int(BADVERS)
"""Of an enumeration, `&` is twenty times slower."""
_REMEMBERED = 1 << 15
"""Answers: those of some ten thousand names."""
_USUAL = 332
"""Bytes: the longest name and an EDNS record with a cookie. The answer to what is longer is not remembered."""
_LONGEST_LABEL, _LONGEST_NAME = 63, 255
_ADDRESSES: dict[int, int] = {A: AF_INET, AAAA: AF_INET6}
_KINDS: dict[int, Kind] = {A: Kind.A, AAAA: Kind.AAAA, PTR: Kind.PTR}
_REFUSED_TYPES = {ANY, AXFR, IXFR, MAILA, MAILB}
"""Questions for more than one kind of record: nobody needs them, but for making much of little."""
_LEAST_UDP = 512
_MOST_UDP = 1232
"""What passes everywhere without fragments (DNS flag day 2020)."""
_MOST = 0xFFFF
_OPT_BYTES = 11
_OUTCOMES = {_NOERROR: "answered", _REFUSED: "refused"}
_NAME = 0xC000 | _HEADER.size
"""Of each answer: a pointer to the question's (RFC 1035, 4.1.4)."""


class Question(NamedTuple):
    """What a message asks.

    :param wire: as it came, for the answer repeats it to the letter.
    :param kind: None for what is not answered, whatever the name.
    :param payload: the largest answer over UDP that the asker takes; 0 if it did not say (no EDNS).
    """

    flags: int
    text: str
    type: int
    wire: bytes
    kind: Kind | None
    payload: int
    version: int


class Resolve(Protocol):
    """See `names.lookup`, of which the first arguments are given."""

    def __call__(self, asker: Asker, question: str, kind: Kind, turn: int) -> list[str] | None: ...


def parse(wire: bytes) -> Question | None:
    """The question of a message; None for what is no question at all.

    Raises `dns.exception.DNSException` for what cannot be read, `NotImplementedError` for what is not QUERY.
    """
    if len(wire) < _HEADER.size:
        return None
    _, flags, questions, answers, authorities, additional = _HEADER.unpack_from(wire)
    if flags & _QR:  # two servers that answer each other's answers would never stop
        return None
    if flags & _OPCODE != _QUERY:
        raise NotImplementedError
    if questions != 1 or answers or authorities:
        raise dns.exception.FormError
    try:
        text, end = _name(wire, _HEADER.size)
        kind, rdclass = _QUESTION.unpack_from(wire, end)
        end += _QUESTION.size
        payload, version = _edns(wire, end) if additional else (0, 0)
    except (IndexError, struct.error):
        raise dns.exception.FormError from None
    ours = _KINDS.get(kind, Kind.OTHER) if rdclass == IN and kind not in _REFUSED_TYPES else None
    return Question(flags, text, kind, wire[_HEADER.size : end], ours, payload, version)


def _name(wire: bytes, start: int) -> tuple[str, int]:
    """The first name of a message, and where it ends. No pointer is in it, since there is nothing to point at."""
    labels, at = [], start
    while size := wire[at]:
        if size > _LONGEST_LABEL:
            raise dns.exception.FormError
        labels.append(wire[at + 1 : at + 1 + size])
        at += 1 + size
    if at + 1 - start > _LONGEST_NAME:
        raise dns.exception.FormError
    return b".".join(labels).decode("latin-1"), at + 1


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


class _Ready:
    """Answers that hold for one version of what they were looked up in, by who asks and the question.

    What is kept is bytes only: after so many other objects Python would look for cycles, for 7 ms.
    """

    def __init__(self, version: object) -> None:
        self.version = version
        self.count = 0
        self._answers: defaultdict[tuple[Asker | None, bool], dict[bytes, bytes]] = defaultdict(dict)

    def to(self, asker: Asker | None, stream: bool) -> dict[bytes, bytes]:
        return self._answers[asker, stream]


class Responder:
    """From a message's bytes to the answer's. Any thread may call."""

    def __init__(
        self, resolve: Resolve, version: Callable[[], object], note: Callable[[str], None] = lambda _: None
    ) -> None:
        """
        :param version: of all that `resolve` looks at: another as soon as any of that is another.
        :param note: told what became of each question: `answered`, `refused` or `bad`.
        """
        self._resolve = resolve
        self._version = version
        self._note = note
        self._turns = itertools.count()
        self._ready = _Ready(None)

    def respond(self, wire: bytes, asker: Asker | None, *, stream: bool = False) -> bytes | None:
        """The answer to send, if any; an asker whom nobody knows is refused. `stream`: there is no small limit."""
        ready, version = self._ready, self._version()
        if ready.version != version or ready.count >= _REMEMBERED:  # forgetting all is what takes no time
            ready = self._ready = _Ready(version)
        answers, message = ready.to(asker, stream), wire[_ID_BYTES:]
        reply = answers.get(message)
        if reply is None:
            reply, lasts = self._response(wire, asker, stream)
            if reply is None:
                return None
            if lasts and len(wire) <= _USUAL:
                answers[message] = reply
                ready.count += 1
        self._note(_OUTCOMES.get(reply[1] & 0xF, "bad"))
        return wire[:_ID_BYTES] + reply

    def _response(self, wire: bytes, asker: Asker | None, stream: bool) -> tuple[bytes | None, bool]:
        """All of the answer behind the id; and whether it is the same next time, unless something changes."""
        try:
            question = parse(wire)
        except NotImplementedError:
            return _bare(wire, NOTIMP), False
        except dns.exception.DNSException:
            return _bare(wire, FORMERR), False
        if question is None:
            return None, False
        try:
            return self._answer(question, asker, stream)
        except Exception:
            log.exception("answering a question for names met a bug")
            return _bare(wire, SERVFAIL), False

    def _answer(self, question: Question, asker: Asker | None, stream: bool) -> tuple[bytes, bool]:
        if question.version:
            return _render(question, _BADVERS), True
        if asker is not None and question.kind is not None:
            found = self._resolve(asker, question.text, question.kind, next(self._turns))
            if found is not None:
                limit = _MOST if stream else min(question.payload or _LEAST_UDP, _MOST_UDP)
                return _render_found(question, found, limit), len(found) < 2
        return _render(question, _REFUSED), True


def _render_found(question: Question, found: Collection[str], limit: int) -> bytes:
    """As many of what was found as the limit lets through."""
    answers = [_record(question, text) for text in found]
    room = limit - _HEADER.size - len(question.wire) - (_OPT_BYTES if question.payload else 0)
    ends = accumulate(map(len, answers))
    fitting = [answer for answer, end in zip(answers, ends, strict=True) if end <= room]
    return _render(question, _NOERROR, fitting, cut=len(fitting) < len(answers))


def _record(question: Question, text: str) -> bytes:
    family = _ADDRESSES.get(question.type)
    data = inet_pton(family, text) if family else dns.name.from_text(text).to_wire() or b""
    return _ANSWER.pack(_NAME, question.type, IN, TTL, len(data)) + data


def _render(question: Question, code: int, answers: Collection[bytes] = (), *, cut: bool = False) -> bytes:
    flags = _ANSWERED | question.flags & _RD | (_TC if cut else 0) | code & 0xF
    edns = b"\0" + _RECORD.pack(OPT, _MOST_UDP, code >> 4 << 24, 0) if question.payload else b""
    counts = _AFTER_ID.pack(flags, 1, len(answers), 0, 1 if edns else 0)
    return b"".join((counts, question.wire, *answers, edns))


def _bare(wire: bytes, code: int) -> bytes:
    """An answer to what could not be read, but for its header."""
    flags = int.from_bytes(wire[2:4], "big")
    return _AFTER_ID.pack(_UNREAD | flags & (_RD | _OPCODE) | code, 0, 0, 0, 0)
