"""What only etcd can do to us: members that die, hang or lose their cluster, and answers that get lost."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import weft
from lab.certificates import Certificates
from tests.etcd import MISSING, Cluster, Member, Place, base64, in_memory
from tests.netns.plugin import Plugin, get, wait_until
from tests.netns.world import Namespace, World, wait_for
from weft.doctor.facts import Facts
from weft.doctor.local import of_host
from weft.errors import StoreError
from weft.model import ALIVE, ENDPOINTS, HOSTS, SCHEMA, SCHEMA_KEY
from weft.probes.links import RESULTS
from weft.store import Changes, Delete, DeleteAll, KeyIs, Put, Snapshot
from weft.store.connections import Access
from weft.store.etcd import EtcdStore
from weft.store.gateway import Away, Gateway, Json

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

THREE = (Place(), Place(), Place())
PASSWORD = "correct horse"
LISTEN = "127.0.0.1:9789"
PATIENCE = 1.3
_A_HANG = 30.0
"""Seconds. A busy machine is slow, but not as slow as that."""
MakeCluster = Callable[..., Cluster]


@pytest.fixture
def folder() -> Iterator[Path]:
    with in_memory() as folder:
        yield Path(folder)


@pytest.fixture
def make_cluster(folder: Path) -> Iterator[MakeCluster]:
    made: list[Cluster] = []

    def make(places: tuple[Place, ...] = (Place(),), tls: Certificates | None = None, *options: str) -> Cluster:
        made.append(Cluster(folder / f"etcd{len(made)}", places=places, tls=tls, options=options))
        return made[-1]

    yield make
    for cluster in made:
        cluster.kill()


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    """One member that nobody hurts."""
    with in_memory() as folder:
        cluster = Cluster(Path(folder))
        yield cluster
        cluster.kill()


class Traffic:
    """One host that writes keys in order, each only if it is absent, and another that watches."""

    def __init__(self, endpoints: list[str], access: Access | None = None) -> None:
        self.written: list[str] = []
        self.seen: list[str] = []
        self.snapshots = 0
        self.errors: list[StoreError] = []
        self.write_gap = 0.0
        self.event_gap = 0.0
        self._stores = [EtcdStore(endpoints, access=access) for _ in range(2)]
        self._watch = self._stores[1].watch("n/")
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    def flows(self, number: int = 20) -> None:
        """Wait until so many more keys were written and seen."""
        goal = len(self.written) + number
        assert wait_for(lambda: len(self.seen) >= goal or not all(t.is_alive() for t in self._threads), 20)
        assert len(self.seen) >= goal, "writer or reader ended"

    def stop(self) -> None:
        self._stopping.set()
        self._threads[1].join(10)
        wait_for(lambda: len(self.seen) >= len(self.written))
        self._watch.close()
        self._threads[0].join(5)
        for store in self._stores:
            store.close()
        assert not any(thread.is_alive() for thread in self._threads)

    def _write(self) -> None:
        last = time.monotonic()
        while not self._stopping.wait(0.01):
            key = f"n/{len(self.written):05}"
            try:
                # After an error it may have been done: then the key is there.
                assert self._stores[0].transact([KeyIs(key, 0)], [Put(key, "x" * 100)]) or self.errors
            except StoreError as error:
                self.errors.append(error)
                continue
            self.written.append(key)
            last, self.write_gap = time.monotonic(), max(self.write_gap, time.monotonic() - last)

    def _read(self) -> None:
        last = time.monotonic()
        for news in self._watch:
            if isinstance(news, Snapshot):
                self.snapshots += 1
                self.seen += [entry.key for entry in news.entries]
            else:
                self.seen += [key for key, _ in news.events]
            last, self.event_gap = time.monotonic(), max(self.event_gap, time.monotonic() - last)


@contextmanager
def exact_traffic(endpoints: list[str], access: Access | None = None) -> Iterator[Traffic]:
    """Traffic during which no write may fail, no event be missing or come twice, and no second snapshot be needed."""
    traffic = Traffic(endpoints, access)
    try:
        traffic.flows()
        yield traffic
        traffic.flows()
    finally:
        traffic.stop()
    print(f"gap of writes {traffic.write_gap:.2f} s, of events {traffic.event_gap:.2f} s, {len(traffic.seen)} events")
    assert traffic.errors == []
    assert traffic.seen == traffic.written
    assert traffic.snapshots == 1


def beginning_with(cluster: Cluster, endpoint: str) -> list[str]:
    return [endpoint, *(other for other in cluster.endpoints if other != endpoint)]


@pytest.mark.parametrize("attached_to_leader", [True, False])
def test_a_killed_leader_costs_no_write_and_no_event(make_cluster: MakeCluster, attached_to_leader: bool) -> None:
    cluster = make_cluster(THREE)
    leader = cluster.leader
    first = next(m for m in cluster.members if (m is leader) == attached_to_leader)
    with exact_traffic(beginning_with(cluster, first.endpoint)):
        leader.kill()


def test_a_frozen_member_costs_no_write_and_no_event(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(THREE)
    leader = cluster.leader
    follower = next(member for member in cluster.members if member is not leader)
    with exact_traffic(beginning_with(cluster, follower.endpoint)) as traffic:
        follower.freeze()
        traffic.flows(100)
        follower.thaw()


def test_a_member_cut_off_from_its_cluster_costs_no_write_and_no_event(make_cluster: MakeCluster, world: World) -> None:
    switch = Namespace(world.namespace())
    switch.ip("link add switch up type bridge")
    switch.ip("addr add 192.0.2.254/24 dev switch")
    members = [Namespace(world.namespace()) for _ in range(3)]
    for number, member in enumerate(members, 1):
        switch.ip(f"link add p{number} master switch up type veth peer name eth0 netns {member.path.name}")
        member.ip(f"addr add 192.0.2.{number}/24 dev eth0")
        member.ip("link set eth0 up")
    places = [
        Place(f"192.0.2.{number}", ("ip", "netns", "exec", member.path.name))
        for number, member in enumerate(members, 1)
    ]
    drop = "tcp dport 2380 drop; tcp sport 2380 drop;"
    cut = "".join(f"chain {hook} {{ type filter hook {hook} priority 0; {drop} }}\n" for hook in ("input", "output"))

    def scenario() -> None:
        cluster = make_cluster(tuple(places))
        victim = cluster.members.index(cluster.leader)
        with exact_traffic(beginning_with(cluster, cluster.endpoints[victim])) as traffic:
            members[victim].run("nft", f"table inet cut {{\n{cut}}}")
            traffic.flows(100)
            members[victim].run("nft", "delete table inet cut")
        cluster.kill()

    switch.do(scenario)


def test_users_log_in_again_when_all_members_were_restarted(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(THREE)
    cluster.want_passwords("weft", PASSWORD, "/weft/v1")
    password_file = tmp_path / "password"
    password_file.write_text(f"{PASSWORD}\n")
    traffic = Traffic(cluster.endpoints, Access(user="weft", password_file=password_file))
    try:
        traffic.flows()
        cluster.kill()
        cluster.start()
        traffic.flows()
    finally:
        traffic.stop()
    assert traffic.seen == traffic.written
    assert traffic.snapshots == 1


@dataclass(frozen=True, slots=True)
class Guarded:
    """A member with TLS that lets the user weft into /weft/v1, and the way in."""

    cluster: Cluster
    certificates: Certificates
    access: Access

    @property
    def place(self) -> str:
        return self.cluster.endpoints[0].partition("://")[2]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with in_memory() as folder:
        made = guard(Path(folder))
        yield made
        made.cluster.kill()


def guard(folder: Path, place: Place = Place()) -> Guarded:  # noqa: B008
    certificates = Certificates(folder / "ours")
    cluster = Cluster(folder, places=(place,), tls=certificates)
    try:
        cluster.want_passwords("weft", PASSWORD, "/weft/v1")
    except BaseException:
        cluster.kill()
        raise
    password_file = folder / "password"
    password_file.write_text(f"{PASSWORD}\n")
    return Guarded(cluster, certificates, Access(certificates.ca, *certificates.client, "weft", password_file))


def test_the_right_certificates_and_password_let_in(guarded: Guarded) -> None:
    store = EtcdStore(guarded.cluster.endpoints, access=guarded.access)
    assert store.transact([], [Put("a", "")])
    assert store.beat("alive", "me", 30)
    assert store.beat("alive", "me", 30)
    news = iter(store.watch(""))
    assert isinstance(next(news), Snapshot)
    assert store.transact([], [Put("b", "")])
    assert next(news) == Changes((("b", ""),), store.list("").revision)
    news.close()  # type: ignore[attr-defined]
    store.close()


NOWHERE = Path("/nowhere")
HOSTNAME = Path("/etc/hostname")
FILES = "; correct WEFT_STORE_CA, WEFT_STORE_CERT and WEFT_STORE_KEY"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"ca": None}, "certificate verify failed.*; check WEFT_STORE_CA"),
        ({"ca": NOWHERE}, f"/nowhere.*{FILES}"),
        ({"ca": HOSTNAME}, FILES),
        ({"cert": None, "key": None}, "; etcd may want a client certificate .*WEFT_STORE_CERT"),
        ({"key": NOWHERE}, f"/nowhere.*{FILES}"),
        ({"cert": HOSTNAME}, FILES),
        ({"user": "", "password_file": None}, "user name is empty; etcd wants a user: set WEFT_STORE_USER"),
        ({"user": "nobody"}, "authentication failed.*; check WEFT_STORE_USER"),
        ({"password_file": HOSTNAME}, "authentication failed.*; check WEFT_STORE_USER and the password"),
        ({"password_file": NOWHERE}, "/nowhere.*; correct WEFT_STORE_PASSWORD_FILE"),
    ],
)
def test_who_is_not_let_in_is_told_why(guarded: Guarded, wrong: dict[str, Path | None], words: str) -> None:
    access = replace(guarded.access, **wrong)  # type: ignore[arg-type]
    check_refusal(guarded.cluster.endpoints[0], access, words)


def check_refusal(endpoint: str, access: Access, words: str, root: str = "/weft/v1/") -> None:
    """The first call fails with one message that names the member (or the file at fault) and says what to do."""
    with closing(EtcdStore([endpoint], root=root, access=access, patience=PATIENCE)) as store:
        began = time.monotonic()
        with pytest.raises(StoreError, match=words) as caught:
            store.get("a")
    message = str(caught.value)
    print(f"{time.monotonic() - began:.2f} s: {message}")
    assert endpoint.partition("://")[2] in message or "WEFT_STORE_PASSWORD_FILE" in message
    assert "\n" not in message


def test_keys_and_certificates_of_others_are_told_apart(guarded: Guarded, tmp_path: Path) -> None:
    theirs = Certificates(tmp_path)
    endpoint, access = guarded.cluster.endpoints[0], guarded.access
    check_refusal(endpoint, replace(access, ca=theirs.ca), "certificate verify failed.*; check WEFT_STORE_CA")
    check_refusal(endpoint, replace(access, key=theirs.client[1]), FILES)
    cert, key = theirs.client
    check_refusal(endpoint, replace(access, cert=cert, key=key), "; etcd may want a client certificate that its CA")
    cert, key = guarded.certificates.client_with_name()
    check_refusal(endpoint, replace(access, cert=cert, key=key), "takes no client certificate with a CN")
    endpoint = endpoint.replace("127.0.0.1", "localhost")
    check_refusal(endpoint, access, "certificate verify failed.*etcd's certificate names this endpoint")


def test_a_user_without_the_right_is_told_which(guarded: Guarded) -> None:
    words = r"permission denied; .* readwrite --prefix=true /other"
    check_refusal(guarded.cluster.endpoints[0], guarded.access, words, root="/other/")


def test_tls_on_one_side_only_is_told(guarded: Guarded, shared: Cluster) -> None:
    check_refusal(f"http://{guarded.place}", Access(), "; if etcd serves TLS there, write etcds:// in WEFT_STORE")
    plain = shared.endpoints[0].replace("http", "https")
    check_refusal(plain, Access(), "or serve no TLS there: then write etcd:// in WEFT_STORE")


def test_an_etcd_whose_certificate_is_for_servers_only_is_told(make_cluster: MakeCluster, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "servers", usage="serverAuth")
    member = Member(0, Place(), tmp_path / "etcd", certificates)
    access = Access(certificates.ca, *certificates.client)
    member.start([member])
    try:
        with closing(EtcdStore([member.endpoint], access=access, patience=PATIENCE)) as store:
            wait_for(lambda: "valid for clientAuth" in refusal(store), 15)
            assert "own certificate must be valid for clientAuth as well" in refusal(store)
    finally:
        member.kill()


def refusal(store: EtcdStore) -> str:
    with pytest.raises(StoreError) as caught:
        store.get("a")
    return str(caught.value)


def test_wrong_addresses_are_told(world: World) -> None:
    """In a namespace with nothing but a loopback."""

    def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed, socket.create_server(("127.0.0.1", 0)) as silent:
            ports = [sock.getsockname()[1] for sock in (closed, silent)]
            closed.close()
            for place in (f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", "192.0.2.1:2379", "etcd.invalid:2379"):
                words = f"etcd cannot be used: {place} .*; check that etcd runs .*, the network to it, and WEFT_STORE"
                check_refusal(f"http://{place}", Access(), words)

    Namespace(world.namespace()).do(scenario)


def test_without_a_quorum_calls_fail_soon_and_the_watch_goes_on_afterwards(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(THREE)
    store = EtcdStore(cluster.endpoints)
    put = [Put("a", "1")]
    assert store.transact([], put)
    watch = store.watch("")
    news = iter(watch)
    next(news)
    for member in cluster.members[:2]:
        member.kill()
    calls: list[Callable[[], object]] = [
        lambda: store.transact([], put),
        lambda: store.get("a"),
        lambda: store.list(""),
    ]
    for call in calls:
        began = time.monotonic()
        with pytest.raises(StoreError) as caught:
            call()
        assert time.monotonic() - began < 5
        assert all(endpoint.removeprefix("http://") in str(caught.value) for endpoint in cluster.endpoints)
    cluster.start(*cluster.members[:2])
    assert store.transact([], [Put("b", "2")])
    keys: list[str] = []
    while "b" not in keys:
        change = next(news)
        assert isinstance(change, Changes)
        keys += [key for key, _ in change.events]
    assert set(keys) <= {"a", "b"}
    watch.close()
    store.close()


def failing(call: Callable[[], object], cluster: Cluster) -> float:
    """Seconds until a call fails with a message that names every member."""
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        call()
    seconds = time.monotonic() - began
    assert all(endpoint.removeprefix("http://") in str(caught.value) for endpoint in cluster.endpoints)
    return seconds


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("how", ["frozen", "killed", "dropped"])
def test_calls_fail_within_their_patience(make_cluster: MakeCluster, world: World, how: str, members: int) -> None:
    namespace = Namespace(world.namespace())
    enter = ("ip", "netns", "exec", namespace.path.name)

    def scenario() -> None:
        cluster = make_cluster(tuple(Place(f"127.0.0.{number}", enter) for number in range(1, members + 1)))
        with closing(EtcdStore(cluster.endpoints, patience=PATIENCE)) as store:
            assert store.beat("alive", "me", 10)
            if how == "dropped":
                namespace.run("nft", "table inet cut { chain input { type filter hook input priority 0; drop; }; }")
            for member in cluster.members:
                if how == "frozen":
                    member.freeze()
                elif how == "killed":
                    member.kill()
            fresh = EtcdStore(cluster.endpoints, patience=PATIENCE)
            calls: list[Callable[[], object]] = [
                lambda: store.transact([KeyIs("a", 0)], [Put("a", "1")]),
                lambda: store.get_many(["a", "b"]),
                lambda: store.beat("alive", "me", 10),
                lambda: fresh.transact([KeyIs("a", 0)], [Put("a", "1")]),
                lambda: next(iter(fresh.watch(""))),
            ]
            took = [failing(call, cluster) for call in calls]
            print(f"{members} {how}: {', '.join(f'{seconds:.2f}' for seconds in took)} s")
            assert max(took) < 2 * PATIENCE
            assert how != "killed" or took[1] < PATIENCE / 2  # nobody waits again for what did not come back

    namespace.do(scenario)


def test_one_frozen_member_of_three_costs_a_third_of_the_patience_once(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(THREE)
    leader = cluster.leader
    frozen = next(member for member in cluster.members if member is not leader)
    with closing(EtcdStore(beginning_with(cluster, frozen.endpoint), patience=PATIENCE)) as store:
        assert store.transact([], [Put("a", "")])
        frozen.freeze()
        took = []
        for _ in range(6):
            began = time.monotonic()
            assert store.get("a")
            took.append(time.monotonic() - began)
        print(f"{', '.join(f'{seconds:.2f}' for seconds in took)} s")
        assert PATIENCE / 3 <= took[0] < PATIENCE
        assert median(took[1:]) < PATIENCE / 3


def test_a_closed_watch_ends_while_etcd_is_away(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    watch = EtcdStore(cluster.endpoints).watch("")
    news = iter(watch)
    next(news)
    cluster.kill()
    ended = threading.Event()

    def read() -> None:
        assert list(news) == []
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert not ended.wait(1)
    watch.close()
    assert ended.wait(2)
    reader.join()


class Line:
    """Loses the answers to the next calls of one kind, and keeps what was asked."""

    def __init__(self, store: EtcdStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lost = 0
        self.meanwhile: Callable[[], object] = lambda: None
        self.asked: list[Json] = []
        self._gateway: Gateway = store._gateway
        self._ask = self._gateway.ask
        monkeypatch.setattr(self._gateway, "ask", self.ask)

    def ask(self, endpoint: str, path: str, body: Json, seconds: float = 1.5, kind: Any = Json) -> Any:
        answer = self._ask(endpoint, path, body, seconds, kind)
        if path == "kv/txn":
            self.asked.append(body)
            if self.lost:
                self.lost -= 1
                self.meanwhile()
                raise Away("no answer")
        return answer


@pytest.fixture
def store(shared: Cluster, tmp_path: Path) -> Iterator[EtcdStore]:
    opened = EtcdStore(shared.endpoints, root=f"/{tmp_path.name}/")
    yield opened
    opened.close()


def test_a_transaction_whose_answer_is_lost_is_done_once(store: EtcdStore, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(store, monkeypatch)
    for lost in (1, 2):
        line.lost = lost
        assert store.transact([KeyIs(f"k{lost}", 0)], [Put(f"k{lost}", "mine")])
        line.lost = lost
        assert not store.transact([KeyIs(f"k{lost}", 0)], [Put(f"k{lost}", "again")])
    assert [entry.value for entry in store.list("").entries] == ["mine", "mine"]


def test_a_repeated_write_does_not_undo_what_others_wrote_since(
    store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(store, monkeypatch)
    line.lost = 1
    line.meanwhile = lambda: store.transact([], [Put("k", "theirs")])
    assert store.transact([], [Put("k", "mine")])
    entry = store.get("k")
    assert entry is not None
    assert entry.value == "theirs"


def test_a_copy_that_arrives_late_does_nothing(store: EtcdStore, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(store, monkeypatch)
    assert store.transact([], [Put("k", "old")])
    assert store.transact([], [Put("k", "new")])
    for copy in line.asked.copy():
        assert "succeeded" not in store._gateway.call("kv/txn", copy)
    entry = store.get("k")
    assert entry is not None
    assert entry.value == "new"


def test_receipts_that_are_gone_cost_no_transaction(shared: Cluster, store: EtcdStore, tmp_path: Path) -> None:
    assert store.transact([KeyIs("a", 0)], [Put("a", "")])
    receipts = {"key": base64(f"/{tmp_path.name}.receipts/"), "range_end": base64(f"/{tmp_path.name}.receipts0")}
    [lease] = [kv["lease"] for kv in shared.call("kv/range", receipts)["kvs"] if "lease" in kv]
    shared.call("lease/revoke", {"ID": lease})
    [left] = shared.call("kv/range", receipts)["kvs"]
    assert left["key"] == base64(f"/{tmp_path.name}.receipts/newest")
    assert store.transact([KeyIs("b", 0)], [Put("b", "")])
    assert not store.transact([KeyIs("b", 0)], [Put("b", "")])
    assert [entry.key for entry in store.list("").entries] == ["a", "b"]


class Calls:
    """Which calls the gateway gets."""

    def __init__(self, store: EtcdStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        self._ask = store._gateway.ask
        monkeypatch.setattr(store._gateway, "ask", self.ask)

    def ask(self, endpoint: str, path: str, body: Json, seconds: float = 1.5, kind: Any = Json) -> Any:
        self.paths.append(path)
        return self._ask(endpoint, path, body, seconds, kind)


def lease_of(cluster: Cluster, key: str) -> str:
    return str(cluster.call("kv/range", {"key": base64(key)})["kvs"][0].get("lease", "0"))


def test_a_beat_writes_only_when_it_must(
    shared: Cluster, store: EtcdStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.beat("k", "me", 30)
    before = store.get("k")
    key = f"/{tmp_path.name}/k"
    calls = Calls(store, monkeypatch)
    with closing(EtcdStore(shared.endpoints, root=f"/{tmp_path.name}/")) as later_process:
        assert later_process.beat("k", "me", 30)
    assert store.beat("k", "me", 30)
    assert calls.paths == ["kv/range", "lease/keepalive"]
    assert store.get("k") == before
    shared.call("lease/revoke", {"ID": lease_of(shared, key)})
    assert store.get("k") is None
    assert store.beat("k", "me", 30)
    assert lease_of(shared, key) != "0"


@pytest.mark.parametrize("seconds", [0, 10], ids=["by hand", "with a shorter lease"])
def test_a_beat_takes_over_a_key_that_would_not_last_as_it_should(
    shared: Cluster, store: EtcdStore, tmp_path: Path, seconds: int
) -> None:
    key = f"/{tmp_path.name}/k"
    lease = shared.call("lease/grant", {"TTL": seconds})["ID"] if seconds else "0"
    shared.call("kv/put", {"key": base64(key), "value": base64("me"), "lease": lease})
    assert not store.beat("k", "somebody else", 30)
    assert store.beat("k", "me", 30)
    assert lease_of(shared, key) not in ("0", lease)


def test_a_beat_whose_answer_is_lost_is_done(store: EtcdStore, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(store, monkeypatch)
    line.lost = 1
    assert store.beat("k", "me", 30)
    line.lost = 1
    line.meanwhile = lambda: store.transact([], [Put("k2", "theirs")])
    assert store.beat("k2", "me", 30) is False


def test_foreign_entries_are_read_all_the_same(shared: Cluster, store: EtcdStore, tmp_path: Path) -> None:
    watch = store.watch("")
    news = iter(watch)
    next(news)
    root = f"/{tmp_path.name}/".encode()
    foreign = {b"": b"", b"\xff": b"\xfe", b"//": b"[", b"topology/hosts/": b"5"}
    for key, value in foreign.items():
        shared.call("kv/put", {"key": b64encode(root + key).decode(), "value": b64encode(value).decode()})
    as_text = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in foreign.items()}
    seen: dict[str, str | None] = {}
    while len(seen) < len(foreign):
        change = next(news)
        assert isinstance(change, Changes)
        seen |= dict(change.events)
    assert seen == {entry.key: entry.value for entry in store.list("").entries} == as_text
    watch.close()


def test_too_many_operations_are_refused_with_what_to_do(store: EtcdStore) -> None:
    with pytest.raises(StoreError, match=r"too many operations.*; ask for less at once, or raise etcd's --max-txn-ops"):
        store.transact([], [Put(f"k{number}", "") for number in range(200)])
    assert store.list("").entries == ()


def test_a_large_snapshot_comes_in_parts_of_one_revision(store: EtcdStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.store.etcd._PAGE", 2)
    store.transact([], [Put(f"k{number}", "") for number in range(5)])
    with closing(store.watch("")) as watch:
        news = iter(watch)
        first = next(news)
        store.transact([], [Put("k4", "later"), Put("k5", "")])
        parts = [first, next(news), next(news)]
        assert all(isinstance(part, Snapshot) and part.revision == first.revision for part in parts)
        shape = [(part.first, part.last) for part in parts if isinstance(part, Snapshot)]
        assert shape == [(True, False), (False, False), (False, True)]
        found = [entry for part in parts if isinstance(part, Snapshot) for entry in part.entries]
        assert [(entry.key, entry.value) for entry in found] == [(f"k{number}", "") for number in range(5)]
        assert next_events(news) == (("k4", "later"), ("k5", ""))
    assert [entry.key for entry in store.list("").entries] == [f"k{number}" for number in range(6)]


def test_a_snapshot_begins_again_when_etcd_is_compacted_meanwhile(
    shared: Cluster, store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.store.etcd._PAGE", 2)
    store.transact([], [Put(key, "") for key in ("a", "b", "c")])
    with closing(store.watch("")) as watch:
        news = iter(watch)
        assert next(news).revision
        store.transact([], [Delete("a")])
        shared.forget_history()
        again = next(news)
        assert isinstance(again, Snapshot)
        assert (again.first, again.last, [entry.key for entry in again.entries]) == (True, True, ["b", "c"])


@pytest.fixture
def restored(make_cluster: MakeCluster, folder: Path) -> Iterator[Restored]:
    with closing(Restored(make_cluster(), folder)) as found:
        yield found


class Restored:
    """An etcd of one member that is restored from a backup, under the id that it had."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.store = EtcdStore(cluster.endpoints)
        self._data, self._backup = folder / "etcd0", folder / "backup"
        self.write("old")
        cluster.kill()
        shutil.copytree(self._data, self._backup)
        cluster.start()
        self.watch = self.store.watch("")
        self.news = iter(self.watch)
        assert isinstance(next(self.news), Snapshot)

    def write(self, *keys: str) -> None:
        for key in keys:
            self.store.transact([], [Put(key, "")])

    def restore(self) -> None:
        self.cluster.kill()
        shutil.rmtree(self._data)
        self._backup.rename(self._data)
        self.cluster.start()

    def follows(self) -> None:
        """Wait until the watch has seen the newest mark."""
        assert wait_for(lambda: self.watch.seen.mark == self.store.moment().mark)

    def snapshot(self) -> list[str]:
        """The keys in the next news, which must be everything."""
        again = next(self.news)
        assert isinstance(again, Snapshot)
        return [entry.key for entry in again.entries]

    def close(self) -> None:
        self.watch.close()
        self.store.close()


