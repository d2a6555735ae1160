"""What others wrote into the store: it is named, and stops nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address

import pytest

from tests.fakes import FakeEngine
from tests.unit.conftest import FakeHost
from weft.cluster import Cluster
from weft.engine.collector import Collector
from weft.engine.inventory import Inventory
from weft.engine.mirror import Mirror
from weft.engine.sweeper import Outcome, Sweeper
from weft.errors import Conflict, EngineError, Exhausted, StoreError, Unreadable, WeftError
from weft.ipam import LOCAL_SPACE, PoolId
from weft.model import (
    ADDRESSES,
    BINDINGS,
    ENDPOINTS,
    HOSTS,
    INHERIT,
    MEMBERS,
    NAMES,
    NETWORKS,
    PENDING,
    POOLS,
    Endpoint,
    Host,
    Network,
    Pool,
    Published,
    _left_out,
)
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


@pytest.mark.parametrize(
    "foreign",
    [
        (POOLS + "10.9.0.0/24", "{"),
        (POOLS + "here", "{}"),
        (PENDING + f"{1:032x}/10.0.0.0/24/x", ""),
        (PENDING + f"{1:032x}/x", ""),
        (ADDRESSES + "10.0.0.0/24/10.0.0.9", "{"),
        (NETWORKS + "9", "{"),
        (ENDPOINTS + "5/e9", "{"),
        (NAMES + "other", "nine"),
    ],
    ids=str,
)
def test_what_is_in_lists_only_is_left_out_of_them_and_said_once(
    host: Callable[..., FakeHost], store: SqliteStore, foreign: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    one = host()
    _left_out.clear()
    store.transact([], [Put(*foreign)])
    one.create_network("n1", "10.0.0.0/24", vni=5)
    one.run("n1", "e1", "10.0.0.0/24")
    assert one.driver.find_network("5").vni == 5
    with pytest.raises(Conflict, match=r"pool 10\.0\.0\.0/25 overlaps 10\.0\.0\.0/24"):
        one.create_network("n2", "10.0.0.0/25")
    full = PoolId.parse(f"{LOCAL_SPACE}/10.0.0.0/24/10.0.0.8/30")
    with suppress(Exhausted):
        while True:
            assert one.ipam.request_address(full, None) != ip_address("10.0.0.9") or ADDRESSES not in foreign[0]
    engine = FakeEngine()
    for _ in range(2):
        one.cluster.load(store.list("topology/").entries)
        collector = Collector(store, one.record, one.cluster, one.driver, one.ipam, grace=0)
        mirror = Mirror(store, one.record, one.cluster, one.driver, engine, enabled=True)
        Sweeper(engine, store, one.record, one.cluster, [collector, mirror]).sweep()
    assert not [e.key for e in store.list(PENDING).entries if e.key != foreign[0]]
    assert not [e.key for e in store.list(POOLS).entries if e.key != foreign[0]]
    told = [record.message for record in caplog.records if record.message.startswith("left out: ")]
    assert len(told) == (not foreign[0].startswith(NAMES))
    assert all(f"the store's entry {foreign[0]} cannot be read" in text for text in told)


def test_one_sweep_that_cannot_go_on_does_not_keep_the_others(
    host: Callable[..., FakeHost], store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    one, engine = host(), FakeEngine()
    one.cluster.load(store.list("topology/").entries)
    last = Asked()
    failing = [Asked(Unreadable("one entry")), Asked(RuntimeError("a bug"))]
    sweeper = Sweeper(engine, store, one.record, one.cluster, [*failing, last])
    for asked in range(1, 4):
        sweeper.sweep()
        assert last.asked == asked
    said = [record.getMessage() for record in caplog.records if "cannot go on: one entry" in record.message]
    assert len(said) == 1
    for error in (StoreError("away"), EngineError("away")):
        with pytest.raises(type(error)):
            Sweeper(engine, store, one.record, one.cluster, [Asked(error), last]).sweep()
    assert last.asked == 3


class Asked:
    """A sweep that fails with this error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked = 0
        self._error = error

    def sweep(self, inventory: Inventory, pools: Sequence[Entry]) -> Outcome:
        self.asked += 1
        if self._error:
            raise self._error
        return Outcome()

    def forget(self) -> None:
        pass


def test_a_name_that_cannot_be_read_is_reported(host: Callable[..., FakeHost], store: SqliteStore) -> None:
    one, engine = host(), FakeEngine()
    one.create_network("n1", "10.0.0.0/24")
    engine.add("n1", "app", "10.0.0.0/24")
    store.transact([], [Put(NAMES + "app", "nine")])
    mirror = Mirror(store, one.record, one.cluster, one.driver, engine, enabled=True)
    sweeper = Sweeper(engine, store, one.record, one.cluster, [mirror])
    one.cluster.load(store.list("topology/").entries)
    for _ in range(2):
        sweeper.sweep()
    assert "the store's entry names/app cannot be read" in "".join(sweeper.conflicts.values())


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


OPTIONS = [
    *({"port": 4790}, {"udp_checksum": False}, {"dscp": INHERIT}, {"ifname": "app"}),
    *({"multicast": 0}, {"rate": 10**8}, {"tx_checksum": False}),
]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_network_with_an_option_is_unreadable_for_who_would_lose_it(
    option: dict[str, object], encrypted: bool
) -> None:
    """An older weft takes the pools from the top of the record, or from what it knows as an encrypted one."""
    plain = Network(7, "app", (Pool("10.1.0.0/24", "10.1.0.1", {"db": "10.1.0.9"}),), 0, False, "h1")
    network = replace(plain, published=Published({"a": "b"}), encrypted=encrypted, **option)  # type: ignore[arg-type]
    stored = json.loads(network.encode())
    assert stored.keys() == {"network"}
    assert Network.read(Entry(network.key, network.encode(), 1)) == network
    assert "pools" in json.loads(plain.encode())


def test_a_network_with_an_option_of_a_newer_weft_is_left_out() -> None:
    network = Network(7, "app", (Pool("10.1.0.0/24"),), 0, False, "h1", ttl=9)
    newer = network.encode().replace('"ttl"', '"colour"')
    with pytest.raises(Unreadable, match="options that this weft does not know: colour"):
        Network.read(Entry(network.key, newer, 1))
    for text in ('{"network":{}}', '{"network":[1]}', '{"network":null}'):
        with pytest.raises(Unreadable):
            Network.read(Entry(network.key, text, 1))
