"""Metrics: every one that is promised is there and means what it says; and a large cluster costs little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from time import monotonic, thread_time
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.conftest import FakeHost
from tests.unit.test_agent import eventually
from weft.agent.rows import _Wanted
from weft.cluster import Cluster
from weft.dataplane import LinkEvent, Overflow, Peer, Tunnel
from weft.errors import KernelError, StoreError
from weft.health import Health
from weft.model import Endpoint, Host, Network, Pool
from weft.probes.links import ProbeLink
from weft.reconcile import Contact, ObservedTunnel
from weft.status import Status
from weft.store import Entry, Put
from weft.store.measured import MeasuredStore
from weft.store.sqlite import SqliteStore
from weft.web.metrics import FAMILIES, MOST, Metrics, pool_use

CIDR = "10.1.0.0/24"
Samples = dict[str, dict[tuple[str, ...], float]]


@dataclass
class Site:
    """One host's weft as far as metrics read it; its probes and its tunnel are told to it."""

    host: FakeHost
    metrics: Metrics = field(default_factory=lambda: Metrics(reuse=0))
    links: list[ProbeLink] = field(default_factory=list)
    tunnel: ObservedTunnel | None = None
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now = 1e9  # of a clock that never gets there
        self.parts = {
            "presence": SimpleNamespace(problem="", turned=now, seconds=None),
            "encryption": SimpleNamespace(problem="", observe=lambda: self.tunnel),
            "sweeper": SimpleNamespace(problem="", conflicts={}, version=""),
            "names": SimpleNamespace(problem="", answers=True),
            "foreign": SimpleNamespace(known={}),
        }
        host = self.host
        parts = self.parts
        health = Health(host.cluster, host.agent, parts["presence"], parts["encryption"])
        words: dict[str, Any] = {"driver": "weft", "origin": "", "resolver": "1.2.3.4"}
        status = Status(host.me, host.cluster, host.agent, health=health, **parts, **words)
        self.metrics.watch(status, lambda: self.links)

    def scrape(self) -> Samples:
        """By sample, the values by those of the labels."""
        found: Samples = {}
        for family in text_string_to_metric_families(self.metrics.expose().decode()):
            for sample in family.samples:
                labels = next((one.labels for one in FAMILIES if sample.name.startswith(one.name)), ())
                values = [sample.labels[label] for label in (*labels, "le") if label in sample.labels]
                found.setdefault(sample.name, {})[tuple(values)] = sample.value
        return found

    def value(self, name: str, *labels: str) -> float:
        return self.scrape()[name][labels]


@pytest.fixture
def site(host: Callable[..., FakeHost]) -> Site:
    host(2)
    return Site(host(1))


@pytest.fixture
def busy(site: Site) -> Iterator[Site]:
    """One of which every part has something to tell."""
    host = site.host
    host.create_network("n1", CIDR)
    host.agent.start()
    host.run("n1", "a" * 64, CIDR)
    eventually(lambda: bool(host.agent.rows.counts and host.agent.resynced))
    site.links = [link("out", site, 2), link("in", site, 2, corrupt=2)]
    site.tunnel = tunnel(2)
    metrics = site.metrics
    metrics.note_call("NetworkDriver.Join", 0.002, "")
    metrics.note_call("NetworkDriver.Join", 0.2, "refused")
    metrics.note_request("get", 0.001, True)
    metrics.note_question("answered")
    yield site
    host.agent.stop()


def link(direction: str, site: Site, peer: int, **values: Any) -> ProbeLink:
    me, other = site.host.me.id, f"{peer:032x}"
    ends = (me, other) if direction == "out" else (other, me)
    return replace(
        ProbeLink(*ends, "plain", 1450, 1.0, small=0.0, full=0.0, offloaded=0.0, mtu=1450, rtt=1e-4), **values
    )


def tunnel(peers: int) -> ObservedTunnel:
    contacts = {f"key{number}": Contact(1_700_000_000 + number, 100, 200) for number in range(peers)}
    return ObservedTunnel(Tunnel("key", "100.64.0.1", 51820, 1420, frozenset[Peer]()), "kernel", (), contacts)


def families(metrics: Metrics) -> Iterator[tuple[str, str, set[str]]]:
    """Name, kind and labels of what is exposed, with the names as FAMILIES has them."""
    for family in text_string_to_metric_families(metrics.expose().decode()):
        total = family.type == "counter" and not family.name.endswith("_total")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        yield family.name + ("_total" if total else ""), family.type, labels


