"""The opt-in listener: who may ask, what every answer has, and what bad clients cost the others."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse

import pytest
from flask import Response

from tests.netns.plugin import wait_until
from weft.config import Place
from weft.errors import KernelError
from weft.web import listener
from weft.web.listener import Listener, Streams, create_web

LOOPBACK = Place("127.0.0.1", 0)


@dataclass
class FakeHealth:
    stuck_parts: list[str] = field(default_factory=list)
    hindrances: list[str] = field(default_factory=list)

    def stuck(self) -> Iterator[str]:
        yield from self.stuck_parts

    def hindered(self) -> Iterator[str]:
        yield from self.hindrances


@dataclass
class Site:
    """A listener and what is behind it."""

    health: FakeHealth
    streams: Streams
    listener: Listener
    released: threading.Event

    def ask(self, path: str, method: str = "GET", host: str = "localhost:1") -> HTTPResponse:
        """The answer, read to its end."""
        with closing(HTTPConnection("127.0.0.1", self.listener.port, timeout=10)) as connection:
            connection.request(method, path, headers={"Host": host})
            response = connection.getresponse()
            response.text = response.read().decode()  # type: ignore[attr-defined]
            return response

    def open(self, text: bytes = b"") -> socket.socket:
        """A connection on which something was sent."""
        client = socket.create_connection(("127.0.0.1", self.listener.port), timeout=10)
        client.sendall(text)
        return client


@pytest.fixture
def site() -> Iterator[Site]:
    yield from make_site()


def make_site() -> Iterator[Site]:
    """One that ends with the generator."""
    health, streams, proceed = FakeHealth(), Streams(), threading.Event()
    app = create_web(health, lambda: b"up 1\n", {"host-a"})

    @app.get("/stream")
    def stream() -> Response:
        def events() -> Iterator[str]:
            yield "data: first\n\n"
            while not proceed.wait(0.05):
                yield ": still here\n\n"
            yield "data: last\n\n"

        return streams.respond(events())

    @app.get("/bug")
    def bug() -> Response:
        raise ZeroDivisionError("secret")

    @app.get("/away")
    def away() -> Response:
        raise KernelError("look", 1)

    listener = Listener(app, LOOPBACK)
    listener.start()
    wait_until(lambda: listener.port, "the listener")
    yield Site(health, streams, listener, proceed)
    proceed.set()
    listener.stop()


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9789", "LOCALHOST.", "host-a:1", "127.0.0.1:9789", "192.0.2.7", "[::1]:9789"]
)
def test_a_request_that_names_this_host_is_answered(site: Site, host: str) -> None:
    assert site.ask("/healthz", host=host).status == 200


@pytest.mark.parametrize("host", ["", "evil.example", "127.0.0.1.evil.example", "host-a.evil.example", "[::1", "a b"])
def test_a_request_for_another_name_is_refused(site: Site, host: str) -> None:
    """As from a page whose name was made to point here."""
    assert site.ask("/healthz", host=host).status in (400, 421)


def test_a_request_without_a_name_is_refused(site: Site) -> None:
    with site.open(b"GET /healthz HTTP/1.0\r\n\r\n") as client:
        assert client.recv(100).startswith(b"HTTP/1.0 421 ")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_nothing_can_be_changed(site: Site, method: str) -> None:
    refused = site.ask("/healthz", method)
    assert refused.status == 405
    assert refused.getheader("Allow") == "GET, HEAD"


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/nothing", "/bug", "/away", "//healthz"])
def test_every_answer_has_the_headers_that_protect_a_browser(site: Site, path: str) -> None:
    headers = site.ask(path).headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"


def test_head_has_no_body(site: Site) -> None:
    assert site.ask("/metrics", "HEAD").status == 200
    assert site.ask("/stream", "HEAD").status == 200


def test_an_error_shows_nothing_of_the_inside(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    answer = site.ask("/bug")
    assert answer.status == 500
    assert "secret" not in answer.text  # type: ignore[attr-defined]
    assert "a bug in weft: GET /bug" in caplog.text
    assert site.ask("/away").status == 503
    assert site.ask("/nothing").status == 404


def test_liveness_and_readiness_differ(site: Site) -> None:
    """An outage elsewhere is no reason to end this process, but one to start containers elsewhere."""
    assert (site.ask("/healthz").status, site.ask("/readyz").status) == (200, 200)
    site.health.hindrances = ["the store: away"]
    assert (site.ask("/healthz").status, site.ask("/readyz").status) == (200, 503)
    site.health.stuck_parts = ["the agent"]
    answer = site.ask("/healthz")
    assert answer.status == 503
    assert '"the agent"' in answer.text  # type: ignore[attr-defined]


def test_a_stream_is_sent_as_it_comes(site: Site) -> None:
    with site.open(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
        response = HTTPResponse(client)
        response.begin()
        assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        assert response.readline() == b"data: first\n"
        site.released.set()
        assert response.read().endswith(b"data: last\n\n")


def test_streams_are_few_and_leave_the_rest_alone(site: Site) -> None:
    with ExitStack() as stack:
        for _ in range(listener.STREAMS):
            client = stack.enter_context(site.open(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n"))
            assert client.recv(15) == b"HTTP/1.1 200 OK"
        refused = site.ask("/stream")
        assert refused.status == 503
        assert refused.getheader("Retry-After")
        assert site.ask("/healthz").status == 200
    wait_until(lambda: site.ask("/stream", "HEAD").status == 200, "room for a stream after the clients have gone")


def test_half_a_request_holds_no_thread(site: Site) -> None:
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(site.open(b"GET /healthz HTTP/1.1\r\nHost: local"))
        assert site.ask("/healthz").status == 200


def test_slow_clients_make_room_for_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there may be connections, and each sends a byte again and again."""
    monkeypatch.setattr(listener, "_LIFE_SECONDS", 1)
    with ExitStack() as stack:
        clients = [stack.enter_context(site.open(b"GET /heal")) for _ in range(150)]
        done = threading.Event()

        def dribble() -> None:
            while not done.wait(0.1):
                for client in clients:
                    with suppress(OSError):
                        client.send(b"x")

        thread = threading.Thread(target=dribble)
        thread.start()
        stack.callback(thread.join)
        stack.callback(done.set)
        assert site.ask("/healthz").status == 200


