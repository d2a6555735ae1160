"""What Docker does not have is collected, what it has never; and nothing while it does not answer."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_network

import pytest

from tests.fakes import FakeEngine
from tests.unit.conftest import FakeHost
from weft.collector import Collector
from weft.errors import EngineError
from weft.ipam import LOCAL_SPACE, PoolId
from weft.model import Network
from weft.store import Delete
from weft.store.sqlite import SqliteStore

Hosts = Callable[..., FakeHost]
CIDR = "10.1.0.0/24"


@pytest.fixture
def one(host: Hosts) -> FakeHost:
    made = host(1)
    made.create_network("n1", CIDR)
    return made


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.add("n1", "app", CIDR)
    return engine


@pytest.fixture
def collector(one: FakeHost, engine: FakeEngine, store: SqliteStore) -> Collector:
    return make(one, engine, store, grace=0)


def make(one: FakeHost, engine: FakeEngine, store: SqliteStore, *, grace: float) -> Collector:
    cluster = one.agent.cluster
    return Collector(store, one.record, cluster, one.driver, one.ipam, engine, grace=grace)


def sweep(collector: Collector, one: FakeHost, store: SqliteStore) -> None:
    one.agent.cluster.load(store.list("topology/").entries)
    collector.sweep()


def names(store: SqliteStore, prefix: str) -> list[str]:
    return [entry.key.removeprefix(prefix) for entry in store.list(prefix).entries]


def test_the_name_is_learned_once(collector: Collector, one: FakeHost, engine: FakeEngine, store: SqliteStore) -> None:
    sweep(collector, one, store)
    engine.present["n1"].name = "other"
    sweep(collector, one, store)
    assert [Network.decode(e.value).name for e in store.list("topology/networks/").entries] == ["app"]
    assert one.driver.find_network("app")


def test_an_endpoint_that_docker_lost_goes_with_its_veth_and_address(
    collector: Collector, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    kept, lost = one.run("n1", "a" * 64, CIDR), one.run("n1", "b" * 64, CIDR)
    engine.present["n1"].endpoints.add(kept.id)
    sweep(collector, one, store)
    assert names(store, f"topology/endpoints/{kept.vni}/") == [kept.id]
    assert sorted(names(store, f"ipam/addresses/{CIDR}/")) == sorted(["10.1.0.1", kept.addresses[0]])
    assert "wp" + lost.id[:12] not in one.kernel.links


def test_a_network_that_docker_lost_goes_with_all_it_has(
    collector: Collector, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    one.run("n1", "a" * 64, CIDR)
    engine.present.clear()
    sweep(collector, one, store)
    sweep(collector, one, store)
    assert [entry.key for entry in store.list("").entries] == [one.record.key]


def test_pending_addresses_and_pools_are_collected_unless_docker_uses_them(
    collector: Collector, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    pool = PoolId.parse(f"{LOCAL_SPACE}/{CIDR}")
    used, lost = one.ipam.request_address(pool, None), one.ipam.request_address(pool, None)
    engine.present["n1"].addresses.add(str(used))
    engine.add("macvlan", "lan", "10.5.0.0/24")
    for cidr in ("10.5.0.0/24", "10.6.0.0/24"):
        one.ipam.request_pool(LOCAL_SPACE, ip_network(cidr), None, v6=False)
    sweep(collector, one, store)
    assert str(lost) not in names(store, f"ipam/addresses/{CIDR}/")
    assert str(used) in names(store, f"ipam/addresses/{CIDR}/")
    assert names(store, "ipam/pools/") == [CIDR, "10.5.0.0/24"]


def test_nothing_is_collected_within_the_grace(one: FakeHost, engine: FakeEngine, store: SqliteStore) -> None:
    collector = make(one, engine, store, grace=3600)
    endpoint = one.run("n1", "a" * 64, CIDR)
    sweep(collector, one, store)
    sweep(collector, one, store)
    assert store.get(endpoint.key)


def test_nothing_is_collected_while_the_engine_does_not_answer(
    collector: Collector, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    endpoint = one.run("n1", "a" * 64, CIDR)
    engine.answers = False
    with pytest.raises(EngineError):
        sweep(collector, one, store)
    assert store.get(endpoint.key)


def test_what_a_running_container_uses_is_never_collected(
    collector: Collector, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    endpoint = one.run("n1", "a" * 64, CIDR)
    one.kernel.carrier.add("wp" + "a" * 12)
    sweep(collector, one, store)
    engine.present.clear()
    sweep(collector, one, store)
    assert store.get(endpoint.key)
    one.kernel.carrier.clear()
    sweep(collector, one, store)
    assert not store.get(endpoint.key)


def test_one_orphan_that_cannot_be_collected_does_not_keep_the_others(
    collector: Collector, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    for letter in "ab":
        one.run("n1", letter * 64, CIDR)
    one.kernel.fail("perform")
    sweep(collector, one, store)
    assert len([name for name in one.kernel.links if name.startswith("wp")]) == 1


def test_a_network_that_no_host_has_is_removed(
    collector: Collector, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    member = store.list("topology/members/").entries[0]
    store.transact([], [Delete(member.key), Delete(f"bindings/{one.record.id}/n1")])
    engine.present.clear()
    sweep(collector, one, store)
    sweep(collector, one, store)
    assert [entry.key for entry in store.list("").entries] == [one.record.key]