def next_events(news: Iterator[Snapshot | Changes]) -> tuple[tuple[str, str | None], ...]:
    change = next(news)
    assert isinstance(change, Changes)
    return change.events


def test_history_that_went_back_gives_a_snapshot(restored: Restored) -> None:
    """An etcd restored from a backup has not even the revisions that the watch saw."""
    for _ in range(10):
        restored.write("lost")
        assert isinstance(next(restored.news), Changes)
    restored.restore()
    assert restored.snapshot() == ["old"]


def test_another_history_that_went_further_gives_a_snapshot(restored: Restored) -> None:
    """Nothing but its marks tells it from what the watch saw: there are even the same writes at the same revisions."""
    for key in ("same", "lost", "same"):
        restored.write(key)
        assert isinstance(next(restored.news), Changes)
    restored.follows()
    restored.restore()
    restored.write("same", "new", "same", "more", "more")
    assert restored.snapshot() == ["more", "new", "old", "same"]
    restored.write("later")
    assert next_events(restored.news) == (("later", ""),)


def test_a_listing_of_another_history_is_not_gone_on_with(restored: Restored) -> None:
    """Of the writes that were lost, the watch has seen no event: the last one left no key."""
    restored.store.transact([], [Delete("old")])
    with closing(restored.store.watch("")) as watch:
        news = iter(watch)
        assert next(news) == Snapshot((), restored.store.moment().revision)
        restored.restore()
        restored.write("a", "b", "c")
        again = next(news)
        assert isinstance(again, Snapshot)
        assert [entry.key for entry in again.entries] == ["a", "b", "c", "old"]


