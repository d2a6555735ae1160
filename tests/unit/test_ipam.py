"""Pools and addresses: every rule, and that two hosts never give one address twice."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.conftest import FakeHost, together
from weft.config import PoolRange, from_environment
from weft.driver import EndpointRequest
from weft.errors import Conflict, Exhausted, InvalidRequest, NotFound, Taken
from weft.ipam import GLOBAL_SPACE, LOCAL_SPACE, Ipam, PoolId
from weft.model import IPAddress, IPNetwork, address_key
from weft.store.sqlite import SqliteStore

Hosts = Callable[..., FakeHost]


def pool_id(cidr: str, sub: str = "") -> PoolId:
    return PoolId.parse("/".join(filter(None, (LOCAL_SPACE, cidr, sub))))


def reserve(ipam: Ipam, cidr: str, sub: str = "") -> PoolId:
    network = ip_network(cidr)
    return ipam.request_pool(LOCAL_SPACE, network, ip_network(sub) if sub else None, v6=network.version == 6)


@pytest.mark.parametrize(
    "text", ["weft-local/10.1.0.0/16", "weft-local/10.1.0.0/16/10.1.4.0/24", "weft-global/fd00::/64"]
)
def test_a_pool_id_is_its_own_text(text: str) -> None:
    assert str(PoolId.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "x", "other/10.1.0.0/16", "weft-local/10.1.0.0", "weft-local/10.1.0.1/16", "weft-local/a/b/c"]
)
def test_a_foreign_pool_id_is_not_found(text: str) -> None:
    with pytest.raises(NotFound):
        PoolId.parse(text)
    assert PoolId.find(text) is None


def test_a_pool_asked_for_twice_is_the_same(host: Hosts) -> None:
    assert reserve(host(1).ipam, "10.1.0.0/16") == reserve(host(2).ipam, "10.1.0.0/16")


@pytest.mark.parametrize("cidr", ["0.0.0.0/0", "127.0.0.0/8", "224.0.0.0/8", "10.0.0.0/31", "10.0.0.0/32", "ff02::/64"])
def test_a_subnet_that_containers_cannot_have_is_refused(host: Hosts, cidr: str) -> None:
    with pytest.raises(InvalidRequest, match=f"subnet {cidr} is"):
        reserve(host(1).ipam, cidr)


def test_overlapping_pools_are_refused_with_the_owner(host: Hosts) -> None:
    one = host(1)
    one.create_network("n1", "10.1.0.0/16")
    with pytest.raises(
        Conflict, match=r"pool 10.1.4.0/24 overlaps 10.1.0.0/16 of network with VNI \d+, made on host h1"
    ):
        reserve(host(2).ipam, "10.1.4.0/24")


def test_automatic_pools_differ_and_avoid_routes_and_pools(host: Hosts) -> None:
    one = host(1, routes=["10.64.0.0/23"])
    reserve(one.ipam, "10.64.2.0/24")
    found = [one.ipam.request_pool(LOCAL_SPACE, None, None, v6=False).pool for _ in range(3)]
    assert [str(pool) for pool in found] == ["10.64.3.0/24", "10.64.4.0/24", "10.64.5.0/24"]


def test_automatic_pools_end_with_a_clear_error(store: SqliteStore) -> None:
    ranges = [PoolRange(ip_network("10.9.0.0/23"), 24)]
    ipam = Ipam(store, "h", ranges=ranges, host_routes=list[IPNetwork])
    for _ in range(2):
        ipam.request_pool(LOCAL_SPACE, None, None, v6=False)
    with pytest.raises(Exhausted, match=r"no free IPv4 pool is left in weft's ranges \(10.9.0.0/23\)"):
        ipam.request_pool(LOCAL_SPACE, None, None, v6=False)
    with pytest.raises(Exhausted, match=r"no free IPv6 pool is left in weft's ranges .none configured."):
        ipam.request_pool(LOCAL_SPACE, None, None, v6=True)


def test_an_automatic_ipv6_pool(host: Hosts) -> None:
    assert host(1).ipam.request_pool(LOCAL_SPACE, None, None, v6=True).pool == ip_network("fdf7:7765:6674::/64")


def test_the_gateway_is_the_first_free_address_and_the_same_when_asked_again(host: Hosts) -> None:
    ipam = host(1).ipam
    pool = reserve(ipam, "10.1.0.0/24")
    ipam.request_address(pool, ip_address("10.1.0.1"))
    assert str(ipam.request_gateway(pool, None)) == "10.1.0.2"
    assert str(ipam.request_gateway(pool, None)) == "10.1.0.2"
    assert str(ipam.request_gateway(pool, ip_address("10.1.0.2"))) == "10.1.0.2"
    with pytest.raises(Conflict, match=r"the gateway of pool 10.1.0.0/24 is 10.1.0.2: type --gateway 10.1.0.2"):
        ipam.request_gateway(pool, ip_address("10.1.0.9"))


def test_automatic_addresses_stay_in_the_ip_range_and_fixed_ones_need_not(host: Hosts) -> None:
    ipam = host(1).ipam
    pool = reserve(ipam, "10.1.0.0/16", "10.1.4.0/29")
    given_out = {ipam.request_address(pool, None) for _ in range(8)}
    assert given_out == set(ip_network("10.1.4.0/29"))
    assert ipam.request_address(pool, ip_address("10.1.9.9")) == ip_address("10.1.9.9")
    with pytest.raises(Exhausted, match=r"pool 10.1.0.0/16, range 10.1.4.0/29, is full: 8 of 8 addresses in use"):
        ipam.request_address(pool, None)


def test_a_full_pool_says_so(host: Hosts) -> None:
    one = host(1)
    one.create_network("n1", "10.1.0.0/29")
    for _ in range(5):
        one.ipam.request_address(pool_id("10.1.0.0/29"), None)
    with pytest.raises(Exhausted, match=r"pool 10.1.0.0/29 is full: 5 of 5 addresses in use"):
        one.ipam.request_address(pool_id("10.1.0.0/29"), None)


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("10.1.0.0", InvalidRequest, "network or broadcast address"),
        ("10.1.0.255", InvalidRequest, "network or broadcast address"),
        ("10.2.0.1", InvalidRequest, "is not in pool"),
        ("fd00::1", InvalidRequest, "is not in pool"),
        ("10.1.0.1", Conflict, "it is the network's gateway address"),
        ("10.1.0.7", Conflict, "a container that is starting on host h1 has it"),
    ],
)
def test_a_fixed_address_that_cannot_be(host: Hosts, address: str, error: type[Exception], words: str) -> None:
    one = host(1)
    one.create_network("n1", "10.1.0.0/24")
    one.ipam.request_address(pool_id("10.1.0.0/24"), ip_address("10.1.0.7"))
    with pytest.raises(error, match=words):
        host(2).ipam.request_address(pool_id("10.1.0.0/24"), ip_address(address))


def test_release_is_idempotent_and_frees_own_unheld_addresses_only(host: Hosts) -> None:
    one, two = host(1), host(2)
    one.create_network("n1", "10.1.0.0/24")
    pool, address = pool_id("10.1.0.0/24"), ip_address("10.1.0.7")
    one.ipam.request_address(pool, address)
    two.ipam.release_address(pool, address)
    with pytest.raises(Conflict):
        two.ipam.request_address(pool, address)
    one.ipam.release_address(pool, address)
    one.ipam.release_address(pool, address)
    one.ipam.release_address(pool, ip_address("10.1.0.1"))
    two.ipam.request_address(pool, address)
    assert one.ipam.request_gateway(pool, None) == ip_address("10.1.0.1")


def test_an_address_of_a_living_endpoint_is_not_released(host: Hosts) -> None:
    one = host(1)
    one.create_network("n1", "10.1.0.0/24")
    endpoint = one.run("n1", "e1", "10.1.0.0/24")
    one.ipam.release_address(pool_id("10.1.0.0/24"), ip_address(endpoint.addresses[0]))
    with pytest.raises(Conflict):
        host(2).ipam.request_address(pool_id("10.1.0.0/24"), ip_address(endpoint.addresses[0]))


def test_an_address_just_released_is_given_last(host: Hosts) -> None:
    one = host(1)
    pool = reserve(one.ipam, "10.1.0.0/29")
    addresses = [one.ipam.request_address(pool, None) for _ in range(6)]
    for address in addresses[:3]:
        one.ipam.release_address(pool, address)
    one.ipam._cooling._released.pop(addresses[0])
    assert one.ipam.request_address(pool, None) == addresses[0]
    assert {one.ipam.request_address(pool, None) for _ in range(2)} == set(addresses[1:3])


def test_releasing_a_reserved_pool_frees_everything_in_it(host: Hosts, store: SqliteStore) -> None:
    one = host(1)
    before = store.list("").entries
    pool = reserve(one.ipam, "10.1.0.0/24")
    one.ipam.request_gateway(pool, None)
    one.ipam.request_address(pool, None)
    one.ipam.release_pool(pool.pool)
    one.ipam.release_pool(pool.pool)
    assert store.list("").entries == before


def test_a_pool_stays_until_the_last_network_that_asked_for_it_is_gone(host: Hosts) -> None:
    """As a macvlan network on two hosts, and a second one on the first that the engine rolls back."""
    one, two = host(1), host(2)
    pool = reserve(one.ipam, "10.1.0.0/24")
    gateway = one.ipam.request_gateway(pool, None)
    reserve(two.ipam, "10.1.0.0/24")
    reserve(two.ipam, "10.1.0.0/24")
    address = two.ipam.request_address(pool, None)
    two.ipam.release_address(pool, gateway)
    two.ipam.release_pool(pool.pool)
    one.ipam.release_pool(pool.pool)
    for taken in (address, gateway):
        with pytest.raises(Conflict, match="is taken"):
            one.ipam.request_address(pool, taken)
    two.ipam.release_pool(pool.pool)
    two.ipam.release_pool(pool.pool)
    with pytest.raises(NotFound, match=r"pool 10.1.0.0/24 is not known"):
        two.ipam.request_address(pool, None)


def test_hosts_that_ask_at_once_have_one_gateway(store: SqliteStore) -> None:
    hosts = [Ipam(store, f"h{n}", ranges=(), host_routes=list[IPNetwork]) for n in range(4)]
    for number in range(10):
        pool = reserve(hosts[0], f"10.1.{number}.0/24")
        gateways: list[str] = []
        barrier = threading.Barrier(len(hosts))

        def ask(ipam: Ipam, pool: PoolId = pool, gateways: list[str] = gateways, gate: Any = barrier) -> None:
            gate.wait()
            gateways.append(str(ipam.request_gateway(pool, None)))

        together(*(partial(ask, ipam) for ipam in hosts))
        assert gateways == [f"10.1.{number}.1"] * len(hosts)


def test_a_networks_pool_survives_release_pool(host: Hosts) -> None:
    one = host(1)
    one.create_network("n1", "10.1.0.0/24")
    one.ipam.release_pool(ip_network("10.1.0.0/24"))
    one.run("n1", "e1", "10.1.0.0/24")


@pytest.fixture
def swarm(host: Hosts) -> tuple[FakeHost, FakeHost, PoolId, PoolId]:
    """A leader, a node that has the network, and their ids of its pool."""
    leader, node = host(1), host(2)
    network = ip_network("10.1.0.0/24")
    in_global = leader.ipam.request_pool(GLOBAL_SPACE, network, None, v6=False)
    leader.ipam.request_gateway(in_global, None)
    node.create_network("n1", str(network))
    return leader, node, in_global, PoolId(LOCAL_SPACE, network)


Swarm = tuple[FakeHost, FakeHost, PoolId, PoolId]


def attach(node: FakeHost, endpoint: str, pool: PoolId, address: IPAddress) -> None:
    assert node.ipam.request_address(pool, address) == address
    node.driver.create_endpoint(EndpointRequest("n1", endpoint, (str(address),), ""))


def taken(node: FakeHost, address: IPAddress) -> bool:
    return node.store.get(address_key("10.1.0.0/24", str(address))) is not None


def test_swarms_address_is_confirmed_on_the_node_and_given_back_by_whoever_leads(swarm: Swarm, host: Hosts) -> None:
    leader, node, in_global, in_local = swarm
    address = leader.ipam.request_address(in_global, None)
    attach(node, "e1", in_local, address)
    node.driver.delete_endpoint("n1", "e1")
    node.ipam.release_address(in_local, address)
    assert taken(node, address)
    host(3).ipam.release_address(in_global, address)
    assert not taken(node, address)
    assert not node.store.list("ipam/pending/").entries


def test_a_leader_that_begins_asks_for_everything_again(swarm: Swarm, host: Hosts) -> None:
    leader, node, in_global, in_local = swarm
    address = leader.ipam.request_address(in_global, None)
    attach(node, "e1", in_local, address)
    for other in (leader, host(3)):
        assert other.ipam.request_pool(GLOBAL_SPACE, in_global.pool, None, v6=False) == in_global
        assert other.ipam.request_address(in_global, address) == address
    leader.ipam.release_pool(in_global.pool, space=GLOBAL_SPACE)
    node.remove_network("n1", "10.1.0.0/24")
    assert not node.store.list("ipam/").entries


def test_an_address_that_swarm_gives_up_while_a_silent_node_has_it_goes_with_the_endpoint(swarm: Swarm) -> None:
    leader, node, in_global, in_local = swarm
    address = leader.ipam.request_address(in_global, None)
    attach(node, "e1", in_local, address)
    leader.ipam.release_address(in_global, address)
    with pytest.raises(Conflict):
        leader.ipam.request_address(in_global, address)
    node.driver.delete_endpoint("n1", "e1")
    node.ipam.release_address(in_local, address)
    assert not taken(node, address)


def test_two_containers_cannot_use_one_address_of_swarm(swarm: Swarm) -> None:
    leader, node, in_global, in_local = swarm
    address = leader.ipam.request_address(in_global, None)
    attach(node, "e1", in_local, address)
    leader.ipam.request_address(in_global, address)
    with pytest.raises(Taken):
        attach(node, "e2", in_local, address)


def test_swarms_pool_is_no_hosts(swarm: Swarm) -> None:
    leader, node, in_global, _ = swarm
    address = leader.ipam.request_address(in_global, None)
    node.remove_network("n1", "10.1.0.0/24")
    leader.ipam.release_pool(in_global.pool, entirely=True)  # as a collector would
    assert taken(node, address)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([27, 28, 29]), steps=st.integers(5, 40))
def test_concurrent_hosts_never_share_an_address(seed: int, size: int, steps: int) -> None:
    """Three hosts, each in its own thread, take and give back at random; holders are tracked outside of weft."""
    holders: dict[str, int] = {}
    lock = threading.Lock()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "weft.db")
        pool = reserve(
            Ipam(store, "h0", ranges=from_environment({}).pools, host_routes=list[IPNetwork]), f"10.1.0.0/{size}"
        )

        def work(number: int) -> None:
            rng = random.Random(seed + number)
            ipam = Ipam(store, f"h{number}", ranges=(), host_routes=list[IPNetwork], rng=rng)
            mine: list[str] = []
            for _ in range(steps):
                if mine and rng.random() < 0.4:
                    address = mine.pop(rng.randrange(len(mine)))
                    with lock:
                        del holders[address]
                    ipam.release_address(pool, ip_address(address))
                    ipam.release_address(pool, ip_address(address))
                    continue
                try:
                    address = str(ipam.request_address(pool, None))
                except Exhausted:
                    continue
                with lock:
                    if address in holders:
                        faults.append(f"{address} given to h{number} while h{holders[address]} has it")
                    holders[address] = number
                mine.append(address)

        together(*(partial(work, number) for number in range(3)))
        kept = {entry.key.rsplit("/", 1)[1] for entry in store.list("ipam/addresses/").entries}
        store.close()
    assert not faults
    assert kept == set(holders)
