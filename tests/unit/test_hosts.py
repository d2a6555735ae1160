"""Hosts that join, fall silent, are forgotten, and come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.conftest import FakeHost
from weft.errors import Conflict, NotFound
from weft.hosts import Hosts, IdInUse
from weft.ipam import LOCAL_SPACE, PoolId
from weft.model import Host
from weft.store import Delete
from weft.store.sqlite import SqliteStore

CIDR = "10.1.0.0/24"
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
    with pytest.raises(IdInUse, match=r"is in use by host h1 .*192\.168\.78\.1.*delete the file host-id"):
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
    two: tuple[FakeHost, FakeHost], change: dict[str, str], message: str, alive: bool
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
