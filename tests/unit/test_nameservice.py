"""Following the engine, telling the store, knowing who asks: over an engine that tests change by hand."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from errno import ENOENT, EPERM
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.conftest import FakeHost
from weft.cluster import Cluster
from weft.engine.containers import Attachment, Container, Containers, Outline
from weft.errors import EngineError, KernelError, StoreError
from weft.model import ENDPOINT_NAMES, TOPOLOGY, EndpointNames, Network
from weft.names import askers, firewall
from weft.names.askers import Askers
from weft.names.firewall import Watchman
from weft.names.lookup import Asker
from weft.names.publisher import Publisher
from weft.names.sandboxes import ResolverRoutes
from weft.names.service import NameService
from weft.store import Put
from weft.store.sqlite import SqliteStore

CIDR = "10.77.0.0/24"


class FakeEngine:
    """Containers as a test puts them; inspecting one of `stuck` waits."""

    def __init__(self) -> None:
        self.present: dict[str, Container] = {}
        self.bridge: dict[str, str] = {}
        self.events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.stuck: set[str] = set()
        self.released = threading.Event()
        self.away = False
        self.inspected: list[str] = []

    def outlines(self) -> Mapping[str, Outline]:
        self._check()
        return {one.id: one.outline for one in self.present.values()}

    def container(self, container_id: str) -> Container | None:
        self._check()
        self.inspected.append(container_id)
        if container_id in self.stuck:
            self.released.wait(10)
        return self.present.get(container_id)

    def gateways(self) -> Mapping[str, str]:
        self._check()
        return self.bridge

    def follow_containers(self, began: Callable[[], None], changed: Callable[[str], None]) -> None:
        self._check()
        began()
        while one := self.events.get():
            changed(one)
        raise EngineError("the events ended")

    def _check(self) -> None:
        if self.away:
            raise EngineError("the Docker Engine does not answer")


def container(number: int, network_id: str = "app-id", *, name: str = "", network: str = "app") -> Container:
    attachment = Attachment(network_id, network, f"endpoint{number}", ("Alias",), (f"10.77.0.{number}",))
    return Container(
        f"{number:064x}", name or f"web{number}", f"host{number}", f"/run/netns/sandbox{number}", (attachment,)
    )


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def heard() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def containers(engine: FakeEngine, heard: list[tuple[str, str]]) -> Iterator[Containers]:
    def listener(before: Container | None, now: Container | None) -> None:
        heard.append((before.name if before else "", now.name if now else ""))

    made = Containers(engine, [listener])
    yield made
    made.stop()
    engine.released.set()
    engine.events.put(None)


class TestContainers:
    def test_what_runs_at_the_start_is_known_and_events_are_followed(
        self, engine: FakeEngine, containers: Containers, heard: list[tuple[str, str]]
    ) -> None:
        first = container(1)
        engine.present[first.id] = first
        containers.start()
        eventually(lambda: containers.running)
        second = container(2)
        engine.present[second.id] = second
        engine.events.put(second.id)
        eventually(lambda: len(containers.running) == 2)
        del engine.present[first.id]
        engine.events.put(first.id)
        eventually(lambda: heard == [("", "web1"), ("", "web2"), ("web1", "")])

    def test_events_that_were_lost_are_made_up_for(self, engine: FakeEngine, containers: Containers) -> None:
        for number in (1, 2):
            engine.present[container(number).id] = container(number)
        containers.compare()
        eventually(lambda: len(containers.running) == 2)
        engine.inspected.clear()
        containers.compare()
        assert engine.inspected == []  # nothing has changed, so nothing is inspected
        engine.present[container(1).id] = container(1, name="fresh")
        del engine.present[container(2).id]
        containers.compare()
        eventually(lambda: [one.name for one in containers.running.values()] == ["fresh"])

    def test_a_container_that_the_engine_holds_keeps_no_other_waiting(
        self, engine: FakeEngine, containers: Containers
    ) -> None:
        held = [container(number) for number in range(1, 6)]
        engine.stuck = {one.id for one in held}
        for one in [*held, container(9)]:
            engine.present[one.id] = one
        containers.compare()
        eventually(lambda: containers.running)
        assert [one.name for one in containers.running.values()] == ["web9"]
        engine.released.set()
        eventually(lambda: len(containers.running) == 6)

    def test_an_event_during_an_inspect_leads_to_another(self, engine: FakeEngine, containers: Containers) -> None:
        one = container(1)
        engine.present[one.id] = one
        engine.stuck = {one.id}
        containers.compare()
        eventually(lambda: engine.inspected)
        containers.compare()
        engine.released.set()
        eventually(lambda: engine.inspected == [one.id] * 2)

    def test_an_engine_that_comes_back_is_followed_again(
        self, engine: FakeEngine, containers: Containers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("weft.engine.containers._RETRY_SECONDS", 0.01)
        engine.away = True
        engine.present[container(1).id] = container(1)
        containers.start()
        time.sleep(0.05)
        assert not containers.running
        engine.away = False
        eventually(lambda: containers.running)


@pytest.fixture
def me(host: Callable[..., FakeHost]) -> FakeHost:
    return host(1)


def mirrored(store: SqliteStore) -> Cluster:
    cluster = Cluster()
    cluster.load(store.list(TOPOLOGY).entries)
    return cluster


def with_network(me: FakeHost, **options: bool) -> Network:
    return me.create_network("app-id", CIDR, **options)


def names(store: SqliteStore) -> dict[str, EndpointNames]:
    found = [EndpointNames.read(entry) for entry in store.list(ENDPOINT_NAMES).entries]
    return {one.container: one for one in found}


class TestPublisher:
    def test_names_are_written_beside_their_endpoints_and_go_with_them(self, me: FakeHost, store: SqliteStore) -> None:
        with_network(me)
        endpoint = me.run("app-id", "endpoint1", CIDR)
        publisher = Publisher(store, me.record, mirrored(store))
        publisher.running = {"1": container(1), "2": container(2, "somebody else's network")}
        publisher.compare()
        found = names(store)["web1"]
        assert len(names(store)) == 1
        assert (found.endpoint, found.aliases, found.hostname, found.short_id) == (
            "endpoint1",
            ("Alias",),
            "host1",
            "0" * 12,
        )
        assert found.key.endswith(f"/{endpoint.vni}/endpoint1")
        me.driver.delete_endpoint("app-id", "endpoint1")
        assert names(store) == {}

    def test_removing_the_network_takes_all_names_along(self, me: FakeHost, store: SqliteStore) -> None:
        network = with_network(me)
        left = EndpointNames(network.vni, "nobody", me.record.id, "ghost")
        store.transact([], [Put(left.key, left.encode())])
        me.remove_network("app-id", CIDR)
        assert names(store) == {}

    def test_what_is_right_is_not_written_again(self, me: FakeHost, store: SqliteStore) -> None:
        with_network(me)
        me.run("app-id", "endpoint1", CIDR)
        publisher = Publisher(store, me.record, cluster := mirrored(store))
        publisher.running = {"1": container(1)}
        publisher.compare()
        cluster.load(store.list(TOPOLOGY).entries)
        revision = store.list(TOPOLOGY).revision
        publisher.compare()
        assert store.list(TOPOLOGY).revision == revision

    def test_names_without_an_endpoint_are_collected_but_not_those_of_living_hosts(
        self, me: FakeHost, store: SqliteStore, host: Callable[..., FakeHost]
    ) -> None:
        vni, other = with_network(me).vni, host(2)
        for owner, name in ((me.record.id, "mine"), (other.record.id, "theirs"), ("f" * 32, "nobodys")):
            one = EndpointNames(vni, f"e-{name}", owner, name)
            store.transact([], [Put(one.key, one.encode())])
        Publisher(store, me.record, mirrored(store)).compare()
        assert names(store).keys() == {"theirs"}

    def test_a_thousand_at_once_and_a_store_that_fails(
        self, me: FakeHost, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("weft.names.publisher._RETRY_SECONDS", 0.01)
        with_network(me)
        transact, failures = store.transact, [StoreError("away")] * 3

        def fail_first(conditions: object, writes: object) -> bool:
            if failures:
                raise failures.pop()
            return transact(conditions, writes)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "transact", fail_first)
        publisher = Publisher(store, me.record, mirrored(store))
        publisher.running = {str(number): container(number) for number in range(1000)}
        publisher.start()
        for one in publisher.running.values():
            publisher.follow(None, one)
        try:
            eventually(lambda: len(names(store)) == 1000)
        finally:
            publisher.stop()


class TestAskers:
    @pytest.fixture
    def cluster(self, me: FakeHost, store: SqliteStore) -> Cluster:
        self.vni = with_network(me).vni
        self.endpoint = me.run("app-id", "endpoint1", CIDR)
        return mirrored(store)

    @pytest.fixture
    def directory(self, cluster: Cluster, me: FakeHost, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Askers:
        monkeypatch.setattr(askers, "_PATIENCE", 0.3)
        return Askers(cluster, me.record.id, engine)

    def test_by_the_gateway_bridge(self, directory: Askers, engine: FakeEngine) -> None:
        engine.bridge = {"172.18.0.2": "sandbox1"}
        directory.follow(None, container(1))
        assert directory.known("172.18.0.2") is None
        assert directory.find("172.18.0.2") == directory.known("172.18.0.2") == Asker.on({self.vni: "app"})
        assert directory.heard > 0
        # Its address is given to another, of no network of ours.
        directory.follow(container(1), None)
        engine.bridge = {"172.18.0.2": "sandbox2"}
        directory.follow(None, container(2, "bridge-id"))
        assert directory.known("172.18.0.2") is None
        assert directory.find("172.18.0.2") == Asker.on({})

    def test_by_its_address_on_our_network_or_on_a_bridge(self, directory: Askers) -> None:
        source = self.endpoint.addresses[0]
        assert directory.known(source) == Asker.on({self.vni: ""})  # before Docker has told anything
        directory.follow(None, container(1))
        assert directory.known(source) == directory.known("10.77.0.1") == Asker.on({self.vni: "app"})

    def test_who_asks_before_its_events_came_waits_for_them(self, directory: Askers, engine: FakeEngine) -> None:
        engine.bridge = {"172.18.0.2": "sandbox1"}
        threading.Timer(0.1, directory.follow, (None, container(1))).start()
        assert directory.find("172.18.0.2") == Asker.on({self.vni: "app"})

    def test_a_stranger_is_refused_and_waits_once(self, directory: Askers, engine: FakeEngine) -> None:
        assert directory.find("192.0.2.9") is None
        began = time.monotonic()
        assert directory.find("192.0.2.9") is None
        assert time.monotonic() - began < 0.8  # of the second that it would wait
        engine.away = True
        assert directory.find("192.0.2.10") is None

    def test_an_address_of_the_gateway_bridge_that_is_anothers_by_now(
        self, directory: Askers, engine: FakeEngine
    ) -> None:
        """A container that joins a bridge network gives its own up, and goes on."""
        engine.bridge = {"172.18.0.2": "sandbox1"}
        directory.follow(None, container(1))
        assert directory.find("172.18.0.2") == Asker.on({self.vni: "app"})
        joined = replace(container(1), attachments=(*container(1).attachments, *container(1, "bridge-id").attachments))
        engine.bridge = {"172.18.0.2": "sandbox2"}
        directory.follow(container(1), joined)
        directory.follow(None, container(2, "bridge-id"))
        assert directory.find("172.18.0.2") == Asker.on({})

    def test_it_is_read_again_if_a_container_leaves_it_meanwhile(self, directory: Askers, engine: FakeEngine) -> None:
        engine.bridge, now = {"172.18.0.2": "sandbox1"}, {"172.18.0.2": "sandbox2"}
        directory.follow(None, container(1))
        directory.follow(None, container(2, "bridge-id"))
        answers = [engine.bridge, now]

        def gateways() -> Mapping[str, str]:
            if len(answers) == 2:
                directory.follow(container(1), None)
            return answers.pop(0)

        engine.gateways = gateways  # type: ignore[method-assign]
        assert directory.find("172.18.0.2") == Asker.on({})

    def test_forged_sources_keep_no_new_container_from_its_names(
        self, directory: Askers, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(askers, "_PATIENCE", 3.0)
        engine.bridge = {"172.18.0.2": "sandbox1"}
        with ThreadPoolExecutor(8) as pool:
            forged = [pool.submit(directory.find, f"192.0.2.{number}") for number in range(64)]
            new = pool.submit(directory.find, "172.18.0.2")
            eventually(lambda: sum(one.done() for one in forged) == len(forged) - askers._MOST_WAITING)
            assert not new.done()  # its events have not come
            directory.follow(None, container(1))
            assert new.result(5) == Asker.on({self.vni: "app"})
            assert not any(one.result(5) for one in forged)

    def test_an_equal_container_is_replaced_and_removed(self, directory: Askers) -> None:
        """As an inspect repeated gives another object of the same value."""
        directory.follow(None, container(1))
        directory.follow(container(1), None)
        assert directory.known("10.77.0.1") is None


class TestWatchman:
    ADDRESS = "169.254.77.53"
    OURS = b"answer" + socket.inet_aton(ADDRESS)

    @pytest.mark.parametrize(
        ("replies", "first"),
        [
            ([OURS], True),
            ([b"nobody has that name", OURS], True),
            ([b"nobody has that name", b""], False),
            ([b"", b""], None),
            ([], None),
        ],
    )
    def test_whether_docker_asks_us_is_told_by_what_containers_are_answered(
        self, engine: FakeEngine, tmp_path: Path, replies: list[bytes], first: bool | None
    ) -> None:
        assert self.watchman(engine, tmp_path, replies).is_first() is first

    @pytest.mark.parametrize(
        ("replies", "reached"),
        [
            ([b"", OURS], True),
            ([b"", b""], False),
            ([None, b""], False),
            ([None], None),
            ([], None),
        ],
    )
    def test_a_container_that_lets_nothing_out_does_not_speak_for_the_host(
        self, engine: FakeEngine, tmp_path: Path, replies: list[bytes | None], reached: bool | None
    ) -> None:
        """One that has ended says nothing, and hides no other."""
        assert self.watchman(engine, tmp_path, replies).reaches() is reached

    def watchman(self, engine: FakeEngine, folder: Path, replies: Sequence[bytes | None]) -> Watchman:
        engine.bridge = {f"172.18.0.{number}": f"sandbox{number}" for number in range(len(replies))}
        by_sandbox = {folder / f"sandbox{number}": reply for number, reply in enumerate(replies)}

        def work_in(namespace: Path, _: object) -> bytes:
            if (reply := by_sandbox[namespace]) is None:
                raise KernelError("open", ENOENT)
            return reply

        kernel: Any = SimpleNamespace(work_in=work_in)
        directory: Any = SimpleNamespace(heard=0.0)
        return Watchman(kernel, engine, directory, self.ADDRESS, folder)


def test_the_resolvers_address_is_looked_after_whatever_happens(
    me: FakeHost, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who flushes lo takes it away."""
    monkeypatch.setattr(firewall, "PAUSE_SECONDS", 0.01)
    put: list[str] = []

    def own(address: str) -> None:
        put.append(address)
        match len(put):
            case 2:
                raise KernelError("put an address on lo", EPERM)
            case 3:
                raise ZeroDivisionError

    def nothing(*_: object) -> None: ...

    kernel: Any = SimpleNamespace(
        own=own, open_sockets=lambda _: [], open_detour=nothing, keep_shut=nothing, let_pass=nothing
    )
    service = NameService(me.store, me.record, me.cluster, engine, kernel, address="169.254.77.53", sandboxes=tmp_path)
    service.start()
    try:
        eventually(lambda: len(put) > 5)
    finally:
        engine.events.put(None)
        service.stop()
    assert "containers may not reach the resolver: put an address on lo" in caplog.text
    assert "watching over the resolver met a bug" in caplog.text


