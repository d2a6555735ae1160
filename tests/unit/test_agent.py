"""The agent between a real store and a kernel in memory: follows, repairs, outlasts faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.conftest import FakeHost
from weft.cluster import Touched
from weft.dataplane import (
    FLOOD_MAC,
    Bridge,
    Fdb,
    Link,
    LinkEvent,
    Neighbour,
    Overflow,
    Port,
    Row,
    RowEvent,
    Shaper,
    Station,
    Vxlan,
    device_names,
    pack_address,
    pack_mac,
    vxlan_name,
)
from weft.errors import InvalidRequest, KernelError, StoreError
from weft.keys import PrivateKey
from weft.model import ENCRYPTED_PROBE_VNI, PROBE_VNI, Endpoint, Host, Network, Pool, endpoint_key
from weft.options import parse_options
from weft.reconcile import Update
from weft.store import Delete, DeleteAll, Entry, Put, Snapshot, Watch
from weft.store.sqlite import SqliteStore
from weft.topology import probe_mac

Hosts = Callable[..., FakeHost]
CIDR = "10.1.0.0/24"


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what a thread does; the limit is only reached when the test fails."""
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.002)


@pytest.fixture
def running(host: Hosts) -> Iterator[Hosts]:
    started: list[FakeHost] = []

    def start(number: int, **kernel: int) -> FakeHost:
        one = host(number, **kernel)
        one.agent.start()
        started.append(one)
        return one

    yield start
    for one in started:
        one.agent.stop()


def mtu_of(link: Link) -> int:
    assert not isinstance(link, Shaper)
    return link.mtu


def rows_of(endpoint: Endpoint, vtep: str) -> set[Row]:
    mac, tunnel, bridge = pack_mac(endpoint.mac), f"vx{endpoint.vni}", f"br{endpoint.vni}"
    return {
        Fdb(tunnel, mac, pack_address(vtep)),
        Station(tunnel, mac),
        Fdb(tunnel, FLOOD_MAC, pack_address(vtep)),
        *(Neighbour(bridge, pack_address(address), mac) for address in endpoint.addresses),
    }


@pytest.fixture
def pair(running: Hosts) -> tuple[FakeHost, FakeHost, Endpoint, Endpoint]:
    """Two hosts with one endpoint each, in sync."""
    one, two = running(1), running(2)
    one.create_network("n1", CIDR)
    two.create_network("n2", CIDR)
    here, there = one.run("n1", "a" * 64, CIDR), two.run("n2", "b" * 64, CIDR)
    eventually(lambda: one.kernel.rows == rows_of(there, "192.168.78.2"))
    eventually(lambda: two.kernel.rows == rows_of(here, "192.168.78.1"))
    return one, two, here, there


def test_it_tells_whether_its_loop_goes_round(running: Hosts, host: Hosts) -> None:
    assert running(1).agent.responds(5)
    assert not host(2).agent.responds(0.05)


def test_what_another_host_removes_goes_away_here(pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint]) -> None:
    one, two, _, there = pair
    two.driver.delete_endpoint("n2", there.id)
    eventually(lambda: not one.kernel.rows)
    assert len(one.kernel.links) == 3


def test_a_network_without_local_endpoints_is_not_programmed(running: Hosts) -> None:
    one, two = running(1), running(2)
    one.create_network("n1", CIDR)
    two.create_network("n2", CIDR)
    two.run("n2", "b" * 64, CIDR)
    eventually(lambda: bool(one.agent.cluster.endpoints))
    assert not one.kernel.links


def test_the_last_endpoint_leaves_devices_until_docker_removes_the_network(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint],
) -> None:
    one, _, here, _ = pair
    one.driver.delete_endpoint("n1", here.id)
    assert len(one.kernel.links) == 2
    one.driver.networks.delete("n1")
    eventually(lambda: not one.kernel.links and not one.kernel.rows)


