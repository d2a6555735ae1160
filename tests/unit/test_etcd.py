"""How a watch reads etcd's messages, by messages that a real etcd gives only at bad moments."""

from __future__ import annotations

import json
import threading
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest

from tests.netns.plugin import wait_until
from weft.errors import StoreError
from weft.store import Changes, Entry, Snapshot
from weft.store.connections import Access, Connections
from weft.store.etcd import EtcdStore, Moment
from weft.store.gateway import Away, Gateway, Json

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

    def ask(self, endpoint: str, path: str, body: Json, seconds: float = 1.5, kind: Any = Json) -> Any:
        answer = {"header": {"revision": "1"}, "kvs": [kv("k", 1)]}
        return msgspec.convert(answer, kind, strict=False)

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


def test_watches_of_one_store_have_one_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks their member in turn for both, and ends both when that does not answer."""
    monkeypatch.setattr("weft.store.etcd._HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr("weft.store.etcd._PAUSE_SECONDS", 0.0)
    gateway = SilentGateway()
    store = EtcdStore(["http://a:1"])
    store._gateway = gateway
    asking: set[int] = set()

    def moment(endpoint: str = "", *, at: int = 0) -> Moment:
        if threading.current_thread().name == "store-guard":
            gateway.asked.release()
            if not asking:
                asking.add(threading.get_ident())
                raise KeyError("a bug: it goes on")
            asking.add(threading.get_ident())
            if gateway.hangs.is_set():
                raise Away("no answer")
        return Moment(1, "", 0)

    monkeypatch.setattr(store, "moment", moment)
    watches = [store.watch("a"), store.watch("b")]
    readers = [threading.Thread(target=list, args=(watch,)) for watch in watches]
    for reader in readers:
        reader.start()
        assert gateway.opened.acquire(timeout=10)
    assert all(gateway.asked.acquire(timeout=10) for _ in range(5))
    assert len(asking) == 1
    gateway.hangs.set()
    assert all(gateway.opened.acquire(timeout=10) for _ in range(2)), "both ask anew"
    for watch in watches:
        watch.close()
    for reader in readers:
        reader.join(10)
    assert not any(reader.is_alive() for reader in readers)


class SilentGateway(ScriptedGateway):
    """Its streams say nothing until they are hung up."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.opened = threading.Semaphore(0), threading.Semaphore(0)
        self.hangs = threading.Event()

    @contextmanager
    def stream(self, endpoint: str, path: str, body: Json) -> Iterator[Any]:
        ended = threading.Event()

        def lines(chunk_size: int) -> Iterator[bytes]:
            self.opened.release()
            ended.wait(20)
            return iter(())

        yield SimpleNamespace(iter_lines=lines, raw=SimpleNamespace(shutdown=ended.set))


class CountingMember(BaseHTTPRequestHandler):
    """Answers as many as asked at one time only when all of them have; knows who is connected."""

    protocol_version = "HTTP/1.1"
    together = threading.Barrier(1)
    connected: ClassVar[set[Any]] = set()

    def setup(self) -> None:
        super().setup()
        self.connected.add(self.connection)

    def finish(self) -> None:
        super().finish()
        self.connected.discard(self.connection)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.together.wait(20)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Not in a test's output."""


def test_as_many_connections_as_are_used_at_one_time_and_idle_ones_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Member(CountingMember):
        connected: ClassVar[set[Any]] = set()

    now = 100.0
    monkeypatch.setattr("weft.store.connections.monotonic", lambda: now)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Member)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    access = Access()
    connections = Connections(access)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    gateway, other = (Gateway([endpoint], access, "/weft", patience=20, connections=connections) for _ in range(2))
    try:
        Member.together = threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: gateway.ask(endpoint, "kv/range", {}, 20), range(8)))
        Member.together = threading.Barrier(1)
        now += 5
        other.call("kv/range", {})
        assert len(Member.connected) == 8, "they are used again"
        now += 6
        other.call("kv/range", {})
        wait_until(lambda: len(Member.connected) == 1, "the idle ones are closed")
    finally:
        gateway.close()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_call_asks_every_member_before_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(endpoint: str, path: str, body: Json, seconds: float, kind: Any) -> Json:
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
