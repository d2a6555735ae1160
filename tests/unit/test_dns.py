"""The wire: what is answered byte for byte, over real sockets on the loopback interface; and nonsense."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.query
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weft.names.dns import TTL, Responder, parse
from weft.names.lookup import Asker, Kind
from weft.names.queues import bind
from weft.names.resolver import DnsServer, Limiter

ADDRESSES = {
    "web1": ["10.77.0.3"],
    "many": [f"10.77.{i // 250}.{i % 250}" for i in range(1000)],
    "none": [],
}
SOMEBODY = Asker.on({4096: "app"})


def resolve(asker: Asker, question: str, kind: Kind, turn: int) -> list[str] | None:
    if kind is Kind.PTR:
        return {"3.0.77.10.in-addr.arpa": ["web1.app"], "4.0.77.10.in-addr.arpa": ["x" * 70]}.get(question)
    found = ADDRESSES.get(question.lower())
    if question == "bug":
        raise RuntimeError("a bug")
    return found if kind is Kind.A or found is None else []


RESPONDER = Responder(resolve, lambda: 1)


def ask(query: dns.message.Message, *, asker: Asker | None = SOMEBODY, stream: bool = False) -> dns.message.Message:
    wire = RESPONDER.respond(query.to_wire(), asker, stream=stream)
    assert wire is not None
    reply = dns.message.from_wire(wire)
    assert reply.id == query.id
    assert not reply.question or query.is_response(reply)
    return reply


def question(name: str, kind: str = "A", **settings: object) -> dns.message.Message:
    return dns.message.make_query(name, kind, **settings)  # type: ignore[arg-type]


def test_an_answer() -> None:
    reply = ask(question("WeB1"))
    assert [str(rrset) for rrset in reply.answer] == [f"WeB1. {TTL} IN A 10.77.0.3"]
    assert reply.flags & (dns.flags.AA | dns.flags.RA | dns.flags.RD | dns.flags.TC) == 0x0580
    assert reply.edns == -1


@pytest.mark.parametrize(
    ("name", "kind", "code", "count"),
    [
        ("web1", "AAAA", dns.rcode.NOERROR, 0),
        ("web1", "MX", dns.rcode.NOERROR, 0),
        ("web1", "HTTPS", dns.rcode.NOERROR, 0),
        ("none", "A", dns.rcode.NOERROR, 0),
        ("3.0.77.10.in-addr.arpa", "PTR", dns.rcode.NOERROR, 1),
        ("example.com", "A", dns.rcode.REFUSED, 0),
        ("example.com", "AAAA", dns.rcode.REFUSED, 0),
        (".", "NS", dns.rcode.REFUSED, 0),
        ("web1", "ANY", dns.rcode.REFUSED, 0),
        ("web1", "AXFR", dns.rcode.REFUSED, 0),
        ("web1", "IXFR", dns.rcode.REFUSED, 0),
        ("bug", "A", dns.rcode.SERVFAIL, 0),
        ("4.0.77.10.in-addr.arpa", "PTR", dns.rcode.SERVFAIL, 0),
    ],
)
def test_codes(name: str, kind: str, code: int, count: int) -> None:
    reply = ask(question(name, kind))
    assert (reply.rcode(), sum(map(len, reply.answer))) == (code, count)


def test_an_asker_whom_nobody_knows_is_refused() -> None:
    assert ask(question("web1"), asker=None).rcode() == dns.rcode.REFUSED


def test_other_classes_and_opcodes_are_refused() -> None:
    assert ask(question("version.bind", "TXT", rdclass="CH")).rcode() == dns.rcode.REFUSED
    update = question("web1")
    update.set_opcode(dns.opcode.NOTIFY)
    assert ask(update).rcode() == dns.rcode.NOTIMP
    assert not ask(update).question


def test_edns() -> None:
    reply = ask(question("web1", use_edns=0, payload=4096))
    assert (reply.edns, reply.payload, len(reply.answer)) == (0, 1232, 1)
    assert ask(question("web1", use_edns=1)).rcode() == dns.rcode.BADVERS


@pytest.mark.parametrize(("payload", "most"), [(0, 512), (512, 512), (100, 512), (1232, 1232), (65535, 1232)])
def test_a_large_answer_is_truncated_to_what_fits(payload: int, most: int) -> None:
    query = question("many", use_edns=0, payload=payload) if payload else question("many")
    wire = RESPONDER.respond(query.to_wire(), SOMEBODY)
    assert wire is not None
    assert most - 28 < len(wire) <= most
    reply = dns.message.from_wire(wire)
    assert reply.flags & dns.flags.TC
    addresses = [rdata.to_text() for rdata in reply.answer[0]]
    assert addresses == ADDRESSES["many"][: len(addresses)]


def test_over_tcp_it_is_whole_and_in_order() -> None:
    reply = ask(question("many"), stream=True)
    assert not reply.flags & dns.flags.TC
    assert [rdata.to_text() for rdata in reply.answer[0]] == ADDRESSES["many"]


def header(*, flags: int = 0x0100, counts: tuple[int, int, int, int] = (1, 0, 0, 0)) -> bytes:
    return struct.pack("!HHHHHH", 4711, flags, *counts)


@pytest.mark.parametrize(
    "wire",
    [
        header(),
        header() + b"\x04web",
        header() + b"\x04web1\x00\x00\x01",
        header() + b"\xc0\x0c\x00\x01\x00\x01",
        header() + b"\x40web1\x00\x00\x01\x00\x01",
        header() + b"\x3f" + b"a" * 63 + (b"\x3f" + b"a" * 63) * 4 + b"\x00\x00\x01\x00\x01",
        header(counts=(0, 0, 0, 0)),
        header(counts=(2, 0, 0, 0)) + b"\x04web1\x00\x00\x01\x00\x01" * 2,
        header(counts=(1, 1, 0, 0)) + b"\x04web1\x00\x00\x01\x00\x01",
        header(counts=(1, 0, 0, 1)) + b"\x04web1\x00\x00\x01\x00\x01\x00\x00\x29\x04",
        header(counts=(1, 0, 0, 1)) + b"\x04web1\x00\x00\x01\x00\x01\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x09",
    ],
)
def test_what_cannot_be_read_gets_a_format_error_with_its_id(wire: bytes) -> None:
    reply = RESPONDER.respond(wire, SOMEBODY)
    assert reply == struct.pack("!HHHHHH", 4711, 0x8181, 0, 0, 0, 0)


@pytest.mark.parametrize("wire", [b"", b"\x00", header()[:11], header(flags=0x8180) + b"\x04web1\x00\x00\x01\x00\x01"])
def test_no_question_gets_no_answer(wire: bytes) -> None:
    assert RESPONDER.respond(wire, SOMEBODY) is None


def as_labels(texts: list[bytes]) -> bytes:
    return b"".join(bytes([len(text)]) + text for text in texts) + b"\x00"


@settings(max_examples=1000, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.lists(st.binary(min_size=1, max_size=70), max_size=6).map(as_labels)))
@example(as_labels([b"a" * 63] * 3 + [b"a" * 61]))
@example(as_labels([b"a" * 63] * 3 + [b"a" * 62]))
@example(b"\x01a\xc0\x0c")
def test_a_name_is_read_as_dnspython_reads_it(name: bytes) -> None:
    body = name + b"\x00\x01\x00\x01"
    theirs = None
    with suppress(dns.exception.DNSException):
        read, used = dns.name.from_wire(body, 0)
        if used + 4 <= len(body):
            theirs = b".".join(read.labels[:-1])
    ours = None
    with suppress(dns.exception.DNSException):
        asked = parse(header() + body)
        ours = asked.text.encode("latin-1") if asked else None
    assert ours == theirs


VALID = question("many", use_edns=0, payload=1232).to_wire()


@settings(max_examples=2000, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=600),
        st.binary(max_size=600).map(lambda tail: header() + tail),
        st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=4)).map(
            lambda change: VALID[: change[0]] + change[1] + VALID[change[0] + len(change[1]) :]
        ),
    ),
    st.booleans(),
)
def test_nothing_that_comes_in_does_harm(wire: bytes, stream: bool) -> None:
    """No exception, no endless work, an answer that can be read, and over UDP none larger than what was asked for."""
    reply = RESPONDER.respond(wire, SOMEBODY, stream=stream)
    if reply is not None:
        message = dns.message.from_wire(reply)
        assert message.id == int.from_bytes(wire[:2], "big")
        assert message.flags & dns.flags.QR
        assert stream or len(reply) <= 1232
        if message.rcode() != dns.rcode.NOERROR:
            assert len(reply) <= len(wire) + 11


class Table:
    """What `Responder` asks; with `slow`, something changes while an answer is looked up."""

    def __init__(self) -> None:
        self.version = 0
        self.addresses = ["10.77.0.3"]
        self.asked = 0
        self.slow: Callable[[], None] = lambda: None

    def change(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.version += 1

    def resolve(self, asker: Asker, question: str, kind: Kind, turn: int) -> list[str] | None:
        self.asked += 1
        found = self.addresses[turn % len(self.addresses) :] + self.addresses[: turn % len(self.addresses)]
        self.slow()
        return found


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def addresses(table: Table) -> Callable[..., list[str]]:
    """Of the answer about web1."""
    responder = Responder(table.resolve, lambda: table.version)

    def ask(asker: Asker | None = SOMEBODY, *, name: str = "web1") -> list[str]:
        query = question(name)
        reply = dns.message.from_wire(responder.respond(query.to_wire(), asker) or b"")
        assert query.is_response(reply)
        return [rdata.to_text() for rrset in reply.answer for rdata in rrset]

    return ask


class TestAnswersAreKept:
    def test_until_something_changes(self, table: Table, addresses: Callable[..., list[str]]) -> None:
        assert [addresses(), addresses(), table.asked] == [["10.77.0.3"], ["10.77.0.3"], 1]
        table.change("10.77.0.4")
        assert addresses() == ["10.77.0.4"]

    def test_for_who_is_on_the_same_networks(self, table: Table, addresses: Callable[..., list[str]]) -> None:
        assert addresses()
        assert addresses(None) == []
        assert addresses(Asker.on({4096: "app", 4097: "db"}))
        assert addresses(Asker.on({4096: "app"}))
        assert table.asked == 2

    def test_not_if_something_changed_meanwhile(self, table: Table, addresses: Callable[..., list[str]]) -> None:
        table.slow = lambda: table.change("10.77.0.4")
        assert addresses() == ["10.77.0.3"]
        assert addresses() == ["10.77.0.4"]

    def test_not_of_another_thread_that_was_late(self, table: Table, addresses: Callable[..., list[str]]) -> None:
        """It has looked something up, then that changed, and somebody else asked for something before it went on."""

        def overtaken() -> None:
            table.slow = lambda: None
            table.change("10.77.0.4")
            assert addresses(name="web2") == ["10.77.0.4"]

        table.slow = overtaken
        assert addresses() == ["10.77.0.3"]
        assert addresses() == ["10.77.0.4"]

    def test_not_if_there_are_several_addresses(self, table: Table, addresses: Callable[..., list[str]]) -> None:
        table.change("10.77.0.4", "10.77.0.5")
        assert [addresses()[0] for _ in range(4)] == ["10.77.0.4", "10.77.0.5"] * 2

    def test_only_so_many(
        self, table: Table, addresses: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("weft.names.dns._REMEMBERED", 10)
        for number in range(25):
            assert addresses(name=f"web{number}")
        assert addresses(name="web24")
        assert table.asked == 25
        assert addresses(name="web0")
        assert table.asked == 26


def test_the_rate_of_a_source_is_limited_and_that_of_others_is_not() -> None:
    limiter = Limiter(rate=10, burst=5)
    assert [limiter.allows("a", 0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert limiter.allows("b", 0.0)
    assert [limiter.allows("a", 0.25) for _ in range(3)] == [True, True, False]
    assert [limiter.allows("a", 100.0) for _ in range(6)] == [True] * 5 + [False]


class Everybody:
    """A directory in which askers become known when a test says so."""

    def __init__(self) -> None:
        self.strangers: set[str] = set()
        self.patience = threading.Event()
        self.patience.set()

    def known(self, source: str) -> Asker | None:
        return None if source in self.strangers else SOMEBODY

    def find(self, source: str) -> Asker | None:
        self.patience.wait(5)
        return self.known(source)


@pytest.fixture
def directory() -> Everybody:
    return Everybody()


def bound() -> tuple[list[socket.socket], int]:
    """Sockets on 127.0.0.1, and their port."""
    while True:
        with suppress(OSError):
            return bind("127.0.0.1", number := random.randint(20000, 60000)), number


@pytest.fixture
def port(directory: Everybody) -> Iterator[int]:
    """Of a server on 127.0.0.1, UDP and TCP."""
    sockets, number = bound()
    server = DnsServer(RESPONDER, directory, sockets, rate=1000, burst=100)
    server.start()
    yield number
    server.stop()


def test_over_udp_and_then_tcp(port: int) -> None:
    reply, used_tcp = dns.query.udp_with_fallback(question("many"), "127.0.0.1", port=port, timeout=5)
    assert used_tcp
    assert len(reply.answer[0]) == 1000
    assert dns.query.udp(question("web1"), "127.0.0.1", port=port, timeout=5).answer


def test_several_questions_on_one_connection(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        for _ in range(3):
            dns.query.send_tcp(connection, question("web1"))
            assert dns.query.receive_tcp(connection)[0].answer


def test_nonsense_over_tcp_ends_the_connection_and_nothing_else(port: int) -> None:
    for nonsense in (b"\x00\x05hello", b"\x00\x00"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(nonsense)
            assert connection.recv(100) == b""
    assert dns.query.tcp(question("web1"), "127.0.0.1", port=port, timeout=5).answer


def test_one_source_cannot_hold_all_connections(port: int) -> None:
    held = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(DnsServer._CONNECTIONS)]
    try:
        with pytest.raises((EOFError, OSError)):
            dns.query.tcp(question("web1"), "127.0.0.1", port=port, timeout=5)
        assert dns.query.tcp(question("web1"), "127.0.0.1", port=port, timeout=5, source="127.0.0.2").answer
    finally:
        for connection in held:
            connection.close()


def test_all_sources_together_hold_only_so_many(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest gives way: forged sources keep nobody out."""
    monkeypatch.setattr(DnsServer, "_MOST_CONNECTIONS", 4)
    with ExitStack() as held:
        first, *rest = [
            held.enter_context(socket.create_connection(("127.0.0.1", port), 5, (f"127.0.0.{number}", 0)))
            for number in range(2, 6)
        ]
        assert dns.query.tcp(question("web1"), "127.0.0.1", port=port, timeout=5, source="127.0.0.9").answer
        assert first.recv(1) == b""
        for one in rest:
            dns.query.send_tcp(one, question("web1"))
            assert dns.query.receive_tcp(one)[0].answer


