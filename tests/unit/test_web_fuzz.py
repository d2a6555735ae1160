"""Whatever comes to the listener: an answer or an end, never a bug, and the next client is served."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.test_web import Site, make_site

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of two of the long values

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PRI", "get", "G\tT", ""]
PATHS = [
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/stream",
    "/state",
    "*",
    "http://localhost/metrics",
    "//evil.example/",
]
NAMES = [
    *("Host", "Content-Length", "Transfer-Encoding", "Connection", "Expect", "Accept", "Range", "X-Forwarded-For"),
    *("Forwarded", "Upgrade", "Cookie", "Authorization", "If-None-Match", "Accept-Encoding", "X\x00Y", ""),
]
VALUES = [
    *(
        "localhost",
        "127.0.0.1:1",
        "evil.example",
        "[::1",
        "[::1]:x",
        "@",
        "0",
        "5",
        "-1",
        "1e9",
        "99999999999999999999",
    ),
    *(
        "chunked",
        "gzip, chunked",
        "100-continue",
        "close",
        "bytes=0-",
        "*/*;q=x",
        "application/openmetrics-text;version=x",
    ),
    *("\u00ff" * 9, "x" * 17_000, 'for="["', "%00"),
]

texts = st.text(st.characters(max_codepoint=255), max_size=40)
lines = st.builds(
    lambda method, path, version: f"{method} {path} {version}\r\n",
    st.sampled_from(METHODS) | texts,
    st.sampled_from(PATHS) | texts.map(lambda text: f"/{text}") | st.just("/" + "%ff" * 50),
    st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/9.9", "HTTP/1.1.1", "", "ICAP/1.0"]),
)
headers = st.lists(
    st.builds(
        lambda name, value: f"{name}: {value}\r\n",
        st.sampled_from(NAMES) | texts,
        st.sampled_from(VALUES) | texts,
    ),
    max_size=6,
)
bodies = st.sampled_from(["", "x", "5\r\nhello\r\n0\r\n\r\n", "ffffffffff\r\n", "0\r\n\r\n", "{}"]) | texts
requests = st.builds(
    lambda line, host, given, body: "".join([line, host, *given, "\r\n", body]).encode("latin-1", "replace"),
    lines,
    st.sampled_from(["Host: localhost\r\n", ""]),
    headers,
    bodies,
)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    yield from make_site()


class Judge(logging.Handler):
    """Keeps what is logged as a bug, by weft or by waitress."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    made = Judge()
    logging.getLogger().addHandler(made)
    yield made
    logging.getLogger().removeHandler(made)


def converse(site: Site, text: bytes, *, end: bool) -> bytes:
    """What comes back, at its beginning."""
    with site.open(text) as client:
        if end:
            with suppress(OSError):  # it may have been refused and reset before its end
                client.shutdown(socket.SHUT_WR)
        client.settimeout(0.05 if not end else 5)
        try:
            return client.recv(65536)
        except (TimeoutError, ConnectionError):
            return b""


def check(site: Site, judge: Judge, answer: bytes) -> None:
    if answer.startswith(b"HTTP/"):
        status = int(answer.split()[1])
        assert status in (100, 200, 400, 404, 405, 413, 414, 417, 421, 431, 501, 503), answer
    assert b"Traceback" not in answer
    assert not judge.said
    assert site.ask("/healthz").status == 200


unhurried = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@unhurried
@given(text=requests, end=st.booleans())
def test_requests_of_any_form(site: Site, judge: Judge, text: bytes, end: bool) -> None:
    check(site, judge, converse(site, text, end=end))


@unhurried
@given(text=requests, cut=st.integers(0, 200), end=st.booleans())
def test_half_requests(site: Site, judge: Judge, text: bytes, cut: int, end: bool) -> None:
    check(site, judge, converse(site, text[:cut], end=end))


@unhurried
@given(text=st.binary(max_size=300), end=st.booleans())
def test_garbage(site: Site, judge: Judge, text: bytes, end: bool) -> None:
    check(site, judge, converse(site, text + b"\r\n\r\n", end=end))


@settings(parent=unhurried, max_examples=40)
@given(first=requests, second=requests)
def test_several_requests_at_once(site: Site, judge: Judge, first: bytes, second: bytes) -> None:
    check(site, judge, converse(site, first + second + first, end=False))