class TestResolverRoutes:
    @pytest.fixture
    def routes(self, me: FakeHost, store: SqliteStore, tmp_path: Path) -> Callable[[], ResolverRoutes]:
        """Makes one more, as a restart of weft does."""
        me.create_network("inside", CIDR, internal=True)
        me.create_network("more", "10.78.0.0/24", internal=True)
        me.create_network("open", "10.79.0.0/24")
        me.create_network("six", "fd00:77::/64", internal=True)
        cluster = mirrored(store)
        return lambda: ResolverRoutes(cluster, me.record.id, "169.254.77.53", tmp_path / "routes")

    def test_one_endpoint_of_a_sandbox_has_it_whatever_happens_to_weft(
        self, routes: Callable[[], ResolverRoutes]
    ) -> None:
        sandbox = "/var/run/docker/netns/123456789abc"
        assert routes().take("open", "e0", sandbox) is None
        assert routes().take("inside", "e1", sandbox) == "169.254.77.53/32"
        assert routes().take("inside", "e1", sandbox) == "169.254.77.53/32"  # the call was repeated
        assert routes().take("more", "e2", sandbox) is None
        assert routes().take("more", "e3", "/var/run/docker/netns/abcdefabcdef") == "169.254.77.53/32"
        routes().release("e2")
        assert routes().take("more", "e2", sandbox) is None
        routes().release("e1")
        assert routes().take("more", "e2", sandbox) == "169.254.77.53/32"

    @pytest.mark.parametrize(("network", "sandbox"), [("six", "s"), ("unknown", "s"), ("inside", "")])
    def test_none_where_it_is_of_no_use(self, routes: Callable[[], ResolverRoutes], network: str, sandbox: str) -> None:
        assert routes().take(network, "e1", sandbox) is None

    def test_a_folder_that_cannot_be_written_costs_the_route_only(
        self, me: FakeHost, routes: Callable[[], ResolverRoutes], tmp_path: Path
    ) -> None:
        (tmp_path / "routes").write_text("a file")
        assert routes().take("inside", "e1", "s") is None
        routes().release("e1")