def test_all_that_is_promised_is_there_and_nothing_else(busy: Site) -> None:
    found = {(name, kind, frozenset(labels)) for name, kind, labels in families(busy.metrics)}
    ours = {one for one in found if one[0].startswith("weft_") and not one[0].endswith("_created")}
    assert ours == {(family.name, family.kind, frozenset(family.labels)) for family in FAMILIES}
    assert "process_resident_memory_bytes" in {name for name, _, _ in found}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_follow_prometheus_conventions(family: Any) -> None:
    assert (family.kind == "counter") == family.name.endswith("_total")
    assert "milli" not in family.name
    assert family.help
    if "time" in family.help or "when" in family.help:
        assert family.name.endswith(("_seconds", "_total"))


def test_nothing_yet_is_no_error(site: Site) -> None:
    """As when somebody asks while weft starts."""
    assert site.value("weft_networks") == 0
    assert "weft_last_resync_timestamp_seconds" not in site.scrape()


def test_calls_and_requests_are_counted_with_their_time(busy: Site) -> None:
    found = busy.scrape()
    assert found["weft_call_duration_seconds_count"] == {("NetworkDriver.Join",): 2}
    assert found["weft_call_duration_seconds_bucket"]["NetworkDriver.Join", "0.003"] == 1
    assert found["weft_call_failures_total"] == {("NetworkDriver.Join", "refused"): 1}
    assert found["weft_store_request_failures_total"] == {("get",): 1}
    assert found["weft_dns_questions_total"] == {("answered",): 1}


def test_work_of_the_agent_is_told(busy: Site) -> None:
    host = busy.host
    (vni,) = host.agent.rows.networks
    before = busy.scrape()
    host.kernel._remove(f"vx{vni}")
    host.monitor.events.put(LinkEvent(f"vx{vni}", False))
    eventually(lambda: busy.value("weft_drift_repaired_total") > before["weft_drift_repaired_total"][()])
    assert busy.value("weft_reconcile_steps_total", "create") == before["weft_reconcile_steps_total"]["create",] + 1
    host.monitor.events.put(Overflow())
    eventually(lambda: busy.value("weft_kernel_event_losses_total") == 1)
    resyncs = before["weft_reconcile_duration_seconds_count"]["resync",]
    eventually(lambda: busy.value("weft_reconcile_duration_seconds_count", "resync") > resyncs)


def test_many_who_ask_share_one_answer() -> None:
    metrics = Metrics(reuse=3600)
    before = metrics.expose()
    metrics.note_question("answered")
    assert metrics.expose() == before


def test_a_stuck_agent_is_seen(site: Site) -> None:
    assert site.value("weft_problems", "stuck") == 0
    site.host.agent.busy_since = monotonic() - 31
    assert site.value("weft_problems", "stuck") == 1


def test_what_hinders_is_counted(busy: Site) -> None:
    assert busy.value("weft_problems", "hindered") == 0
    assert busy.value("weft_store_up") == 1
    busy.parts["presence"].problem = "etcd cannot be used"
    assert busy.value("weft_problems", "hindered") == 1
    assert busy.value("weft_store_up") == 0


def test_links_of_this_host_are_told_by_direction(busy: Site) -> None:
    busy.links = [
        link("out", busy, 2, small=0.25, full=None),
        link("in", busy, 2, mtu=1400),
        ProbeLink("x", "y", "plain", 1450, 1.0, small=1.0),
    ]
    found = busy.scrape()
    assert found["weft_links"] == {("plain", "faulty"): 1, ("plain", "sound"): 1}
    assert found["weft_link_loss_ratio"]["h2", "plain", "out", "small"] == 0.25
    assert ("h2", "plain", "out", "full") not in found["weft_link_loss_ratio"]
    assert found["weft_link_mtu_bytes"]["h2", "plain", "in"] == 1400


def test_what_cannot_be_read_is_left_out(busy: Site) -> None:
    def away() -> ObservedTunnel:
        raise KernelError("read", 1)

    busy.parts["encryption"].observe = away
    assert "weft_wireguard_peers" not in busy.scrape()
    assert "weft_links" in busy.scrape()


def test_an_unknown_host_in_tunnels_does_not_break_it(busy: Site) -> None:
    busy.tunnel = tunnel(0)
    assert busy.value("weft_wireguard_peers") == 0