@pytest.mark.parametrize("kind", ["br", "vx"])
def test_a_device_that_somebody_deleted_is_made_again_with_its_rows(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint], kind: str
) -> None:
    one, _, here, there = pair
    before = dict(one.kernel.links)
    name = f"{kind}{here.vni}"
    one.kernel._remove(name)
    assert one.kernel.rows != rows_of(there, "192.168.78.2")
    one.monitor.events.put(LinkEvent(name, False))
    eventually(lambda: one.kernel.links == before and one.kernel.rows == rows_of(there, "192.168.78.2"))


def test_a_foreign_link_is_removed(pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint]) -> None:
    one, _, _, _ = pair
    one.kernel.links["stray"] = Bridge("stray", 1500)
    one.monitor.events.put(LinkEvent("stray", True))
    eventually(lambda: "stray" not in one.kernel.links)


def test_a_row_that_somebody_changed_is_put_right(pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint]) -> None:
    one, _, here, there = pair
    wanted = rows_of(there, "192.168.78.2")
    for row in wanted:
        one.kernel.rows.discard(row)
        told = row._replace(mac=b"") if isinstance(row, Neighbour) else row
        one.monitor.events.put(RowEvent(told, False))
    foreign: list[Row] = [
        Fdb(f"vx{here.vni}", pack_mac("02:00:00:00:00:99"), pack_address("192.168.78.9")),
        Fdb(f"vx{here.vni}", pack_mac(there.mac), pack_address("192.168.78.9")),
        Neighbour(f"br{here.vni}", pack_address(there.addresses[0]), bytes(6)),
    ]
    for row in foreign:
        one.kernel.rows = {old for old in one.kernel.rows if old.key != row.key} | {row}
        one.monitor.events.put(RowEvent(row, True))
    eventually(lambda: one.kernel.rows == wanted)


@pytest.mark.parametrize("method", ["observe_links", "perform", "observe_rows", "write_rows"])
def test_every_fault_ends_in_sync(pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint], method: str) -> None:
    one, _, _, there = pair
    before = dict(one.kernel.links)
    one.agent._resync_seconds = 0.1
    for name in before:
        if not name.startswith("wp"):
            one.kernel._remove(name)
    one.kernel.fail(method)
    one.monitor.events.put(Overflow())
    eventually(lambda: one.kernel.links == before and one.kernel.rows == rows_of(there, "192.168.78.2"))
    one.agent.resync()
    assert not one.kernel.links.keys() ^ before.keys()


def test_a_host_that_moves_takes_its_entries_along(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint], store: SqliteStore
) -> None:
    one, two, _, there = pair
    moved = Host(two.record.id, "h2", "192.168.78.22")
    store.transact([], [Put(moved.key, moved.encode())])
    eventually(lambda: one.kernel.rows == rows_of(there, "192.168.78.22"))


def test_flood_entry_stays_for_a_host_that_came_back_as_another(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint], store: SqliteStore
) -> None:
    one, _, _, there = pair
    reborn = Host("3" * 32, "host2", "192.168.78.2")
    other = replace(there, id="c" * 64, mac="02:42:0a:01:00:63", addresses=("10.1.0.99",), host=reborn.id)
    store.transact([], [Put(reborn.key, reborn.encode()), Put(other.key, other.encode())])
    eventually(lambda: rows_of(other, reborn.underlay) <= one.kernel.rows)
    store.transact([], [Delete(there.key)])
    eventually(lambda: one.kernel.rows == rows_of(other, reborn.underlay))


def test_a_container_that_moves_with_its_address_leaves_nothing_stale(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint], running: Hosts, store: SqliteStore
) -> None:
    one, _, _, there = pair
    three = running(3)
    again = Endpoint("c" * 64, there.vni, there.mac, there.addresses, three.record.id)
    store.transact([], [Delete(there.key), Put(endpoint_key(there.vni, again.id), again.encode())])
    eventually(lambda: one.kernel.rows == rows_of(again, "192.168.78.3"))


def test_an_orphaned_port_is_removed_and_a_lost_one_not_made(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint], store: SqliteStore
) -> None:
    one, _, here, _ = pair
    one.kernel.links["wp" + "f" * 12] = one.kernel.links.pop("wp" + "a" * 12)
    one.agent.resync()
    assert not any(name.startswith("wp") for name in one.kernel.links)
    assert store.get(here.key)


