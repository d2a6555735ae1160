"""What Docker has and the store has not is found again; never what is only being made, nor what is another's by now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from threading import Event
from types import SimpleNamespace
from typing import cast

import pytest

from lab.process import wait_until
from tests.fakes import FakeEngine
from tests.unit.conftest import FakeHost
from weft.driver import EndpointRequest
from weft.engine.adoption import Adoption
from weft.engine.collector import Collector
from weft.engine.restarts import Restarts
from weft.engine.sweeper import Sweeper
from weft.errors import UNKNOWN, NotFound
from weft.ipam import LOCAL_SPACE, PoolId
from weft.model import Endpoint, Network, network_key
from weft.presence import Presence
from weft.store import Delete, DeleteAll, Put
from weft.store.sqlite import SqliteStore

Hosts = Callable[..., FakeHost]
CIDR = "10.1.0.0/24"
E1, E2 = "a" * 64, "b" * 64


@dataclass
class Adopting:
    host: FakeHost
    engine: FakeEngine
    sweeper: Sweeper
    store: SqliteStore

    def run(self, endpoint_id: str) -> Endpoint:
        """A container that goes on running."""
        endpoint = self.host.run("n1", endpoint_id, CIDR)
        self.engine.attach("n1", endpoint)
        self.host.kernel.carrier.add("wp" + endpoint_id[:12])
        return endpoint

    def sweep(self) -> None:
        self.host.agent.cluster.load(self.store.list("topology/").entries)
        self.sweeper.sweep()

    def lose_everything(self) -> None:
        self.store.transact([], [DeleteAll(""), Put(self.host.record.key, self.host.record.encode())])

    def networks(self) -> list[Network]:
        return [Network.decode(entry.value) for entry in self.store.list("topology/networks/").entries]


def adopting(
    one: FakeHost, store: SqliteStore, *, grace: float = 0, collected: float = 0, patience: float = 0
) -> Adopting:
    """A host with one network, on which collecting waits as long as adopting does."""
    cluster, engine = one.agent.cluster, FakeEngine()
    collector = Collector(store, one.record, cluster, one.driver, one.ipam, grace=grace + collected)
    adoption = Adoption(store, one.record, cluster, one.driver, one.ipam, patience=patience, grace=grace)
    one.create_network("n1", CIDR)
    engine.add("n1", "app", CIDR)
    return Adopting(one, engine, Sweeper(engine, store, one.record, cluster, [collector, adoption]), store)


@pytest.fixture
def here(host: Hosts, store: SqliteStore) -> Adopting:
    return adopting(host(1), store)


def test_a_lost_network_and_its_running_endpoints_are_recorded_as_they_were(here: Adopting, store: SqliteStore) -> None:
    endpoint = here.run(E1)
    here.sweep()
    ipam = [e.key for e in store.list("ipam/").entries]
    here.lose_everything()
    here.sweep()
    here.sweep()
    (network,) = here.networks()
    found = store.get(replace(endpoint, vni=network.vni).key)
    assert found
    assert Endpoint.decode(found.value) == replace(endpoint, vni=network.vni)
    assert [e.key for e in store.list("ipam/").entries] == ipam
    assert here.host.kernel.links["wp" + E1[:12]].bridge == f"br{network.vni}"  # type: ignore[union-attr]
    here.engine.detach("n1")
    here.host.driver.delete_endpoint("n1", E1)
    here.engine.remove("n1")
    here.host.remove_network("n1", CIDR)
    here.sweep()
    assert not store.list("ipam/").entries


def test_a_lost_endpoint_keeps_its_rate(here: Adopting, store: SqliteStore) -> None:
    endpoint = here.host.run("n1", E1, CIDR, rate=10**8)
    here.engine.attach("n1", endpoint)
    here.host.kernel.carrier.add("wp" + E1[:12])
    store.transact([], [Delete(endpoint.key)])
    here.sweep()
    here.sweep()
    found = store.get(endpoint.key)
    assert found
    assert Endpoint.read(found) == endpoint


def test_a_forgotten_host_joins_the_network_again_and_a_retired_one_stays_retired(
    here: Adopting, host: Hosts, store: SqliteStore
) -> None:
    host(2).create_network("n2", CIDR)
    (network,) = here.networks()
    writes = [DeleteAll(f"topology/members/{network.vni}/{here.host.record.id}"), DeleteAll("bindings/")]
    retired = replace(network, retired=True)
    store.transact([], [*writes, Put(network.key, retired.encode())])
    here.sweep()
    assert here.networks() == [retired]
    assert len(store.list(f"topology/members/{network.vni}/").entries) == 2


def test_nothing_is_adopted_that_may_only_be_passing(host: Hosts, store: SqliteStore) -> None:
    here = adopting(host(1), store, grace=3600)
    here.lose_everything()
    here.sweep()
    here.sweep()
    assert not here.networks()


def test_what_only_this_hosts_memory_lacks_is_left_alone(here: Adopting, store: SqliteStore) -> None:
    here.run(E1)
    before = store.list("topology/").entries
    here.host.agent.cluster.load([])
    here.sweeper.sweep()
    assert store.list("topology/").entries == before


def test_networks_of_others_and_dead_endpoints_are_not_adopted(here: Adopting, store: SqliteStore) -> None:
    here.engine.add("m1", "lan", "10.9.0.0/24", driver="macvlan")
    here.engine.add("s1", "service", "10.8.0.0/24")
    here.engine.present["s1"] = replace(here.engine.present["s1"], scope="swarm")
    here.run(E1)
    here.host.kernel.carrier.clear()
    here.lose_everything()
    here.sweep()
    here.sweep()
    assert len(here.networks()) == 1
    assert not store.list("topology/endpoints/").entries


@pytest.mark.parametrize("other", ["", "10.1.0.0/24", "10.7.0.0/24"])
def test_options_that_name_a_lost_network_or_its_vni_do_not_keep_it_lost(
    here: Adopting, host: Hosts, other: str
) -> None:
    here.engine.present.clear()
    here.engine.add("n1", "app", CIDR, options={"weft.network": "77", "weft.vni": "77"})
    here.lose_everything()
    if other == CIDR:  # as another host was quicker, whose user did not type the VNI
        host(2).create_network("n2", other)
    elif other:
        host(2).create_network("n2", other, vni=77)
    here.sweep()
    here.sweep()
    assert not here.sweeper.conflicts
    vni = here.host.driver.networks.bound("n1").network.vni
    assert (vni == 77) is (not other)
    assert {pool.cidr for network in here.networks() for pool in network.pools} == {CIDR, other or CIDR}


def test_a_pool_that_is_anothers_by_now_is_a_conflict(here: Adopting, host: Hosts, store: SqliteStore) -> None:
    here.lose_everything()
    host(2).create_network("n2", "10.1.0.0/16")
    before = store.list("").entries
    for _ in range(2):
        here.sweep()
    assert [e for e in store.list("").entries if not e.key.startswith("engines/")] == list(before)
    (text,) = here.sweeper.conflicts.values()
    assert "network app (n1), which Docker has here, is not known to the cluster: pool 10.1.0.0/24 overlaps" in text


def test_a_network_that_differs_by_now_is_a_conflict_and_leaves_no_reservation(
    here: Adopting, host: Hosts, store: SqliteStore
) -> None:
    here.lose_everything()
    host(2).create_network("n2", CIDR, internal=True)
    before = store.list("ipam/").entries
    here.sweep()
    here.sweep()
    assert [(e.key, e.value) for e in store.list("ipam/").entries] == [(e.key, e.value) for e in before]
    assert "it is internal" in "".join(here.sweeper.conflicts.values())


def test_a_container_whose_address_is_anothers_by_now_is_cut_off(
    here: Adopting, host: Hosts, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    kept, taken = here.run(E1), here.run(E2)
    here.lose_everything()
    two = host(2)
    two.create_network("n2", CIDR)
    two.driver.create_endpoint(EndpointRequest("n2", "new", taken.addresses, ""))
    for _ in range(3):
        here.sweep()
    assert {e.key.rsplit("/", 1)[1] for e in store.list("topology/endpoints/").entries} == {kept.id, "new"}
    assert "wp" + E2[:12] not in here.host.kernel.links
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    (text,) = errors
    assert f"container c-bbbb is cut off from network app: address {taken.addresses[0]} of network" in text
    assert "is in use by endpoint new on host h2; restart the container to give it a new address" in text


def test_an_address_that_a_restored_backup_gives_to_a_dead_container_stays_the_living_ones(
    host: Hosts, store: SqliteStore
) -> None:
    here = adopting(host(1), store, collected=1)
    one, old = here.host, here.run(E1)
    backup = store.list("").entries
    here.engine.detach("n1")
    one.kernel.carrier.clear()
    one.driver.delete_endpoint("n1", E1)
    new = one.driver.create_endpoint(EndpointRequest("n1", E2, old.addresses, ""))  # started again, with its --ip
    here.engine.attach("n1", new)
    one.kernel.carrier.add("wp" + E2[:12])
    store.transact([], [DeleteAll("")])
    store.transact([], [Put(entry.key, entry.value) for entry in backup])
    here.sweep()
    here.sweep()
    assert "wp" + E2[:12] in one.kernel.links
    assert f"in use by endpoint {E1[:12]} on host h1" in "".join(here.sweeper.conflicts.values())

    def adopted() -> bool:
        here.sweep()
        return bool(store.get(new.key))

    wait_until(adopted, "the leftover is collected")
    assert "wp" + E2[:12] in one.kernel.links


def test_no_container_is_cut_off_before_a_leftover_of_another_host_can_be_collected(
    host: Hosts, store: SqliteStore
) -> None:
    here = adopting(host(1), store, patience=3600)
    taken = here.run(E2)
    here.lose_everything()
    two = host(2)
    two.create_network("n2", CIDR)
    two.driver.create_endpoint(EndpointRequest("n2", "new", taken.addresses, ""))
    for _ in range(3):
        here.sweep()
    assert "wp" + E2[:12] in here.host.kernel.links
    two.driver.delete_endpoint("n2", "new")
    two.ipam.release_address(PoolId.parse(f"{LOCAL_SPACE}/{CIDR}"), ip_address(taken.addresses[0]))
    here.sweep()
    assert {e.key.rsplit("/", 1)[1] for e in store.list("topology/endpoints/").entries} == {E2}


def test_a_kernel_that_fails_cuts_nobody_off(here: Adopting, store: SqliteStore) -> None:
    endpoint = here.run(E1)
    here.lose_everything()
    here.sweep()
    here.host.kernel.fail("perform")
    here.sweep()
    assert "wp" + E1[:12] in here.host.kernel.links
    here.sweep()
    (network,) = here.networks()
    assert store.get(replace(endpoint, vni=network.vni).key)
    assert store.get(network_key(network.vni))


def test_a_container_that_was_refused_for_want_of_its_network_is_started(here: Adopting, store: SqliteStore) -> None:
    here.lose_everything()
    with pytest.raises(NotFound) as refusal:
        here.host.run("n1", E1, CIDR)
    here.engine.refused = [("web", f"remote: {refusal.value}"), ("db", "no such file or directory")]
    presence = cast(Presence, SimpleNamespace(refused=Event(), problem=""))
    adoption = Adoption(
        store, here.host.record, here.host.cluster, here.host.driver, here.host.ipam, patience=0, grace=0
    )
    here.sweeper = Sweeper(
        here.engine, store, here.host.record, here.host.cluster, [adoption, Restarts(here.engine, presence, adoption)]
    )
    for _ in range(2):
        here.sweep()
    assert here.networks()
    assert here.engine.refused == [("db", "no such file or directory")]


def test_a_container_that_still_cannot_be_started_is_tried_once(
    here: Adopting, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    """It has another network too, which is lost for good. All others are started, and the sweeps after it go on."""
    here.lose_everything()
    why = f"Docker network n1 {UNKNOWN}"
    here.engine.refused = [("broken", why), ("web", why)]
    here.engine.unfit = {"broken": f"Docker network n9 {UNKNOWN}"}
    presence = cast(Presence, SimpleNamespace(refused=Event(), problem=""))
    one = here.host
    adoption = Adoption(store, one.record, one.cluster, one.driver, one.ipam, patience=0, grace=0)
    restarts = Restarts(here.engine, presence, adoption)
    here.sweeper = Sweeper(here.engine, store, one.record, one.cluster, [adoption, restarts])
    for _ in range(3):
        here.sweep()
    assert here.engine.starts == ["broken", "web"]
    assert [name for name, _ in here.engine.refused] == ["broken"]
    assert caplog.text.count(f"cannot be started: Docker network n9 {UNKNOWN}") == 1
    assert not here.sweeper.conflicts
