"""Networks and endpoints: what is made, joined, refused, undone."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import TypeVar

import pytest

from tests.unit.conftest import FakeHost
from weft.dataplane import Port, Shaper, Vxlan
from weft.driver import EndpointRequest, mac_of
from weft.errors import Conflict, InvalidRequest, KernelError, NotFound, StoreError
from weft.ipam import LOCAL_SPACE, PoolId
from weft.model import EndpointNames, Network, Pool, endpoints_prefix, network_key
from weft.networks import NetworkRequest, PoolRequest
from weft.options import NetworkOptions
from weft.store import KeyIs, Put
from weft.store.sqlite import SqliteStore

T = TypeVar("T")
Hosts = Callable[..., FakeHost]
CIDR = "10.1.0.0/24"


def test_the_same_subnet_is_the_same_network_on_every_host(host: Hosts) -> None:
    one, two = host(1), host(2)
    made = one.create_network("n1", CIDR, mtu=1400)
    assert two.create_network("n2", CIDR) == made
    assert made.creator == "h1"


def test_creating_twice_is_the_same(host: Hosts, store: SqliteStore) -> None:
    one = host(1)
    made = one.create_network("n1", CIDR)
    before = store.list("topology/")
    assert one.create_network("n1", CIDR) == made
    assert store.list("topology/").entries == before.entries


@pytest.mark.parametrize(
    ("cidrs", "options", "internal", "difference"),
    [
        ([CIDR], {"mtu": 1300}, False, "its mtu is automatic, not 1300"),
        ([CIDR], {}, True, "it is not internal"),
        ([CIDR, "fd00::/64"], {}, False, "its subnets are 10.1.0.0/24, not 10.1.0.0/24, fd00::/64"),
        ([CIDR], {"vni": 7}, False, "subnet and options mean different networks"),
        ([CIDR], {"network": "9"}, False, "there is no weft network '9'"),
    ],
)
def test_joining_with_other_properties_is_refused_with_the_difference(
    host: Hosts, cidrs: list[str], options: dict[str, int | str], internal: bool, difference: str
) -> None:
    host(1).create_network("n1", CIDR)
    two = host(2)
    with pytest.raises((Conflict, NotFound), match=difference):
        two.create_network("n2", *cidrs, internal=internal, **options)


def test_a_refused_join_says_who_made_the_network_and_what_to_type(host: Hosts) -> None:
    host(1).create_network("n1", CIDR)
    with pytest.raises(Conflict, match=r"made on host h1, cannot be used like that: .*Type --subnet 10.1.0.0/24"):
        host(2).create_network("n2", CIDR, internal=True)


def test_one_engine_has_a_network_once(host: Hosts) -> None:
    one = host(1)
    one.create_network("n1", CIDR)
    with pytest.raises(Conflict, match="is on this host already, as Docker network n1"):
        one.create_network("n1again", CIDR)


def test_a_network_is_found_by_vni_and_by_name(host: Hosts, store: SqliteStore) -> None:
    one = host(1)
    network = one.create_network("n1", CIDR, vni=42)
    assert network.vni == 42
    assert host(2).create_network("n2", CIDR, network="42") == network
    assert host(3).create_network("n3", CIDR, vni=42) == network


def test_default_ipam_is_refused_with_the_command_to_type(host: Hosts) -> None:
    request = NetworkRequest("n1", (PoolRequest("LocalDefault", Pool(CIDR)),), NetworkOptions(), False)
    with pytest.raises(
        InvalidRequest, match=r"docker network create -d weft --ipam-driver weft --subnet 10.1.0.0/24 NAME"
    ):
        host(1).driver.networks.create(request)


def test_an_mtu_that_does_not_fit_is_refused_with_the_one_that_does(host: Hosts) -> None:
    with pytest.raises(InvalidRequest, match="mtu=1451 does not fit: 1450 is the most that the underlay of host h1"):
        host(1).create_network("n1", CIDR, mtu=1451)
    wide, narrow = host(2, mtu=9000), host(3, mtu=1400)
    wide.cluster.load(narrow.store.list("topology/").entries)
    with pytest.raises(InvalidRequest, match="mtu=8950 does not fit: 1350 is the most that the underlay of host h3"):
        wide.create_network("n1", CIDR, mtu=8950)


def test_a_network_for_ipv6_has_the_mtu_that_ipv6_needs(host: Hosts) -> None:
    with pytest.raises(InvalidRequest, match="mtu=1279 is too small for IPv6, which needs 1280"):
        host(1).create_network("n1", CIDR, "fd00:1::/64", mtu=1279)
    assert host(1).create_network("n1", CIDR, mtu=576).mtu == 576


def test_a_kernel_without_vxlan_is_named_and_nothing_is_left(host: Hosts, store: SqliteStore) -> None:
    one = host(1)
    one.kernel.vxlan_error = errno.EOPNOTSUPP
    before = [e for e in store.list("").entries if not e.key.startswith("ipam/")]
    with pytest.raises(KernelError, match="load the vxlan module"):
        one.create_network("n1", CIDR)
    assert [e for e in store.list("").entries if not e.key.startswith("ipam/")] == before
    one.kernel.vxlan_error = 0
    one.create_network("n1", CIDR)


def test_the_last_host_takes_the_network_along(host: Hosts, store: SqliteStore) -> None:
    one, two = host(1), host(2)
    before = store.list("").entries
    vni = one.create_network("n1", CIDR).vni
    two.create_network("n2", CIDR)
    two.run("n2", "e2", CIDR)
    one.remove_network("n1", CIDR)
    one.driver.networks.delete("n1")
    assert store.get(network_key(vni))
    two.remove_network("n2", CIDR)
    two.driver.networks.delete("unknown")
    assert store.list("").entries == before
    assert not any(name.startswith("wp") for name in two.kernel.links)


def test_an_endpoint_is_recorded_and_plumbed(host: Hosts) -> None:
    one = host(1)
    network = one.create_network("n1", CIDR)
    endpoint = one.run("n1", "e" * 64, CIDR)
    assert endpoint.mac == mac_of(endpoint.addresses[0])
    assert set(one.kernel.links) == {f"br{network.vni}", f"vx{network.vni}", "wp" + "e" * 12}
    assert one.driver.join("n1", "e" * 64) == "wc" + "e" * 12


def test_an_endpoints_rate_is_its_own_or_the_networks(host: Hosts) -> None:
    one = host(1)
    network = one.create_network("n1", CIDR, rate=10**8, multicast=10**6, tx_checksum=False)
    rates = {"a" * 64: None, "b" * 64: 5 * 10**6, "c" * 64: 0}
    assert [one.run("n1", name, CIDR, rate=rate).rate for name, rate in rates.items()] == [10**8, 5 * 10**6, 0]
    tunnel = one.kernel.links[f"vx{network.vni}"]
    assert isinstance(tunnel, Vxlan)
    assert (tunnel.multicast, tunnel.offload) == (True, False)
    shapers = {link for link in one.kernel.links.values() if isinstance(link, Shaper)}
    ports = "wp" + "a" * 12, "wp" + "b" * 12
    assert shapers == {Shaper(ports[0], 10**8), Shaper(ports[1], 5 * 10**6), Shaper(tunnel.name, 10**6)}
    assert [link.rate for link in one.kernel.links.values() if isinstance(link, Port)] == [10**8, 5 * 10**6, 0]
    one.driver.delete_endpoint("n1", "a" * 64)
    assert not {ports[0], "s" + ports[0]} & one.kernel.links.keys()


def test_an_endpoint_whose_rate_cannot_be_kept_is_refused_and_nothing_is_left(host: Hosts, store: SqliteStore) -> None:
    one = host(1)
    network = one.create_network("n1", CIDR)
    one.kernel.broken.add("swp" + "e" * 12)
    with pytest.raises(KernelError, match="create swp"):
        one.run("n1", "e" * 64, CIDR, rate=10**8)
    assert not store.list(endpoints_prefix(network.vni)).entries
    assert not [name for name in one.kernel.links if "wp" in name]
    one.run("n1", "f" * 64, CIDR)


def test_the_store_is_asked_once_for_each_step_of_a_container(
    host: Hosts, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store may be far away: what can be guessed is not read first."""
    one = host()
    one.create_network("n1", CIDR)
    one.run("n1", "e1", CIDR)
    asked: list[str] = []
    transaction = SqliteStore._transaction

    def count(store: SqliteStore, begin: str) -> AbstractContextManager[sqlite3.Connection]:
        asked.append(begin)
        return transaction(store, begin)

    def asking(call: Callable[[], T]) -> tuple[T, int]:
        asked.clear()
        return call(), len(asked)

    monkeypatch.setattr(SqliteStore, "_transaction", count)
    pool = PoolId.parse(f"{LOCAL_SPACE}/{CIDR}")
    address, times = asking(lambda: one.ipam.request_address(pool, None))
    assert times == 1
    request = EndpointRequest("n1", "e2", (str(address),), "")
    endpoint, times = asking(lambda: one.driver.create_endpoint(request))
    assert times == 1
    one.cluster.load(store.list("topology/").entries)
    assert asking(lambda: one.driver.delete_endpoint("n1", endpoint.id)) == (None, 1)
    assert asking(lambda: one.ipam.release_address(pool, address)) == (None, 2)
    left = {entry.key for entry in store.list("").entries}
    assert not {key for key in left if endpoint.id in key or key.endswith(f"/{address}") or endpoint.mac in key}