def test_a_client_that_does_not_read_holds_no_thread(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(site.open(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50))
        assert site.ask("/healthz").status == 200


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", b"431"),
        (b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n", b"413"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
    ],
)
def test_what_is_no_request_is_refused(site: Site, text: bytes, status: bytes) -> None:
    with site.open(text) as client:
        assert client.recv(100).split()[1] == status


def test_a_place_that_is_taken_is_said_and_had_later(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "_RETRY_SECONDS", 0.05)
    place = Place("127.0.0.1", site.listener.port)
    late = Listener(create_web(site.health, bytes, ()), place)
    late.start()
    wait_until(lambda: late.problem, "what is wrong")
    assert late.problem == f"cannot listen on {place} (WEFT_LISTEN): Address already in use"
    assert caplog.text.count("nobody can read health and metrics") == 1
    site.listener.stop()
    wait_until(lambda: late.port, "the listener", 10)
    wait_until(lambda: not late.problem, "no problem")
    late.stop()


def test_an_address_that_others_reach_is_warned_of(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener(create_web(site.health, bytes, ()), Place("192.0.2.1", 0))
    listener.start()
    listener.stop()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    for shown in ("without a password", "health", "metrics", "page", "hosts", "containers", "events"):
        assert shown in warnings[0]


def test_stopping_ends_streams_and_threads(site: Site) -> None:
    with site.open(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        began = time.monotonic()
        site.listener.stop()
        assert time.monotonic() - began < 5
        while client.recv(1000):
            pass
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("waitress")], "threads to end")