def test_a_port_that_a_container_uses_is_kept_with_its_devices_whatever_the_store_says(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint], store: SqliteStore
) -> None:
    one, _, _, _ = pair
    before = dict(one.kernel.links)
    one.kernel.carrier.add("wp" + "a" * 12)
    store.transact([], [DeleteAll("topology/")])
    eventually(lambda: not one.agent.cluster.networks)
    one.agent.resync()
    assert one.kernel.links == before
    one.kernel.carrier.clear()
    one.agent.resync()
    assert not one.kernel.links


def test_limits_that_somebody_changes_or_removes_come_back(running: Hosts) -> None:
    one = running(1)
    tunnel = f"vx{one.create_network('n1', CIDR, multicast=10**6).vni}"
    one.run("n1", "a" * 64, CIDR, rate=10**8)
    port, links = "wp" + "a" * 12, one.kernel.links
    eventually(lambda: one.agent.links.count == len(links) == 5)
    eventually(lambda: not one.attachments.pinned())
    wanted = dict(links)
    for name in (f"s{tunnel}", f"s{port}"):
        del links[name]
        one.monitor.events.put(LinkEvent(name, False))
        eventually(lambda: links == wanted)
    links[f"s{port}"] = Shaper(port, 1)
    one.monitor.events.put(LinkEvent(port, True))  # a filter was taken from it
    eventually(lambda: links == wanted)
    del links[tunnel]
    one.monitor.events.put(LinkEvent(tunnel, False))
    eventually(lambda: links == wanted)
    assert any(isinstance(step, Update) and step.link.name == f"s{tunnel}" for step in one.kernel.steps)
    one.kernel.carrier.add(port)
    one.store.transact([], [DeleteAll("topology/")])
    eventually(lambda: not one.agent.cluster.networks)
    one.agent.resync()
    assert links == wanted
    one.kernel.carrier.clear()
    one.agent.resync()
    assert not links


def test_the_limit_of_a_veth_that_is_gone_goes(running: Hosts) -> None:
    one = running(1)
    one.create_network("n1", CIDR)
    one.run("n1", "a" * 64, CIDR, rate=10**8)
    eventually(lambda: not one.attachments.pinned())
    del one.kernel.links["wp" + "a" * 12]
    one.monitor.events.put(LinkEvent("wp" + "a" * 12, False))
    eventually(lambda: not [name for name in one.kernel.links if "wp" in name])
    assert not one.agent.problem


def test_an_entry_of_a_newer_version_stops_nobody(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint], store: SqliteStore
) -> None:
    one, two, _, there = pair
    store.transact([], [Put("topology/hosts/new", "{}"), Put("topology/planets/earth", "?")])
    two.driver.delete_endpoint("n2", there.id)
    eventually(lambda: not one.kernel.rows)


def test_nothing_is_removed_before_the_first_snapshot(
    running: Hosts, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(prefix: str) -> Watch:
        raise StoreError("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(store, "watch", away)
        one = running(1)
        one.kernel.links["stray"] = Bridge("stray", 1500)
        one.monitor.events.put(LinkEvent("stray", True))
        one.monitor.events.put(Overflow())
        eventually(lambda: one.monitor.events.empty() and one.agent._triggers.empty())
        assert "stray" in one.kernel.links
    eventually(lambda: "stray" not in one.kernel.links)


def in_parts(*parts: tuple[Entry, ...]) -> list[Snapshot]:
    last = len(parts) - 1
    return [Snapshot(part, 1, number == 0, number == last) for number, part in enumerate(parts)]


def test_a_snapshot_in_parts_counts_when_all_have_come(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint], store: SqliteStore
) -> None:
    one, _, _, there = pair
    entries = store.list("topology/").entries
    rows, loads = set(one.kernel.rows), list[Touched | None]()
    one.agent.listeners.append(loads.append)
    for part in in_parts(entries[:2], entries[2:4], entries[4:])[:2]:
        one.agent._triggers.put(part)
    assert one.agent.responds(5)
    assert one.cluster.endpoints[there.vni].keys() >= {there.id}
    assert None not in loads
    gone = tuple(entry for entry in entries if there.id not in entry.key)
    for part in in_parts(gone[:2], gone[2:]):  # from its beginning: what came until now means nothing
        one.agent._triggers.put(part)
    assert one.agent.responds(5)
    assert loads.count(None) == 1
    assert there.id not in one.cluster.endpoints[there.vni]
    assert not one.kernel.rows & rows_of(there, "192.168.78.2")
    one.agent._triggers.put(Snapshot(entries, 1))
    eventually(lambda: one.kernel.rows == rows)


def test_a_snapshot_of_which_a_part_is_unreadable_removes_nothing(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint], store: SqliteStore
) -> None:
    one, _, _, there = pair
    entries = store.list("topology/").entries
    broken: Any = (None,)
    for part in in_parts(entries[:2], broken, entries[2:3], entries[3:4]):
        one.agent._triggers.put(part)
    assert one.agent.responds(5)
    assert one.kernel.rows == rows_of(there, "192.168.78.2")
    assert there.id in one.cluster.endpoints[there.vni]


