"""What others wrote into the store: it is named, and stops nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address

import pytest

from tests.unit.conftest import FakeHost
from weft.cluster import Cluster
from weft.errors import StoreError, WeftError
from weft.ipam import LOCAL_SPACE, PoolId
from weft.model import ADDRESSES, BINDINGS, ENDPOINTS, HOSTS, MEMBERS, NETWORKS, POOLS, Endpoint, Host, Network, Pool
from weft.store import Entry, Put
from weft.store.sqlite import SqliteStore

GARBAGE = ["", "nonsense", "[]", "5", "null", '"id"', "{}", "[" * 100_000, "\ufffd"]
NETWORK = Network(5, "app", (Pool("10.0.0.0/24", "10.0.0.1"),), 0, False, "h1")
ENDPOINT = Endpoint("e1", 5, "02:42:0a:00:00:02", ("10.0.0.2",), "a" * 32)
HOST = Host("a" * 32, "h1", "192.0.2.1")
WRONG = [
    replace(HOST, underlay="here"),
    replace(HOST, name=7),  # type: ignore[arg-type]
    replace(ENDPOINT, mac="02:42"),
    replace(ENDPOINT, addresses=("10.0.0.2/24",)),
    replace(NETWORK, pools=(Pool("10.0.0.1/24"),)),
    replace(NETWORK, mtu="1500"),  # type: ignore[arg-type]
]


def mirror(*foreign: tuple[str, str]) -> Cluster:
    cluster = Cluster()
    ours = [(record.key, record.encode()) for record in (NETWORK, ENDPOINT, HOST)]
    cluster.load(Entry(key, value, 1) for key, value in (*foreign, *ours))
    return cluster


@pytest.mark.parametrize("prefix", [HOSTS, NETWORKS, MEMBERS, ENDPOINTS])
@pytest.mark.parametrize("rest", ["", "7", "7/x", "x/y/z", "\ufffd"])
def test_the_mirror_leaves_out_what_it_cannot_read(prefix: str, rest: str, caplog: pytest.LogCaptureFixture) -> None:
    good = mirror()
    for value in GARBAGE:
        caplog.clear()
        cluster = mirror((prefix + rest, value))
        assert (cluster.hosts, cluster.networks, cluster.members) == (good.hosts, good.networks, good.members)
        assert cluster.local_endpoints(5, HOST.id) == [ENDPOINT]
        assert [
            record.getMessage() for record in caplog.records if f"entry {prefix}{rest} is left out" in record.message
        ]


@pytest.mark.parametrize("record", WRONG, ids=str)
def test_a_record_that_would_make_trouble_later_is_left_out(record: Host | Endpoint | Network) -> None:
    cluster = Cluster()
    cluster.apply([(record.key, record.encode())])
    assert not cluster.hosts
    assert not cluster.networks
    assert not cluster.local_endpoints(5, HOST.id)


def test_a_record_under_another_key_is_refused() -> None:
    with pytest.raises(StoreError, match=r"entry topology/hosts/b cannot be read \(ValueError: it belongs to .*/aaaa"):
        Host.read(Entry("topology/hosts/b", HOST.encode(), 1))


@pytest.mark.parametrize("kind", [NETWORKS, MEMBERS, ENDPOINTS, POOLS, ADDRESSES, BINDINGS])
@pytest.mark.parametrize("value", GARBAGE)
def test_the_driver_names_the_entry_that_it_cannot_read(
    host: Callable[..., FakeHost], store: SqliteStore, kind: str, value: str
) -> None:
    one = host()
    network = one.create_network("n1", "10.0.0.0/24")
    endpoint = one.run("n1", "e1", "10.0.0.0/24")
    (key, *_) = [entry.key for entry in store.list(kind).entries if "10.0.0.1" not in entry.key]
    store.transact([], [Put(key, value)])
    pool = PoolId.parse(f"{LOCAL_SPACE}/10.0.0.0/24")
    taken = ip_address(endpoint.addresses[0])
    calls: list[Callable[[], object]] = [
        lambda: one.create_network("n2", "10.0.0.0/25"),
        lambda: one.create_network("n3", "10.0.0.0/24"),
        lambda: one.ipam.request_pool(LOCAL_SPACE, None, None, v6=False),
        lambda: one.ipam.request_address(pool, taken),
        lambda: one.run("n1", "e2", "10.0.0.0/24"),
        lambda: one.driver.find_network("app"),
        lambda: one.driver.delete_endpoint("n1", "e1"),
        lambda: one.ipam.release_address(pool, taken),
        lambda: one.remove_network("n1", "10.0.0.0/24"),
        lambda: one.driver.remove_unused(network.vni),
    ]
    said = ""
    for call in calls:
        with suppress(WeftError):
            try:
                call()
            except StoreError as error:
                said += str(error)
                raise
    assert f"the store's entry {key} cannot be read" in said