@pytest.mark.parametrize(
    ("cidrs", "addresses", "used"),
    [
        (["10.0.0.0/24"], ["10.0.0.2", "10.0.0.3"], [("10.0.0.0/24", 254, 3)]),
        (["10.0.0.0/24", "fd00::/64"], ["10.0.0.2", "fd00::2"], [("10.0.0.0/24", 254, 2), ("fd00::/64", 2**64 - 1, 2)]),
        (["10.0.0.0/30", "10.0.1.0/24"], ["10.0.1.2"], [("10.0.0.0/30", 2, 1), ("10.0.1.0/24", 254, 2)]),
    ],
)
def test_use_of_pools(cidrs: list[str], addresses: list[str], used: list[tuple[str, int, int]]) -> None:
    pools = tuple(Pool(cidr, str(ip_network(cidr)[1])) for cidr in cidrs)
    network = Network(5, "app", pools, 0, False, "h1")
    endpoint = Endpoint("e", 5, "02:42:0a:00:00:02", tuple(addresses), "h")
    assert list(pool_use(cluster(network, endpoint), network)) == used


def test_a_large_cluster_has_few_series_and_a_scrape_is_cheap(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 hosts, 100 networks with 10,000 endpoints, all of which this host uses."""
    hosts = [
        Host(f"{number:032x}", f"host-{number:04}", f"192.0.{number // 250}.{number % 250 + 1}")
        for number in range(1000)
    ]
    nets = [
        Network(vni, f"net-{vni}", (Pool(f"10.{vni}.0.0/16", f"10.{vni}.0.1"),), 0, False, "h1")
        for vni in range(1, 101)
    ]
    endpoints = [
        Endpoint(f"{vni}-{number}", vni, f"02:42:0a:{vni:02x}:{number // 256:02x}:{number % 256:02x}",
                 (f"10.{vni}.{number // 250 + 1}.{number % 250 + 1}",), hosts[number * 10 % 1000].id)
        for vni in range(1, 101) for number in range(100)
    ]  # fmt: skip
    big = cluster(*hosts, *nets, *endpoints)
    vars(site.host.cluster).update(vars(big))
    site.host.agent.rows._wanted.update((vni, _Wanted()) for vni in range(1, 101))
    site.links = [
        link(way, site, peer, small=1.0 if peer == 990 else 0.0) for way in ("in", "out") for peer in range(2, 999)
    ]
    site.tunnel = tunnel(1000)
    site.scrape()
    began = thread_time()
    text = site.metrics.expose().decode()
    seconds = thread_time() - began
    found = site.scrape()
    with capsys.disabled():
        print(f"\na scrape of 1,000 hosts and 10,000 endpoints: {seconds * 1000:.0f} ms of a CPU, {len(text)} bytes")
    assert sum(map(len, found.values())) < 50 * MOST
    assert {label[0] for label in found["weft_link_mtu_bytes"]} >= {"host-0990"}
    assert len(found["weft_wireguard_received_bytes_total"]) == MOST + 1
    assert sum(found["weft_wireguard_received_bytes_total"].values()) == 100_000
    assert sum(found["weft_network_endpoints"].values()) == 10_000
    assert len(found["weft_network_rows"]) == MOST + 1
    assert found["weft_hosts"] == {("alive",): 0, ("silent",): 1000}


def cluster(*records: Host | Network | Endpoint) -> Cluster:
    made = Cluster()
    made.load(Entry(record.key, record.encode(), 1) for record in records)
    return made


def test_the_store_is_measured_and_does_what_it_did(store: SqliteStore) -> None:
    seen: list[tuple[str, bool]] = []

    def note(call: str, seconds: float, failed: bool) -> None:
        seen.append((call, failed))

    class Broken(SqliteStore):
        def get(self, key: str) -> NoReturn:
            raise StoreError("away")

    measured = MeasuredStore(store, note)
    assert measured.beat("a", "1", 10)
    assert measured.get("a")
    assert measured.get_many(["a"])
    assert measured.transact([], [Put("b", "2")])
    assert [entry.key for entry in measured.list("").entries] == ["a", "b"]
    with pytest.raises(StoreError):
        MeasuredStore(Broken(store.path), note).get("a")
    calls = ["beat", "get", "get", "transact", "list", "get"]
    assert seen == [(call, number == 5) for number, call in enumerate(calls)]