def test_unknown_askers_keep_nobody_waiting(port: int, directory: Everybody) -> None:
    directory.strangers.add("127.0.0.2")
    directory.patience.clear()
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as stranger:
        stranger.bind(("127.0.0.2", 0))
        stranger.settimeout(5)
        for _ in range(20):
            stranger.sendto(question("web1").to_wire(), ("127.0.0.1", port))
        assert dns.query.udp(question("web1"), "127.0.0.1", port=port, timeout=5).answer
        directory.strangers.clear()
        directory.patience.set()
        replies = [dns.message.from_wire(stranger.recv(600)) for _ in range(20)]
    assert all(reply.answer for reply in replies)


def test_a_flood_is_kept_out_and_others_are_answered(port: int, caplog: pytest.LogCaptureFixture) -> None:
    wire = question("web1").to_wire()
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as flood:
        flood.bind(("127.0.0.3", 0))
        flood.settimeout(0.2)
        for _ in range(5000):
            flood.sendto(wire, ("127.0.0.1", port))
        for _ in range(50):
            assert dns.query.udp(question("web1"), "127.0.0.1", port=port, timeout=5).answer
        assert _drain(flood) <= 2500  # the burst, and what came until the gate was shut, each second anew
        assert "asks for names too often" in caplog.text
        deadline = time.monotonic() + 5
        while True:  # the gate opens by itself
            flood.sendto(wire, ("127.0.0.1", port))
            try:
                flood.recv(600)
                break
            except TimeoutError:
                assert time.monotonic() < deadline