def test_one_broken_network_does_not_keep_others_from_being_served(running: Hosts) -> None:
    one, two = running(1), running(2)
    broken = one.create_network("n1", CIDR)
    one.create_network("n2", "10.2.0.0/24")
    two.create_network("m2", "10.2.0.0/24")
    one.run("n1", "1" * 64, CIDR)
    one.run("n2", "2" * 64, "10.2.0.0/24")
    tunnel = f"vx{broken.vni}"
    one.kernel.broken.add(tunnel)
    one.kernel._remove(tunnel)
    one.monitor.events.put(LinkEvent(tunnel, False))
    there = two.run("m2", "b" * 64, "10.2.0.0/24")
    eventually(lambda: rows_of(there, "192.168.78.2") <= one.kernel.rows)
    one.kernel.broken.clear()
    eventually(lambda: tunnel in one.kernel.links)


def test_an_endpoint_keeps_its_mtu_and_the_tunnel_has_room_for_it(
    running: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    one = running(1, mtu=9000)
    network = one.create_network("n1", CIDR)
    old = one.run("n1", "a" * 64, CIDR)
    eventually(lambda: old.id in one.cluster.endpoints.get(network.vni, {}))
    one.kernel.mtu = 1500
    one.agent.refresh()
    eventually(lambda: "these containers keep another: endpoint aaaaaaaaaaaa (8950)" in caplog.text)
    new = one.run("n1", "b" * 64, CIDR)
    assert (old.mtu, new.mtu) == (8950, 1450)
    assert {n: mtu_of(link) for n, link in one.kernel.links.items()} == {
        f"br{network.vni}": 8950,
        f"vx{network.vni}": 8950,
        f"wp{'a' * 12}": 8950,
        f"wp{'b' * 12}": 1450,
    }
    one.driver.delete_endpoint("n1", old.id)
    eventually(lambda: old.id not in one.cluster.endpoints[network.vni])
    one.agent.refresh()
    eventually(lambda: mtu_of(one.kernel.links[f"vx{network.vni}"]) == 1450)


def test_an_endpoint_of_an_older_weft_keeps_its_ports_mtu(running: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    """Its record tells none; a bridge that took less would drop its large packets without a word."""
    one = running(1, mtu=9000)
    network = one.create_network("n1", CIDR)
    old = one.run("n1", "a" * 64, CIDR)
    narrow = Host("f" * 32, "h9", "192.168.78.9", mtu=1500)
    older = replace(old, mtu=0)
    one.store.transact([], [Put(older.key, older.encode()), Put(narrow.key, narrow.encode())])
    eventually(lambda: "these containers keep another: endpoint aaaaaaaaaaaa (8950)" in caplog.text)
    one.kernel._remove(f"br{network.vni}")
    assert one.run("n1", "b" * 64, CIDR).mtu == 1450
    port = one.kernel.links[f"wp{'a' * 12}"]
    assert isinstance(port, Port)
    one.kernel.links[port.name] = replace(port, mtu=1450)
    one.agent.refresh()
    kept = {f"br{network.vni}": 8950, f"vx{network.vni}": 8950, f"wp{'a' * 12}": 8950, f"wp{'b' * 12}": 1450}
    eventually(lambda: {name: mtu_of(link) for name, link in one.kernel.links.items()} == kept)


def test_a_dear_look_at_the_mtu_is_not_repeated_at_once(host: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routes to a thousand hosts are looked up one by one."""
    one, now = host(1), [100.0]

    def look(*_: object) -> int:
        now[0] += 1
        return one.kernel.mtu

    monkeypatch.setattr(one.kernel, "underlay_mtu", look)
    monkeypatch.setattr("weft.attachments.monotonic", lambda: now[0])
    one.kernel.mtu = 1400
    assert one.attachments.refresh_mtu()
    one.kernel.mtu = 1300
    assert not one.attachments.refresh_mtu()
    now[0] += 50
    assert one.attachments.refresh_mtu()


def test_the_mtu_follows_another_hosts(running: Hosts) -> None:
    one = running(1, mtu=9000)
    one.create_network("n1", CIDR)
    assert one.run("n1", "a" * 64, CIDR).mtu == 8950
    narrow = Host("f" * 32, "h9", "192.168.78.9", mtu=1400)
    one.store.transact([], [Put(narrow.key, narrow.encode())])
    eventually(lambda: narrow.id in one.cluster.hosts)
    assert one.run("n1", "b" * 64, CIDR).mtu == 1350


def test_all_networks_mtus_take_one_look_at_the_hosts(host: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be a thousand of each. Who looks while another host's record comes takes nothing old for new."""

    class Counted(dict[str, Host]):
        looks = 0

        def values(self) -> Any:
            self.looks += 1
            return super().values()

    def mtus() -> set[int]:
        return {one.attachments.mtu(replace(network, vni=vni, encrypted=vni % 2 > 0)) for vni in range(5000, 5100)}

    def follow(key: str, value: str | None, touched: Touched) -> None:
        mtus()
        followed(key, value, touched)

    one = host(1, mtu=9000)
    network = Network(7, "app", (Pool(CIDR),), 0, False, "h1")
    wide = [Host(f"{n:032x}", f"h{n}", f"192.168.79.{n}", mtu=9000) for n in range(2, 30)]
    one.cluster.load(Entry(other.key, other.encode(), 1) for other in wide)
    hosts = one.cluster.hosts = Counted(one.cluster.hosts)
    assert (mtus(), hosts.looks) == ({8950, 8890}, 1)
    followed = one.cluster._host
    monkeypatch.setattr(one.cluster, "_host", follow)
    for narrow in (replace(wide[0], mtu=1500), replace(wide[9], mtu=9000, path_mtu=1400)):
        one.cluster.apply([(narrow.key, narrow.encode())])
        assert one.attachments.mtu(network) == (narrow.path_mtu or narrow.mtu) - 50
    assert one.attachments.limit(paths=True) == (1350, "h11")
    one.me.measure(1300)
    assert mtus() == {1250, 1190}


def test_a_plan_names_what_somebody_else_changed_and_a_repair_is_counted(
    pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint],
) -> None:
    one, _, _, there = pair
    eventually(lambda: (one.agent.links.count, *one.agent.rows.counts.values()) == (3, 4))
    assert list(one.agent.preview(5)) == []
    before = one.agent.repaired
    stray = Fdb(f"vx{there.vni}", bytes.fromhex("024200000099"), pack_address("192.168.78.9"))
    bridge = f"br{there.vni}"
    one.kernel.rows.add(stray)
    one.kernel.links[bridge] = Bridge(bridge, 1300)
    changes = {change for _, change in one.agent.preview(5)}
    assert changes == {f"update bridge {bridge} (mtu is 1300)", f"delete {stray}"}
    assert stray in one.kernel.rows
    one.agent.refresh()
    eventually(lambda: one.agent.repaired == before + 2)
    assert list(one.agent.preview(5)) == []


def test_what_the_store_asks_for_is_no_drift(pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint]) -> None:
    one, two, here, there = pair
    eventually(lambda: (one.agent.links.count, *one.agent.rows.counts.values()) == (3, 4))
    two.driver.delete_endpoint("n2", there.id)
    eventually(lambda: not one.kernel.rows)
    one.driver.delete_endpoint("n1", here.id)
    eventually(lambda: not one.agent.cluster.endpoints)
    one.agent.refresh()
    eventually(lambda: not one.kernel.links)  # they stayed for a container that comes back
    assert one.agent.preview(5) is not None  # it has come round
    assert one.agent.repaired == 0


def test_a_plan_of_a_loop_that_is_stuck_is_refused(host: Hosts) -> None:
    with pytest.raises(KernelError, match="busy"):
        host(1).agent.preview(0.05)


def test_what_fails_is_a_problem_until_it_works(pair: tuple[FakeHost, FakeHost, Endpoint, Endpoint]) -> None:
    one, _, _, there = pair
    del one.kernel.links[f"br{there.vni}"]
    one.kernel.fail("perform")
    one.agent.refresh()
    eventually(lambda: bool(one.agent.problem))
    eventually(lambda: not one.agent.problem)
    assert one.agent.resynced


def test_a_network_without_containers_leads_probes_to_every_host(running: Hosts, store: SqliteStore) -> None:
    one = running(1, probes=True)
    eventually(lambda: set(one.kernel.links) == set(device_names(PROBE_VNI)))
    tunnel = one.kernel.links[vxlan_name(PROBE_VNI)]
    assert isinstance(tunnel, Vxlan)
    assert (tunnel.local, tunnel.port, tunnel.mtu, tunnel.whole) == ("192.168.78.1", 4789, 1450, True)
    other = Host("f" * 32, "h9", "192.168.78.9")
    row = Fdb(tunnel.name, pack_mac(probe_mac(other.id)), pack_address(other.underlay))
    store.transact([], [Put(other.key, other.encode())])
    eventually(lambda: one.kernel.rows == {row})
    store.transact([], [Put(other.key, replace(other, underlay="192.168.78.99").encode())])
    eventually(lambda: one.kernel.rows == {row._replace(vtep=pack_address("192.168.78.99"))})
    store.transact([], [Delete(other.key)])
    eventually(lambda: one.kernel.rows == set())
    one.agent.refresh()
    assert one.agent.responds(5)
    eventually(lambda: one.agent.resynced is not None)  # a bug in a resync is logged, and no more


def test_the_way_of_encrypted_networks_is_probed_on_its_own(running: Hosts, store: SqliteStore) -> None:
    one = running(1, probes=True)
    other = Host(
        "f" * 32, "h9", "192.168.78.9", wg_key=PrivateKey.generate().public, wg_address="100.64.0.9", wg_port=1
    )
    store.transact([], [Put(other.key, other.encode())])
    eventually(lambda: set(one.kernel.links) == set(device_names(PROBE_VNI)))
    one.encryption.require()
    one.agent.refresh()
    name = vxlan_name(ENCRYPTED_PROBE_VNI)
    mac = pack_mac(probe_mac(other.id))
    eventually(lambda: Fdb(name, mac, pack_address("100.64.0.9")) in one.kernel.rows)
    tunnel = one.kernel.links[name]
    assert isinstance(tunnel, Vxlan)
    assert (tunnel.local, tunnel.encrypted, tunnel.whole) == (one.me.host.wg_address, True, True)
    one.kernel.beside = ["stray"]  # what leaves by that would be plain
    one.agent.refresh()
    eventually(lambda: name not in one.kernel.links)


def test_a_users_network_that_has_the_vni_of_probes_keeps_it(running: Hosts, store: SqliteStore) -> None:
    """It may be older than the reservation."""
    network = Network(PROBE_VNI, "app", (Pool(CIDR),), 0, False, "h1")
    store.transact([], [Put(network.key, network.encode())])
    one = running(1, probes=True)
    assert one.agent.responds(5)
    assert one.kernel.links == {}


@pytest.mark.parametrize("vni", [PROBE_VNI, ENCRYPTED_PROBE_VNI])
def test_a_user_cannot_have_the_vni_of_probes(vni: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"weft.vni={vni}: weft itself uses it.*choose 1 to 16777213"):
        parse_options({"weft.vni": str(vni)})
