"""What Docker does not have is collected, what it has never; and nothing while it does not answer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.unit.conftest import FakeHost
from weft.engine.collector import Collector
from weft.engine.inventory import Inventory
from weft.engine.sweeper import Sweeper
from weft.errors import EngineError
from weft.ipam import LOCAL_SPACE, PoolId
from weft.model import Endpoint, Network, Published
from weft.store import Delete, Put
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
def collector(one: FakeHost, engine: FakeEngine, store: SqliteStore) -> Sweeper:
    return make(one, engine, store, grace=0)


def make(one: FakeHost, engine: FakeEngine, store: SqliteStore, *, grace: float) -> Sweeper:
    cluster = one.agent.cluster
    collector = Collector(store, one.record, cluster, one.driver, one.ipam, grace=grace)
    return Sweeper(engine, store, one.record, cluster, [collector])


def sweep(collector: Sweeper, one: FakeHost, store: SqliteStore) -> None:
    one.agent.cluster.load(store.list("topology/").entries)
    collector.sweep()


def keys(store: SqliteStore) -> list[str]:
    return [entry.key for entry in store.list("").entries if not entry.key.startswith("engines/")]


def names(store: SqliteStore, prefix: str) -> list[str]:
    return [entry.key.removeprefix(prefix) for entry in store.list(prefix).entries]


def test_an_endpoint_that_docker_lost_goes_with_its_veth_and_address(
    collector: Sweeper, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    kept, lost = one.run("n1", "a" * 64, CIDR), one.run("n1", "b" * 64, CIDR)
    engine.attach("n1", kept)
    sweep(collector, one, store)
    assert names(store, f"topology/endpoints/{kept.vni}/") == [kept.id]
    assert sorted(names(store, f"ipam/addresses/{CIDR}/")) == sorted(["10.1.0.1", kept.addresses[0]])
    assert "wp" + lost.id[:12] not in one.kernel.links


def test_a_network_that_docker_lost_goes_with_all_it_has(
    collector: Sweeper, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    one.run("n1", "a" * 64, CIDR)
    engine.present.clear()
    sweep(collector, one, store)
    sweep(collector, one, store)
    assert keys(store) == [one.record.key]


def test_pending_addresses_and_pools_are_collected_unless_docker_uses_them(
    collector: Sweeper, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    pool = PoolId.parse(f"{LOCAL_SPACE}/{CIDR}")
    used, lost = one.ipam.request_address(pool, None), one.ipam.request_address(pool, None)
    engine.attach("n1", Endpoint("e", 0, "", (str(used),), one.record.id))
    engine.add("macvlan", "lan", "10.5.0.0/24", driver="macvlan")
    for cidr in ("10.5.0.0/24", "10.6.0.0/24"):
        one.ipam.request_pool(LOCAL_SPACE, ip_network(cidr), None, v6=False)
    sweep(collector, one, store)
    assert str(lost) not in names(store, f"ipam/addresses/{CIDR}/")
    assert str(used) in names(store, f"ipam/addresses/{CIDR}/")
    assert names(store, "ipam/pools/") == [CIDR, "10.5.0.0/24"]


def test_a_pool_that_is_asked_for_again_before_it_is_collected_stays(
    collector: Sweeper, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    lan = ip_network("10.5.0.0/24")
    one.ipam.request_pool(LOCAL_SPACE, lan, None, v6=False)
    look = engine.inventory

    def looked(ids: Collection[str], subnets: Collection[str], *known: Any) -> Inventory:
        seen = look(ids, subnets, *known)
        one.ipam.request_pool(LOCAL_SPACE, lan, None, v6=False)
        return seen

    engine.inventory = looked  # type: ignore[assignment, method-assign]
    sweep(collector, one, store)
    assert names(store, "ipam/pools/") == [CIDR, str(lan)]


def test_nothing_is_collected_by_a_reading_from_before(one: FakeHost, engine: FakeEngine, store: SqliteStore) -> None:
    """No event tells of a container whose start is under way."""
    endpoint = one.run("n1", "a" * 64, CIDR)
    one.agent.cluster.load(store.list("topology/").entries)
    collector = Collector(store, one.record, one.agent.cluster, one.driver, one.ipam, grace=0)
    before = engine.inventory([], [])
    assert collector.sweep(replace(before, fresh=False), []).unsure
    assert store.get(endpoint.key)
    assert not collector.sweep(before, []).unsure
    assert not store.get(endpoint.key)


def test_nothing_is_collected_within_the_grace(one: FakeHost, engine: FakeEngine, store: SqliteStore) -> None:
    collector = make(one, engine, store, grace=3600)
    endpoint = one.run("n1", "a" * 64, CIDR)
    sweep(collector, one, store)
    sweep(collector, one, store)
    assert store.get(endpoint.key)


def test_nothing_is_collected_while_the_engine_does_not_answer(
    collector: Sweeper, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    endpoint = one.run("n1", "a" * 64, CIDR)
    engine.answers = False
    with pytest.raises(EngineError):
        sweep(collector, one, store)
    assert store.get(endpoint.key)


def test_what_a_running_container_uses_is_never_collected(
    collector: Sweeper, one: FakeHost, engine: FakeEngine, store: SqliteStore
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
    collector: Sweeper, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    for letter in "ab":
        one.run("n1", letter * 64, CIDR)
    one.kernel.fail("perform")
    sweep(collector, one, store)
    assert len([name for name in one.kernel.links if name.startswith("wp")]) == 1


def test_a_network_that_no_host_has_is_removed(
    collector: Sweeper, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    member = store.list("topology/members/").entries[0]
    store.transact([], [Delete(member.key), Delete(f"bindings/{one.record.id}/n1")])
    engine.present.clear()
    sweep(collector, one, store)
    sweep(collector, one, store)
    assert keys(store) == [one.record.key]


def published(store: SqliteStore, one: FakeHost) -> Network:
    network = one.create_network("n2", "10.2.0.0/24")
    network = replace(network, name="web", published=Published())
    store.transact([], [Put(network.key, network.encode()), Put("names/web", str(network.vni))])
    return network


def test_a_network_that_was_removed_while_weft_was_down_retires(
    collector: Sweeper, one: FakeHost, host: Hosts, engine: FakeEngine, store: SqliteStore
) -> None:
    network = published(store, one)
    host(2).create_network("n2there", "10.2.0.0/24")
    engine.add("n2", "web", "10.2.0.0/24")
    sweep(collector, one, store)
    del engine.present["n2"]
    sweep(collector, one, store)
    entry = store.get(network.key)
    assert entry
    assert Network.decode(entry.value).retired
    assert names(store, f"topology/members/{network.vni}/") == [host(2).record.id]


def test_a_network_that_docker_never_had_is_not_retired(
    collector: Sweeper, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    """As when the engine died between CreateNetwork and keeping the network."""
    sweep(collector, one, store)
    network = published(store, one)
    sweep(collector, one, store)  # the engine's own identity is known
    for _ in range(2):
        sweep(collector, one, store)
    assert one.driver.networks.find("web").wanted
    assert not names(store, f"topology/members/{network.vni}/")


@pytest.mark.parametrize("alone", [True, False])
def test_what_a_wiped_engine_had_is_not_retired(
    collector: Sweeper, one: FakeHost, host: Hosts, engine: FakeEngine, store: SqliteStore, alone: bool
) -> None:
    network = published(store, one)
    if not alone:
        host(2).create_network("n2there", "10.2.0.0/24")
    engine.add("n2", "web", "10.2.0.0/24")
    sweep(collector, one, store)
    engine.present.clear()
    engine.id = "none-2"
    for _ in range(3):
        sweep(collector, one, store)
    entry = store.get(network.key)
    assert entry
    assert Network.decode(entry.value).wanted
    assert one.record.id not in names(store, f"topology/members/{network.vni}/")
    assert store.get(f"engines/{one.record.id}").value == "none-2"  # type: ignore[union-attr]


def test_a_lost_network_that_the_engine_still_has_is_left_for_adoption(
    collector: Sweeper, one: FakeHost, engine: FakeEngine, store: SqliteStore
) -> None:
    member = store.list("topology/members/").entries[0]
    store.transact([], [Delete(member.key), Delete(f"bindings/{one.record.id}/n1")])
    sweep(collector, one, store)
    assert store.list("topology/networks/").entries