def test_another_history_behind_the_same_connection_gives_a_snapshot(
    restored: Restored, make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream may survive on a machine that is cut off while etcd's address is already another's."""
    restored.write("seen")
    assert isinstance(next(restored.news), Changes)
    restored.follows()
    with closing(EtcdStore(make_cluster().endpoints)) as other:
        for _ in range(20):
            other.transact([], [Put("other", "")])
        monkeypatch.setattr(restored.store, "moment", lambda endpoint="", *, at=0: other.moment(at=at))
        assert restored.snapshot() == ["old", "seen"]


def test_a_watch_goes_on_after_an_outage_though_history_is_compacted(restored: Restored) -> None:
    restored.write("a", "b")
    restored.store.transact([], [Delete("a")])
    seen: list[tuple[str, str | None]] = []
    while len(seen) < 3:
        seen += next_events(restored.news)
    restored.follows()
    restored.cluster.kill()
    restored.cluster.start()
    restored.cluster.forget_history()
    restored.write("c")
    assert next_events(restored.news) == (("c", ""),)


def test_weft_serves_a_host_over_etcd(make_cluster: MakeCluster, tmp_path: Path) -> None:
    endpoint = "127.0.0.1:2379"
    plugin = Plugin(tmp_path / "h1", listen=LISTEN)
    plugin.settings["store"] = f"etcd://{endpoint}"
    try:
        Namespace(Path(f"/proc/{plugin.host.pid}/ns/net")).do(lambda: serve_over_etcd(plugin, make_cluster, endpoint))
    finally:
        plugin.close()


def serve_over_etcd(plugin: Plugin, make_cluster: MakeCluster, endpoint: str) -> None:
    """In the host's namespace."""
    cluster = make_cluster((Place("127.0.0.1", tuple(plugin.host.enter(()))),))
    store = EtcdStore(cluster.endpoints)
    plugin.start()
    network = plugin.network("10.77.0.0/24")
    container = plugin.endpoint(network)
    plugin.join(container)
    assert [entry.key for entry in store.list(ENDPOINTS).entries if container.id in entry.key]
    cluster.members[0].freeze()
    pool_id = network.pool_id
    assert f"etcd cannot be used: {endpoint} (no answer)" in plugin.refused("RequestAddress", PoolID=pool_id)
    wait_until(lambda: get(LISTEN, "/readyz")[0] == 503, "no readiness", 20)
    alive, why = get(LISTEN, "/healthz")
    assert alive == 200  # a restart would not help
    assert "the store: etcd cannot be used" in why
    assert "\nweft_store_up 0.0\n" in get(LISTEN, "/metrics")[1]
    cluster.members[0].thaw()
    wait_until(lambda: get(LISTEN, "/readyz")[0] == 200, "readiness", 20)
    plugin.remove(container)
    plugin.remove_network(network)
    left = [entry.key for entry in store.list("").entries]
    assert [key for key in left if not key.startswith((HOSTS, ALIVE, RESULTS))] == ["schema"]
    store.close()


def test_a_store_of_a_newer_weft_is_left_alone(make_cluster: MakeCluster, tmp_path: Path) -> None:
    with closing(Plugin(tmp_path / "h1", store=tmp_path / "unused")) as plugin:
        plugin.settings["store"] = "etcd://127.0.0.1:2379"
        Namespace(Path(f"/proc/{plugin.host.pid}/ns/net")).do(lambda: meet_newer_schema(plugin, make_cluster))


def meet_newer_schema(plugin: Plugin, make_cluster: MakeCluster) -> None:
    cluster = make_cluster((Place("127.0.0.1", tuple(plugin.host.enter(()))),))
    newer = f"schema {SCHEMA + 1}, this one knows {SCHEMA}"
    with closing(EtcdStore(cluster.endpoints)) as store:
        store.transact([], [Put(SCHEMA_KEY, str(SCHEMA + 1))])
        done = plugin.run_to_end()
        assert done.returncode == 3
        assert f"weft cannot start: the store was written by a newer weft ({newer}): upgrade weft here" in done.stderr
        assert [entry.key for entry in store.list("").entries] == [SCHEMA_KEY]
        store.transact([], [Put(SCHEMA_KEY, str(SCHEMA))])
        plugin.start()
        assert f"weft {weft.__version__} serves host h1 " in plugin.log.read_text()


def test_a_weft_that_cannot_use_etcd_says_why_and_ends(tmp_path: Path) -> None:
    with closing(Plugin(tmp_path / "h1")) as plugin:
        namespace = Namespace(Path(f"/proc/{plugin.host.pid}/ns/net"))
        place = Place("127.0.0.1", tuple(plugin.host.enter(())))
        guarded = namespace.do(lambda: guard(tmp_path / "etcd", place))
        try:
            try_wrong_settings(plugin, guarded, tmp_path)
        finally:
            guarded.cluster.kill()


def test_a_dead_name_server_is_no_reason_to_hang(tmp_path: Path) -> None:
    """By default the C library waits for it ten seconds a name."""
    servers = tmp_path / "resolv.conf"
    servers.write_text("nameserver 127.0.0.1\n")
    with closing(Plugin(tmp_path / "h1")) as plugin:
        plugin.host.run("mount", "--bind", str(servers), os.path.realpath("/etc/resolv.conf"))
        namespace = Namespace(Path(f"/proc/{plugin.host.pid}/ns/net"))
        with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 53))
            began = time.monotonic()
            done = plugin.run_to_end(store="etcd://etcd1:2379,etcd2:2379")
            seconds = time.monotonic() - began
    assert done.returncode == 3
    assert "etcd1:2379 (" in done.stderr
    assert seconds < 15, done.stderr  # it was 21


