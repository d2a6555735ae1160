"""Hosts that join, fall silent, are forgotten, and come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, cast

import pytest

from tests.unit.conftest import FakeHost
from weft.driver import EndpointRequest
from weft.errors import Conflict, NotFound, StoreError
from weft.hosts import AddressInUse, Hosts, IdInUse, OtherFamily, OtherPool
from weft.ipam import LOCAL_SPACE, PoolId
from weft.model import Host
from weft.probes.links import RESULTS, request_key
from weft.store import Condition, Delete, Entry, Put, Write
from weft.store.sqlite import SqliteStore

CIDR = "10.1.0.0/24"
POOL = PoolId.parse(f"{LOCAL_SPACE}/{CIDR}")
NETWORK = ("a" * 64, "b" * 64)


@pytest.fixture
def two(host: Callable[..., FakeHost], store: SqliteStore) -> tuple[FakeHost, FakeHost]:
    """Two hosts on one network, both alive."""
    first, second = host(1), host(2)
    for one, network_id in zip((first, second), NETWORK, strict=True):
        hosts_of(one).register(one.record, "boot")
        one.create_network(network_id, CIDR)
    return first, second


def hosts_of(one: FakeHost) -> Hosts:
    one.cluster.load(one.store.list("topology/").entries)
    return Hosts(one.store, one.cluster, one.driver, one.ipam)


def keys(store: SqliteStore, prefix: str = "") -> set[str]:
    return {entry.key for entry in store.list(prefix).entries}


def die(one: FakeHost) -> None:
    """What the store does by itself when a host is silent."""
    one.store.transact([], [Delete(one.record.alive_key)])


def test_hosts_of_two_address_families_are_not_in_one_cluster(
    two: tuple[FakeHost, FakeHost], host: Callable[..., FakeHost], store: SqliteStore
) -> None:
    third = replace(host(3).record, underlay="2001:db8::3")
    with pytest.raises(OtherFamily, match=r"::3 of this host is IPv6, but that of host h\d .* is IPv4, .*=ipv4"):
        hosts_of(two[0]).register(third, "boot")
    for one in two:  # they are silent, since everybody changes over
        die(one)
    hosts_of(two[0]).register(third, "boot")
    assert hosts_of(two[0]).find("h3") == third
    with pytest.raises(OtherFamily, match=r"192\.168\.78\.1 of this host is IPv4, but that of host h3"):
        hosts_of(two[0]).register(replace(two[0].record, version="2"), "boot")


def test_hosts_of_two_wireguard_pools_are_not_in_one_cluster(
    two: tuple[FakeHost, FakeHost], host: Callable[..., FakeHost]
) -> None:
    third = replace(host(3).record, wg_pool="10.99.0.0/16")
    with pytest.raises(
        OtherPool, match=r"10\.99\.0\.0/16, .* host h\d .* is 100\.64\.0\.0/10.*WEFT_WG_POOL=100\.64.*=10"
    ):
        hosts_of(two[0]).register(third, "boot")
    for one in two:  # they are silent, since everybody changes over
        die(one)
    hosts_of(two[0]).register(third, "boot")
    with pytest.raises(OtherPool, match=r"that of host h3 .* is 10\.99\.0\.0/16"):
        hosts_of(two[0]).register(replace(two[0].record, version="2"), "boot")


def test_registering_is_done_once_and_followed_by_changes(two: tuple[FakeHost, FakeHost], store: SqliteStore) -> None:
    first, _ = two
    revision = store.list("").revision
    hosts_of(first).register(first.record, "boot")
    assert store.list("").revision == revision
    moved = replace(first.record, underlay="192.168.78.77")
    hosts_of(first).register(moved, "boot")
    assert hosts_of(first).find("h1") == moved


def test_an_id_that_lives_elsewhere_is_refused_by_name(two: tuple[FakeHost, FakeHost]) -> None:
    first, _ = two
    clone = replace(first.record, name="clone", underlay="192.168.78.77")
    with pytest.raises(
        IdInUse, match=r"is in use by host h1 .*192\.168\.78\.1.*delete the files host-id and wireguard.key in"
    ):
        hosts_of(first).register(clone, "other boot")
    assert hosts_of(first).find("h1") == first.record


def test_the_same_machine_after_a_reboot_takes_over_its_own_sign_of_life(two: tuple[FakeHost, FakeHost]) -> None:
    first, _ = two
    hosts_of(first).register(first.record, "next boot")
    with pytest.raises(IdInUse):
        hosts_of(first).register(replace(first.record, underlay="192.168.78.77"), "boot")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"underlay": "192.168.78.1"},
            r"underlay address 192\.168\.78\.1 .* is host h1 .*WEFT_UNDERLAY.*weft host forget",
        ),
        ({"name": "h1"}, r"name h1 .* is host h1 .*WEFT_HOSTNAME.*weft host forget"),
    ],
)
@pytest.mark.parametrize("alive", [True, False])
def test_name_and_address_are_refused_to_others_alive_or_silent(
    two: tuple[FakeHost, FakeHost], change: dict[str, Any], message: str, alive: bool
) -> None:
    first, second = two
    if not alive:
        die(first)
    other = Host(id="9" * 32, name="h9", underlay="192.168.78.9")
    with pytest.raises(Conflict, match=message):
        hosts_of(second).register(replace(other, **change), "boot")
    hosts_of(second).forget(hosts_of(second).find("h1"), force=True)
    hosts_of(second).register(replace(other, **change), "boot")


def test_a_forgotten_host_leaves_nothing_but_what_others_use(
    two: tuple[FakeHost, FakeHost], store: SqliteStore
) -> None:
    first, second = two
    first.run(NETWORK[0], "e" * 64, CIDR)
    first.create_network("c" * 64, "10.2.0.0/24")
    kept = second.run(NETWORK[1], "f" * 64, CIDR)
    first.ipam.request_address(
        PoolId.parse(f"{LOCAL_SPACE}/{CIDR}"), None
    )  # of a container whose start the failure interrupted
    probes = RESULTS + first.record.id, request_key(first.record.id, second.record.id)
    store.transact([], [Put(key, "") for key in probes])
    die(first)
    hosts_of(second).forget(first.record)
    assert not [key for key in keys(store) if first.record.id in key]
    left = [entry.value for entry in store.list("").entries if first.record.id in entry.value]
    assert all('"kind":"gateway"' in value for value in left)  # who asked for it does not matter
    assert not [key for key in keys(store) if "10.2.0" in key]
    assert keys(store, "topology/endpoints/") == {kept.key}
    assert len(keys(store, f"ipam/addresses/{CIDR}/")) == 2  # the gateway and the other host's container


def test_a_host_that_is_alive_is_not_forgotten_unless_forced(
    two: tuple[FakeHost, FakeHost], store: SqliteStore
) -> None:
    first, second = two
    endpoint = first.run(NETWORK[0], "e" * 64, CIDR)
    with pytest.raises(Conflict, match=r"host h1 .* is alive: stop weft there first"):
        hosts_of(second).forget(first.record)
    assert store.get(endpoint.key)
    hosts_of(second).forget(first.record, force=True)
    assert not store.get(endpoint.key)


def test_a_host_is_found_by_name_address_or_id(two: tuple[FakeHost, FakeHost]) -> None:
    hosts = hosts_of(two[0])
    for name in ("h2", "192.168.78.2", two[1].record.id):
        assert hosts.find(name) == two[1].record
    with pytest.raises(NotFound, match="no host is called 'h3' \\(known: h1, h2\\)"):
        hosts.find("h3")
    with pytest.raises(NotFound, match="several"):
        hosts.find("0000")


class Hooked:
    """A store that lets something happen before certain transactions."""

    def __init__(self, store: SqliteStore, about: str, before: Callable[[], object]) -> None:
        self._store = store
        self._about = about
        self._before: Callable[[], object] | None = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> bool:
        if self._before and any(isinstance(w, Delete) and w.key.startswith(self._about) for w in writes):
            before, self._before = self._before, None
            before()
        return self._store.transact(conditions, writes)


def hooked(one: FakeHost, about: str, before: Callable[[], object]) -> Hosts:
    """Use cases on `one`, where `before` happens before the first transaction that deletes what is `about`."""
    one.cluster.load(one.store.list("topology/").entries)
    one.driver._store = store = cast(Any, Hooked(one.store, about, before))
    return Hosts(store, one.cluster, one.driver, one.ipam)


def test_a_second_forgetter_takes_nothing_from_the_next_holder(
    two: tuple[FakeHost, FakeHost], host: Callable[..., FakeHost], store: SqliteStore
) -> None:
    first, second = two
    third = host(3)
    dead = first.run(NETWORK[0], "e" * 64, CIDR)
    die(first)

    def the_other_is_quicker() -> None:
        hosts_of(second).forget(first.record)
        second.ipam.request_address(POOL, ip_address(dead.addresses[0]))
        second.driver.create_endpoint(EndpointRequest(NETWORK[1], "f" * 64, dead.addresses, ""))

    hooked(third, dead.key, the_other_is_quicker).forget(first.record)
    with pytest.raises(Conflict, match="is taken, endpoint ffffffffffff on host h2 has it: choose"):
        third.ipam.request_address(POOL, ip_address(dead.addresses[0]))


def test_forgetting_that_was_interrupted_is_done_the_next_time(
    two: tuple[FakeHost, FakeHost], store: SqliteStore
) -> None:
    first, second = two
    first.run(NETWORK[0], "e" * 64, CIDR)
    die(first)

    def election() -> None:
        raise StoreError("no leader")

    for about in ("topology/endpoints/", "topology/members/", "topology/hosts/"):
        with pytest.raises(StoreError):
            hooked(second, about, election).forget(first.record)
    hosts_of(second).forget(first.record)
    assert not [key for key in keys(store) if first.record.id in key]


@pytest.mark.parametrize("about", ["topology/endpoints/", "topology/members/", "topology/hosts/"])
def test_a_host_that_returns_in_the_middle_keeps_whole_networks(
    two: tuple[FakeHost, FakeHost], store: SqliteStore, about: str
) -> None:
    first, second = two
    first.run(NETWORK[0], "e" * 64, CIDR)
    lan = PoolId.parse(f"{LOCAL_SPACE}/10.7.0.0/24")
    first.ipam.request_pool(LOCAL_SPACE, lan.pool, None, v6=False)
    die(first)
    with pytest.raises(Conflict, match="is alive"):
        hooked(second, about, lambda: store.beat(first.record.alive_key, "boot", 10)).forget(first.record)
    mine = [key for key in keys(store) if first.record.id in key]
    member, binding = (any(key.startswith(one) for key in mine) for one in ("topology/members/", "bindings/"))
    assert member == binding
    assert (lan.pool in {ip_network(key.removeprefix("ipam/pools/")) for key in keys(store, "ipam/pools/")}) == member


def test_the_snapshot_on_disk_does_not_count_as_being_registered(
    two: tuple[FakeHost, FakeHost], store: SqliteStore
) -> None:
    first, _ = two
    hosts = hosts_of(first)
    thief = Host("9" * 32, "h9", first.record.underlay)
    store.transact([], [Delete(first.record.key), Put(thief.key, thief.encode())])
    first.cluster.load([Entry(first.record.key, first.record.encode(), 0)], certain=False)
    with pytest.raises(Conflict, match="is host h9"):
        hosts.register(first.record, "boot")


def test_two_hosts_may_swap_their_addresses(two: tuple[FakeHost, FakeHost]) -> None:
    first, second = two
    moves = {
        first: replace(first.record, underlay="192.168.78.2"),
        second: replace(second.record, underlay="192.168.78.1"),
    }
    for one, record in moves.items():
        with suppress(AddressInUse):
            hosts_of(one).register(record, "boot")
        hosts_of(one).withdraw(record, lambda address, here=record.underlay: address == here)  # type: ignore[misc]
    for one, record in moves.items():
        hosts_of(one).register(record, "boot")
    assert {host.name: host.underlay for host in hosts_of(first).all()} == {"h1": "192.168.78.2", "h2": "192.168.78.1"}


def test_who_still_has_its_address_does_not_withdraw_it(two: tuple[FakeHost, FakeHost]) -> None:
    first, _ = two
    hosts_of(first).withdraw(first.record, lambda address: address == first.record.underlay)
    assert hosts_of(first).find("h1") == first.record