def test_what_the_mirror_does_not_know_yet_is_deleted_all_the_same(host: Hosts, store: SqliteStore) -> None:
    one = host()
    network = one.create_network("n1", CIDR)
    endpoint = one.run("n1", "e1", CIDR)
    one.cluster.load(store.list("topology/").entries)
    store.transact([], [Put(endpoint.key, replace(endpoint, mtu=1300).encode())])
    one.driver.delete_endpoint("n1", "e1")
    one.run("n1", "e2", CIDR)
    one.driver.delete_endpoint("n1", "e2")
    assert not store.list(endpoints_prefix(network.vni)).entries


def test_creating_an_endpoint_twice_is_the_same_and_with_other_content_refused(host: Hosts) -> None:
    one = host(1)
    one.create_network("n1", CIDR)
    endpoint = one.run("n1", "e1", CIDR)
    again = EndpointRequest("n1", "e1", endpoint.addresses, "")
    assert one.driver.create_endpoint(again) == endpoint
    with pytest.raises(Conflict, match=r"endpoint e1 .* exists with other addresses"):
        one.driver.create_endpoint(EndpointRequest("n1", "e1", ("10.1.0.99",), ""))


def test_an_address_in_use_is_refused_to_a_second_endpoint(host: Hosts) -> None:
    one, two = host(1), host(2)
    one.create_network("n1", CIDR)
    two.create_network("n2", CIDR)
    used = one.run("n1", "e1", CIDR).addresses
    with pytest.raises(Conflict, match="is in use by endpoint e1"):
        one.driver.create_endpoint(EndpointRequest("n1", "e2", used, "02:00:00:00:00:01"))
    with pytest.raises(Conflict, match="is in use by endpoint e1"):
        two.driver.create_endpoint(EndpointRequest("n2", "e3", used, "02:00:00:00:00:01"))
    with pytest.raises(Conflict, match="is the gateway address"):
        two.driver.create_endpoint(EndpointRequest("n2", "e3", ("10.1.0.1",), ""))
    with pytest.raises(InvalidRequest, match="is in none of the pools"):
        two.driver.create_endpoint(EndpointRequest("n2", "e3", ("10.2.0.1",), ""))