def try_wrong_settings(plugin: Plugin, guarded: Guarded, tmp_path: Path) -> None:
    access, theirs = guarded.access, Certificates(tmp_path / "theirs")
    right = {
        "store": f"etcds://{guarded.place}",
        "store_ca": str(access.ca),
        "store_cert": str(access.cert),
        "store_key": str(access.key),
        "store_user": access.user,
        "store_password_file": str(access.password_file),
    }
    plain = {"store_ca": "", "store_cert": "", "store_key": ""}
    wrong: list[tuple[dict[str, str], str]] = [
        ({"store_ca": str(theirs.ca)}, "check WEFT_STORE_CA"),
        ({"store_cert": "", "store_key": ""}, "WEFT_STORE_CERT"),
        (
            {"store_password_file": "/etc/hostname"},
            "check WEFT_STORE_USER and the password in WEFT_STORE_PASSWORD_FILE",
        ),
        ({"store_user": "", "store_password_file": ""}, "set WEFT_STORE_USER"),
        ({"store": f"etcds://{guarded.place}/other"}, "readwrite --prefix=true /other"),
        ({"store": f"etcd://{guarded.place}", **plain}, "write etcds:// in WEFT_STORE"),
        ({"store": "etcds://127.0.0.1:1"}, "the network to it, and WEFT_STORE"),
        ({"store": "etcds://etcd.invalid:2379"}, "the network to it, and WEFT_STORE"),
    ]
    for settings, words in wrong:
        began = time.monotonic()
        done = plugin.run_to_end(**{**right, **settings})
        seconds = time.monotonic() - began
        print(f"{seconds:.1f} s: {done.stderr.strip()}")
        assert done.returncode == 3
        assert seconds < _A_HANG
        (line,) = (line for line in done.stderr.splitlines() if "weft cannot start" in line)
        assert words in line
        assert settings.get("store", guarded.place).partition("://")[2].partition("/")[0] in line


