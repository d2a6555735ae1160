"""What others wrote into the store: it is named, and stops nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.unit.conftest import FakeHost
from weft.cluster import Cluster
from weft.doctor.facts import PROBED, Report
from weft.engine.collector import Collector
from weft.engine.inventory import Inventory
from weft.engine.mirror import Mirror
from weft.engine.sweeper import Outcome, Sweeper
from weft.errors import Conflict, EngineError, Exhausted, StoreError, Unreadable, WeftError
from weft.foreign import _READ, Foreign, foreign
from weft.ipam import LOCAL_SPACE, PoolId
from weft.model import (
    ADDRESSES,
    ALIVE,
    BINDINGS,
    ENDPOINTS,
    ENGINES,
    HOSTS,
    INHERIT,
    MACS,
    MEMBERS,
    NAMES,
    NETWORKS,
    PENDING,
    POOLS,
    QUESTIONS,
    REPORTS,
    Allocation,
    Binding,
    Endpoint,
    EndpointNames,
    Host,
    Member,
    Network,
    Pool,
    PoolClaim,
    Published,
    _left_out,
)
from weft.probes.links import REQUESTS, RESULTS, Results, request_key
from weft.schema import check_schema
from weft.store import Delete, Entry, Put, Snapshot
from weft.store.sqlite import SqliteStore
from weft.topology import Limit, limit

GARBAGE = ["", "nonsense", "[]", "5", "null", '"id"', "{}", "[" * 100_000, "\ufffd"]
NETWORK = Network(5, "app", (Pool("10.0.0.0/24", "10.0.0.1"),), 0, False, "h1")
ENDPOINT = Endpoint("e1", 5, "02:42:0a:00:00:02", ("10.0.0.2",), "a" * 32)
HOST = Host("a" * 32, "h1", "192.0.2.1")
WRONG = [
    replace(HOST, underlay="here"),
    replace(HOST, name=7),  # type: ignore[arg-type]
    replace(ENDPOINT, mac="02:42"),
    replace(ENDPOINT, addresses=("10.0.0.2/24",)),
    replace(ENDPOINT, addresses=(7,)),  # type: ignore[arg-type]
    replace(ENDPOINT, vni="5"),  # type: ignore[arg-type]
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
    assert one.driver.networks.find("5").vni == 5
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
        mirror = Mirror(store, one.record, one.cluster, one.driver.networks, engine, enabled=True)
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
    for asked, error in enumerate((StoreError("away"), EngineError("away")), 4):
        Sweeper(engine, store, one.record, one.cluster, [Asked(error), last]).sweep()
        assert last.asked == asked


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
    mirror = Mirror(store, one.record, one.cluster, one.driver.networks, engine, enabled=True)
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
        lambda: one.driver.networks.find("app"),
        lambda: one.driver.delete_endpoint("n1", "e1"),
        lambda: one.ipam.release_address(pool, taken),
        lambda: one.remove_network("n1", "10.0.0.0/24"),
        lambda: one.driver.networks.remove_unused(network.vni),
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


@pytest.mark.parametrize(("name", "value"), [("rate", 10**11), ("rate", -1), ("mtu", 10**26), ("mtu", -1)])
def test_numbers_that_the_kernel_has_no_room_for_leave_only_their_record_out(name: str, value: int) -> None:
    network = Network(7, "app", (Pool("10.1.0.0/24"),), 0, False, "h1")
    endpoint = Endpoint("e1", 7, "02:42:0a:01:00:02", ("10.1.0.2",), "h1")
    records: list[Any] = [network, endpoint]
    for record in records:
        spoilt = replace(record, **{name: value})
        with pytest.raises(Unreadable, match=f"{name} -?[0-9]+ is not from 0 to"):
            type(record).read(Entry(spoilt.key, spoilt.encode(), 1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70000), ("ttl", 999), ("dscp", 500), ("source_ports", "x"), ("source_ports", "5-4"), ("mtu", -1)],
)
def test_so_do_options_that_no_device_can_have(name: str, value: int | str) -> None:
    network: Any = Network(7, "app", (Pool("10.1.0.0/24"),), 0, False, "h1")
    spoilt = replace(network, **{name: value})
    with pytest.raises(Unreadable):
        Network.read(Entry(spoilt.key, spoilt.encode(), 1))


@pytest.mark.parametrize("name", ["mtu", "path_mtu", "wg_port"])
def test_so_do_a_hosts_numbers(name: str) -> None:
    host: Any = Host("f" * 32, "h1", "192.0.2.1")
    with pytest.raises(Unreadable, match=f"{name} 70000 is not from 0 to"):
        Host.read(Entry(host.key, replace(host, **{name: 70000}).encode(), 1))


def test_a_host_whose_underlay_carries_nothing_leaves_others_an_mtu_that_devices_can_have() -> None:
    hosts = [Host("e" * 32, "h1", "192.0.2.1", mtu=1500), Host("f" * 32, "h2", "192.0.2.2", mtu=10)]
    assert limit(hosts) == Limit(68, "h2")


@pytest.fixture
def living(host: Callable[..., FakeHost], store: SqliteStore) -> FakeHost:
    """A host with something of every kind in the store."""
    one = host()
    check_schema(store)
    one.create_network("n1", "10.0.0.0/24", "fd00::/64", vni=5)
    endpoint = one.run("n1", "e1", "10.0.0.0/24")
    one.ipam.request_address(PoolId.parse(f"{LOCAL_SPACE}/fd00::/64"), ip_address("fd00::9"))
    names = EndpointNames(5, endpoint.id, one.record.id, "web")
    report = Report(one.record.id, "h1", "q", 0.0, "1")
    results, asked = Results(one.record.id), request_key(one.record.id, "b" * 32)
    keys = {
        one.record.alive_key: "",
        QUESTIONS + "q": one.record.id,
        f"{REPORTS}q/{one.record.id}": report.encode(),
        f"{REPORTS}q/{one.record.id}{PROBED}": "",
        names.key: names.encode(),
        NAMES + "a/b": "5",
        ENGINES + one.record.id: "any",
        results.key: results.encode(),
        asked: "1",
    }
    store.transact([], [Put(key, value) for key, value in keys.items()])
    return one


def test_nothing_that_weft_writes_is_foreign(living: FakeHost, store: SqliteStore) -> None:
    entries = store.list("").entries
    assert foreign(entries) == {}
    kinds = {kind for kind in _READ if any(entry.key.startswith(kind) for entry in entries)}
    assert kinds == set(_READ)


@pytest.mark.parametrize("value", GARBAGE)
def test_what_is_broken_is_named(living: FakeHost, store: SqliteStore, value: str) -> None:
    """Of each entry; a few kinds may have any value."""
    any_value = (ALIVE, ENGINES, PENDING, REQUESTS)
    for entry in store.list("").entries:
        if entry.key.startswith(any_value) or entry.key.endswith(PROBED) or value in ("5", entry.value):
            continue
        others = [one for one in store.list("").entries if one.key != entry.key]
        assert entry.key in foreign([*others, Entry(entry.key, value, 1)])


LONE = "c" * 32
LEAKED = Allocation("10.0.0.0/24", "10.0.0.9", LONE, endpoint="e9")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("unknown", "", "weft knows no such key"),
        ("topology/unknown/7", "", "weft knows no such key"),
        ("schema/2", "1", "weft knows no such key"),
        (ALIVE + LONE, "", f"no topology/hosts/{LONE}"),
        (ENGINES + LONE, "any", f"no topology/hosts/{LONE}"),
        (f"{PENDING}{LONE}/10.0.0.0/24/10.0.0.7", "", f"no topology/hosts/{LONE}"),
        (RESULTS + LONE, Results(LONE).encode(), f"no topology/hosts/{LONE}"),
        (request_key(LONE, LONE), "1", f"no topology/hosts/{LONE}"),
        (QUESTIONS + "q2", LONE, f"no topology/hosts/{LONE}"),
        (f"{BINDINGS}{1:032x}/n9", Binding(9, "n9").encode(), "no topology/networks/9"),
        (f"{BINDINGS}{1:032x}/n9", Binding(5, "n8").encode(), "it belongs to n8"),
        (f"{MEMBERS}9/{1:032x}", Member(9, f"{1:032x}", "n9").encode(), "no topology/networks/9"),
        (f"{MEMBERS}5/{LONE}", Member(5, LONE, "n9").encode(), f"no topology/hosts/{LONE}"),
        (f"{ENDPOINTS}5/e9", replace(ENDPOINT, id="e9", host=LONE).encode(), f"no topology/hosts/{LONE}"),
        (f"{ENDPOINTS}9/e9", replace(ENDPOINT, id="e9", vni=9).encode(), "no topology/networks/9"),
        ("topology/names/5/e9", EndpointNames(5, "e9", f"{1:032x}", "x").encode(), "no topology/endpoints/5/e9"),
        (f"{MACS}5/02:42:0a:00:00:09", "e9", "no topology/endpoints/5/e9"),
        (NAMES + "other", "9", "no topology/networks/9"),
        (POOLS + "10.9.0.0/24", PoolClaim("10.9.0.0/24", users={LONE: 1}).encode(), "no topology/networks/0"),
        (f"{ADDRESSES}10.9.0.0/24/10.9.0.9", Allocation("10.9.0.0/24", "10.9.0.9", LONE).encode(), "no ipam/pools/"),
        (f"{ADDRESSES}10.0.0.0/24/10.0.0.9", Allocation("10.0.0.0/24", "10.0.0.9", LONE).encode(), "no ipam/pending/"),
        (f"{ADDRESSES}10.0.0.0/24/10.0.0.9", LEAKED.encode(), "no e9 or"),
    ],
)  # fmt: skip
def test_what_belongs_to_nothing_is_named_and_can_be_deleted(
    living: FakeHost, store: SqliteStore, key: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.foreign._AGAIN_SECONDS", 0)
    before = store.list("").entries
    store.transact([], [Put(key, value)])
    one = Foreign(store, living.cluster)
    (found,) = (one.look() or {}).items()
    assert found[0] == key
    assert words in found[1]
    assert one.known == {key: found[1]}
    assert one.delete(key) == found[1]
    assert one.known == {}
    assert store.list("").entries == before
    for own in (living.record.key, key):
        with pytest.raises(Conflict):
            one.delete(own)


def test_what_was_found_is_forgotten_when_it_is_gone(living: FakeHost, store: SqliteStore) -> None:
    store.transact([], [Put("unknown", ""), Put("unknown2", "")])
    one = Foreign(store, living.cluster)
    one.look()
    store.transact([], [Delete("unknown")])
    assert one.known.keys() == {"unknown", "unknown2"}
    one.check()
    assert one.known.keys() == {"unknown2"}


def test_what_the_mirror_left_out_is_known_until_it_is_gone_or_right(store: SqliteStore) -> None:
    cluster = mirror((NETWORKS + "9", "{"), ("topology/unknown", ""))
    one = Foreign(store, cluster)
    assert one.known.keys() == {NETWORKS + "9", "topology/unknown"}
    cluster.apply([("topology/unknown", None), (NETWORKS + "9", replace(NETWORK, vni=9).encode())])
    assert one.known == {}


def test_what_is_only_just_made_is_not_foreign(living: FakeHost) -> None:
    """An entry that belongs to nothing at one look, and to something at the next."""
    entries = living.store.list("").entries
    looks = [Snapshot(tuple(e for e in entries if e.key != living.record.key), 1), Snapshot(entries, 2)]
    store: Any = SimpleNamespace(pages=lambda _: iter([looks.pop(0)]))
    assert Foreign(store, living.cluster).look() == {}
    assert looks == []


def test_a_store_is_read_in_parts(living: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry in a part of its own, before or after what it belongs to; and the listing begins anew once."""
    monkeypatch.setattr("weft.foreign._AGAIN_SECONDS", 0)
    for entries in (living.store.list("").entries, living.store.list("").entries[::-1]):
        parts = [Snapshot((entry,), 1, first=entry is entries[0], last=False) for entry in entries]
        stale = Snapshot((Entry("unknown", "", 1),), 1, last=False)
        store: Any = SimpleNamespace(pages=lambda _, news=(stale, *parts): iter(news))
        assert Foreign(store, living.cluster).look() == {}


def test_a_store_too_large_to_be_read_in_time_is_not_looked_through(living: FakeHost) -> None:
    read = []

    def pages(_: str) -> Iterator[Snapshot]:
        while True:
            read.append(1)
            yield Snapshot((), 1, first=len(read) == 1, last=False)

    store: Any = SimpleNamespace(pages=pages)
    assert Foreign(store, living.cluster).look(until=monotonic() - 1) is None
    assert read == [1]
