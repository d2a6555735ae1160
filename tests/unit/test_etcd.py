"""How a watch reads etcd's messages, by messages that a real etcd gives only at bad moments."""

from __future__ import annotations

import json
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from weft.errors import StoreError
from weft.store import Changes, Entry, Snapshot
from weft.store.etcd import EtcdStore, Moment
from weft.store.gateway import Access, Away, Gateway, Json

ROOT = "/weft/v1/"


class Stream:
    """An answer that goes on, as requests reads it line by line."""

    def __init__(self, lines: list[Json]) -> None:
        self.raw = self
        self._lines = lines

    def iter_lines(self, chunk_size: int) -> Iterator[bytes]:
        return (json.dumps(line).encode() for line in self._lines)

    def shutdown(self) -> None:
        """There is no connection."""


class ScriptedGateway(Gateway):
    """One key at revision 1; watches that say what the test wants, and the requests that they came with."""

    def __init__(self, *streams: list[Json]) -> None:
        super().__init__(["http://a:1", "http://b:1"], Access(), "/weft")
        self.started: list[tuple[str, int]] = []
        self._streams = iter(streams)

    def ask(self, endpoint: str, path: str, body: Json, seconds: float = 1.5) -> Json:
        return {"header": {"revision": "1"}, "kvs": [kv("k", 1)]}

    @contextmanager
    def stream(self, endpoint: str, path: str, body: Json) -> Iterator[Any]:
        self.started.append((endpoint, int(body["create_request"]["start_revision"])))
        yield Stream(next(self._streams))


def kv(key: str, revision: int) -> Json:
    return {"key": b64encode((ROOT + key).encode()).decode(), "value": "", "mod_revision": str(revision)}


def message(revision: int, *kvs: Json, **more: Any) -> Json:
    return {"result": {"header": {"revision": str(revision)}, "events": [{"kv": one} for one in kvs], **more}}


@pytest.fixture
def news(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the news of a watch whose gateway is scripted."""
    monkeypatch.setattr("weft.store.etcd._PAUSE_SECONDS", 0.0)

    def follow(gateway: Gateway) -> Iterator[Snapshot | Changes]:
        store = EtcdStore(["http://a:1"])
        store._gateway = gateway
        monkeypatch.setattr(store, "moment", lambda endpoint="": Moment(1000, "", 0))
        found = iter(store.watch(""))
        assert next(found) == Snapshot((Entry("k", "", 1),), 1)
        return found

    return follow


def test_a_watch_goes_on_behind_the_last_event_whatever_the_header_says(news: Any) -> None:
    """A watch that catches up gets its events in batches, and the newest revision in the header of each."""
    batch = message(900, kv("x", 3), kv("y", 3), kv("x", 4))
    gateway = ScriptedGateway([message(900, created=True), batch], [message(900, kv("z", 5))])
    found = news(gateway)
    assert next(found) == Changes((("x", ""), ("y", ""), ("x", "")), 4)
    assert next(found) == Changes((("z", ""),), 5)
    assert gateway.started == [("http://a:1", 2), ("http://b:1", 5)]


@pytest.mark.parametrize(
    "last",
    [
        {"error": {"grpc_code": 14, "message": "etcdserver: no leader"}},
        {"error": {"code": 14, "message": "etcdserver: no leader"}},
        message(9, canceled=True, cancel_reason="permission denied"),
    ],
)
def test_a_watch_that_a_member_ends_goes_on_at_the_next(news: Any, last: Json) -> None:
    gateway = ScriptedGateway([message(2, kv("x", 2)), last], [message(3, kv("y", 3))])
    found = news(gateway)
    assert next(found) == Changes((("x", ""),), 2)
    assert next(found) == Changes((("y", ""),), 3)
    assert gateway.started == [("http://a:1", 2), ("http://b:1", 3)]


@pytest.mark.parametrize(
    "last",
    [
        message(900, canceled=True, compact_revision="800"),
        {"error": {"grpc_code": 8, "message": "grpc: received message larger than max (5000000 vs. 4194304)"}},
    ],
)
def test_a_watch_that_cannot_go_on_begins_again(news: Any, last: Json) -> None:
    found = news(ScriptedGateway([last]))
    assert isinstance(next(found), Snapshot)


def test_a_call_asks_every_member_before_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(endpoint: str, path: str, body: Json, seconds: float) -> Json:
        asked.append(endpoint[-3])
        if endpoint == "http://c:1":
            return {}
        raise Away("no answer")

    gateway = Gateway(["http://a:1", "http://b:1", "http://c:1"], Access(), "/weft")
    monkeypatch.setattr(gateway, "ask", ask)
    assert gateway.call("kv/range", {}) == {}
    assert gateway.call("kv/range", {}) == {}
    assert asked == ["a", "b", "c", "c"]


class RudeMember(BaseHTTPRequestHandler):
    """Hangs up on who brings no token that it knows, as some versions do, or on every other request."""

    users = True
    tokens: tuple[str, ...] = ()
    requests = 0

    def do_POST(self) -> None:
        kind = type(self)
        kind.requests += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v3/auth/authenticate":
            if not kind.users:
                self._answer(400, {"code": 9, "message": "etcdserver: authentication is not enabled"})
            elif body["password"] != "right":
                self._answer(
                    400, {"code": 3, "message": "etcdserver: authentication failed, invalid user ID or password"}
                )
            else:
                kind.tokens = (f"token {kind.requests}",)
                self._answer(200, {"token": kind.tokens[0]})
        elif self.headers["Authorization"] in kind.tokens if kind.users else kind.requests % 3 == 0:
            self._answer(200, {"kvs": []})

    def _answer(self, status: int, body: Json) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        """Not in a test's output."""


@pytest.fixture
def rude_member() -> Iterator[tuple[str, type[RudeMember]]]:
    class Member(RudeMember):
        """With a state of its own."""

    server = HTTPServer(("127.0.0.1", 0), Member)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Member
    server.shutdown()
    thread.join()
    server.server_close()


def rude_gateway(endpoint: str, folder: Path, password: str = "right") -> Gateway:
    (folder / "password").write_text(password)
    return Gateway([endpoint], Access(user="weft", password_file=folder / "password"), "/weft", patience=1)


def test_a_member_that_hangs_up_instead_of_asking_for_a_login_gets_one(
    rude_member: tuple[str, type[RudeMember]], tmp_path: Path
) -> None:
    endpoint, member = rude_member
    gateway = rude_gateway(endpoint, tmp_path)
    assert gateway.call("kv/range", {}) == {"kvs": []}
    member.tokens = ()  # it was restarted
    assert gateway.call("kv/range", {}) == {"kvs": []}
    with pytest.raises(StoreError, match=r"authentication failed.*; check WEFT_STORE_USER"):
        rude_gateway(endpoint, tmp_path, "wrong").call("kv/range", {})


def test_a_member_without_users_that_hangs_up_once_is_asked_again(
    rude_member: tuple[str, type[RudeMember]], tmp_path: Path
) -> None:
    endpoint, member = rude_member
    member.users = False
    gateway = rude_gateway(endpoint, tmp_path)
    assert gateway.call("kv/range", {}) == {"kvs": []}
    assert member.requests == 3