_READ_MANY = """
import sys, threading
from weft.store.etcd import EtcdStore
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) // 1024
def now(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS")) // 1024
store = EtcdStore(sys.argv[1:])
store.get("a")
before = now()
watch = store.watch("")
news = iter(watch)
entries = []
while not (part := next(news)).last:
    entries += part.entries
entries += part.entries
held = now()
print(len(entries), len({e.key for e in entries}), held - before, peak() - held, flush=True)
del entries, part
changes = next(news)
print(len(changes.events), all(v is None for _, v in changes.events), peak() - before, flush=True)
"""


def test_a_hundred_thousand_keys_are_read_in_bounded_memory(make_cluster: MakeCluster) -> None:
    """A listing needs little beyond the entries themselves. One revision that changes all of them is one message."""
    endpoints = make_cluster((Place(),), None, "--max-txn-ops=3000").endpoints
    store = EtcdStore(endpoints)
    for start in range(0, 100_000, 2500):
        puts = [Put(f"topology/endpoints/4096/{number:064x}", "x" * 200) for number in range(start, start + 2500)]
        assert store.transact([], puts)
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", _READ_MANY, *endpoints],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(weft.__file__).parents[1])},
    ) as reader:
        assert reader.stdout
        keys, distinct, held, beyond = map(int, reader.stdout.readline().split())
        print(f"{keys} keys listed in {time.monotonic() - began:.1f} s: {held} MB held, {beyond} MB more meanwhile")
        assert keys == distinct == 100_000
        assert beyond < 20
        assert store.transact([], [DeleteAll("topology/")])
        events, deleted, total = reader.stdout.readline().split()
        print(f"{events} events in one revision, {total} MB at most")
        assert (events, deleted) == ("100000", "True")
        assert reader.wait(10) == 0
    store.close()