def test_a_refusal_names_the_container_that_has_the_address_or_the_mac(host: Hosts, store: SqliteStore) -> None:
    one, two = host(1), host(2)
    network = one.create_network("n1", CIDR)
    two.create_network("n2", CIDR)
    used = one.run("n1", "e1", CIDR)
    names = EndpointNames(network.vni, "e1", used.host, "web1")
    store.transact([], [Put(names.key, names.encode())])
    with pytest.raises(Conflict, match="is in use by container web1 on host h1: choose another"):
        two.driver.create_endpoint(EndpointRequest("n2", "e2", used.addresses, "02:00:00:00:00:01"))
    with pytest.raises(Conflict, match=f"MAC address {used.mac} .* is in use by container web1 on host h1: choose"):
        two.run("n2", "e2", CIDR, mac=used.mac)
    with pytest.raises(Conflict, match="is taken, container web1 on host h1 has it: choose another"):
        two.ipam.request_address(PoolId(LOCAL_SPACE, ip_network(CIDR)), ip_address(used.addresses[0]))


def test_a_mac_in_use_is_refused_on_the_same_network_only(host: Hosts) -> None:
    one = host(1)
    one.create_network("n1", CIDR)
    one.create_network("n2", "10.2.0.0/24")
    one.run("n1", "e1", CIDR, mac="02:00:00:00:00:01")
    with pytest.raises(Conflict, match=r"MAC address 02:00:00:00:00:01 .* is in use by endpoint e1"):
        one.run("n1", "e2", CIDR, mac="02:00:00:00:00:01")
    one.run("n2", "e3", "10.2.0.0/24", mac="02:00:00:00:00:01")


def test_a_kernel_that_refuses_leaves_no_endpoint(host: Hosts, store: SqliteStore) -> None:
    one = host(1)
    one.create_network("n1", CIDR)
    one.kernel.fail("perform")
    with pytest.raises(KernelError):
        one.run("n1", "e1", CIDR)
    assert not store.list("topology/endpoints/").entries
    assert not one.attachments.pinned()
    one.run("n1", "e1", CIDR)