def test_a_flood_costs_others_nothing_on_a_machine_of_any_speed(caplog: pytest.LogCaptureFixture) -> None:
    """Here it answers 500 a second, which the rate that a source may have is far above."""

    def slowly(asker: Asker, question: str, kind: Kind, turn: int) -> list[str] | None:
        time.sleep(0.002)
        return resolve(asker, question, kind, turn)

    sockets, number = bound()
    server = DnsServer(Responder(slowly, lambda: 1), Everybody(), sockets)
    wire, over = question("web1").to_wire(), threading.Event()

    def flood() -> None:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as flooding:
            flooding.bind(("127.0.0.3", 0))
            while not over.is_set():
                flooding.sendto(wire, ("127.0.0.1", number))

    flooder = threading.Thread(target=flood)
    server.start()
    flooder.start()
    try:
        for _ in range(100):
            assert dns.query.udp(question("web1"), "127.0.0.1", port=number, timeout=5).answer
        deadline = time.monotonic() + 20
        while "127.0.0.3 asks for names too often" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        over.set()
        flooder.join()
        server.stop()
    assert "127.0.0.1 asks" not in caplog.text


def _drain(sock: socket.socket) -> int:
    """How many answers are there."""
    count = 0
    try:
        while sock.recv(600):
            count += 1
    except TimeoutError:
        pass
    return count