def ill(store: EtcdStore) -> list[str]:
    return [place for place, problem in store.health().members.items() if problem]


def test_health_names_members_and_quorum(make_cluster: MakeCluster) -> None:
    cluster = make_cluster((Place(), Place(), Place()))
    with closing(EtcdStore(cluster.endpoints, patience=3.0)) as store:
        places = [endpoint.partition("://")[2] for endpoint in cluster.endpoints]
        healthy = store.health()
        assert (healthy.problem, healthy.history, healthy.alarm) == ("", 0, "")
        assert healthy.members == dict.fromkeys(places, "")
        cluster.members[0].kill()
        assert wait_for(lambda: ill(store) == places[:1], 20)  # there may be an election first
        assert store.health().problem == ""
        cluster.members[1].freeze()
        no_quorum = store.health()
        assert no_quorum.problem
        assert all(no_quorum.members[place] for place in places[:2])
        cluster.members[1].thaw()


def test_the_doctor_names_an_etcd_that_is_never_compacted(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    with closing(EtcdStore(cluster.endpoints)) as store:
        for number in range(20):
            store.transact([], [Put("key", str(number))])
        assert store.health().history == 0  # it is young
        (finding,) = of_host(Facts("h1", 4789, store=store.health(history=10)))
        assert (finding.check, finding.cause) == ("store", "etcd is not compacted, and will run out of space")
        assert "--auto-compaction-mode=periodic" in finding.evidence
        cluster.forget_history()
        assert not list(of_host(Facts("h1", 4789, store=store.health(history=10))))


def fill(store: EtcdStore) -> None:
    for number in range(100):
        store.transact([], [Put("key", f"{number}" * 50_000)])


@pytest.mark.skipif(not shutil.which("etcdctl"), reason="etcdctl is not installed: run lab/setup.sh")
def test_the_command_against_a_full_disk_lets_etcd_write_again(make_cluster: MakeCluster) -> None:
    cluster = make_cluster((Place(),), None, f"--quota-backend-bytes={2 << 20}")
    with closing(EtcdStore(cluster.endpoints)) as store:
        with pytest.raises(StoreError):
            fill(store)
        assert wait_for(lambda: store.health().alarm == "NOSPACE")
        (finding,) = of_host(Facts("h1", 4789, store=store.health()))
        environment = {**os.environ, "ETCDCTL_ENDPOINTS": cluster.endpoints[0], "ETCDCTL_API": "3"}
        subprocess.run(["sh", "-ec", finding.command], env=environment, check=True, capture_output=True, timeout=30)
        assert wait_for(lambda: store.health().alarm == "")
        assert store.transact([], [Put("key", "small")])