def test_join_makes_a_lost_veth_again(host: Hosts) -> None:
    one = host(1)
    one.create_network("n1", CIDR)
    one.run("n1", "e1", CIDR)
    one.kernel.links.clear()
    one.driver.join("n1", "e1")
    assert len(one.kernel.links) == 3


def test_join_needs_no_store_once_the_veth_is_there(
    host: Hosts, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(key: str) -> None:
        raise StoreError("the store is away")

    one = host(1)
    one.create_network("n1", CIDR)
    one.run("n1", "e" * 64, CIDR)
    monkeypatch.setattr(store, "get", away)
    assert one.driver.join("n1", "e" * 64) == "wc" + "e" * 12


def test_an_auxiliary_address_or_mtu_that_the_network_lacks_is_refused(host: Hosts) -> None:
    host(1, mtu=9000).create_network("n1", CIDR, mtu=8950)
    with pytest.raises(Conflict, match="its mtu is 8950, but 1450 is the most"):
        host(2).create_network("n2", CIDR)
    pool = PoolRequest(LOCAL_SPACE, Pool(CIDR, "", {"router": "10.1.0.9"}))
    with pytest.raises(Conflict, match=r"does not reserve the auxiliary address 10\.1\.0\.9"):
        host(3, mtu=9000).driver.networks.create(NetworkRequest("n3", (pool,), NetworkOptions(), False))


def test_forgetting_twice_does_not_take_from_the_next_endpoint(host: Hosts, store: SqliteStore) -> None:
    one = host(1)
    network = one.create_network("n1", CIDR)
    old = one.run("n1", "e1", CIDR)
    entry = store.get(old.key)
    assert entry
    one.driver.delete_endpoint("n1", "e1")
    new = one.driver.create_endpoint(EndpointRequest("n1", "e2", old.addresses, ""))
    one.driver._forget(network, old, KeyIs(entry.key, entry.revision))
    with pytest.raises(Conflict, match="is in use by endpoint e2"):
        one.run("n1", "e3", CIDR, mac=new.mac)


def test_unknown_ids(host: Hosts) -> None:
    one = host(1)
    with pytest.raises(NotFound, match="Docker network n9 is not known to weft"):
        one.driver.create_endpoint(EndpointRequest("n9", "e1", ("10.1.0.5",), ""))
    one.create_network("n1", CIDR)
    with pytest.raises(NotFound, match=r"endpoint e9 .* is not known"):
        one.driver.join("n1", "e9")
    one.driver.delete_endpoint("n1", "e9")
    one.driver.delete_endpoint("n9", "e9")


def test_a_restarted_container_may_have_its_address_again(host: Hosts) -> None:
    one = host(1)
    one.create_network("n1", CIDR)
    addresses = one.run("n1", "e1", CIDR).addresses
    one.driver.delete_endpoint("n1", "e1")
    assert one.driver.create_endpoint(EndpointRequest("n1", "e2", addresses, "")).addresses == addresses


@pytest.mark.parametrize(("address", "mac"), [("10.1.2.3", "02:42:0a:01:02:03"), ("fd00::1:2", "02:42:00:01:00:02")])
def test_a_mac_follows_from_the_address(address: str, mac: str) -> None:
    assert mac_of(address) == mac


def test_ipv6_addresses_that_end_alike_have_different_macs() -> None:
    assert len({mac_of(address) for address in ("fd00::5", "fd00::1:0:5", "fd00::2:0:5", "fd00::1:0:0:5")}) == 4


def test_swarm_gets_the_users_options_back_with_a_vni(host: Hosts) -> None:
    options = host(1).driver.networks.allocate({"mtu": "1400"}, [ip_network(CIDR)])
    assert options["mtu"] == "1400"
    assert int(options["weft.vni"]) >= 4096


def test_swarm_joins_the_network_that_has_the_subnet(host: Hosts) -> None:
    one = host(1)
    network = one.create_network("n1", CIDR)
    assert one.driver.networks.allocate({}, [ip_network(CIDR)]) == {"weft.vni": str(network.vni)}


def test_swarm_cannot_name_the_network_to_join(host: Hosts) -> None:
    with pytest.raises(InvalidRequest, match="not for Docker Swarm"):
        host(1).driver.networks.allocate({"weft.network": "app"}, [ip_network(CIDR)])


def test_a_network_without_a_name_is_called_by_its_vni() -> None:
    network = Network(7, "", (), 0, False, "h")
    assert network.title == "network with VNI 7"
