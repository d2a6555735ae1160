"""Who probes whom and when, and what is shared of it; over tunnels in memory."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from secrets import token_hex
from typing import NamedTuple

import pytest

from tests.netns.world import wait_for
from weft.cluster import Cluster
from weft.dataplane import pack_mac
from weft.errors import StoreError
from weft.identity import LocalHost
from weft.model import TOPOLOGY, Host
from weft.probes import echo
from weft.probes.echo import SMALL_SIZE, Counts, Probe, Purpose
from weft.probes.links import RESULTS, ProbeLink, Results, request_key
from weft.probes.measurements import Probes
from weft.probes.prober import Prober
from weft.store import Delete, Entry, Put
from weft.store.sqlite import SqliteStore
from weft.topology import probe_mac

SIZE = 1450


def mac(host: Host) -> bytes:
    return pack_mac(probe_mac(host.id))


class Frame(NamedTuple):
    data: bytes
    pending: bool = True


class Wire:
    """All tunnels at once: frames go to the MAC that they name, unless that way is cut."""

    def __init__(self) -> None:
        self.sockets: dict[bytes, FakeSocket] = {}
        self.cut: set[tuple[bytes, bytes]] = set()
        self.sent: list[bytes] = []
        self.mtu = SIZE

    def carry(self, frame: bytes) -> None:
        self.sent.append(frame)
        target, source = frame[:6], frame[6:12]
        if (source, target) not in self.cut and target in self.sockets and len(frame) - 14 <= self.mtu:
            self.sockets[target].put(frame)

    def cut_way(self, source: Host, target: Host) -> None:
        self.cut.add((mac(source), mac(target)))


class FakeSocket:
    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.frames: deque[bytes] = deque()
        self.ready, self.signal = socket.socketpair()

    def fileno(self) -> int:
        return self.ready.fileno()

    def close(self) -> None:
        self.ready.close()
        self.signal.close()

    def put(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.signal.send(b"!")

    def send(self, frame: bytes, checksum: tuple[int, int] = (0, 0)) -> None:
        self.wire.carry(frame)

    def receive(self) -> Frame | None:
        if not self.frames:
            return None
        self.ready.recv(1)
        return Frame(self.frames.popleft())


class Machine:
    """A host that measures, with a mirror of the store that a test brings up to date."""

    def __init__(self, store: SqliteStore, wire: Wire, host: Host, interval: float) -> None:
        self.host = host
        self.store = store
        self.cluster = Cluster()
        self.refresh()
        self.socket = wire.sockets[mac(host)] = FakeSocket(wire)
        self.me = LocalHost(host)
        self.prober = Prober(self.cluster, self.me, size=lambda kind: SIZE, open_socket=lambda device: self.socket)
        self.probes = Probes(store, self.cluster, self.me, self.prober, interval=interval)
        self.probes.start()

    def refresh(self) -> None:
        self.cluster.load(self.store.list(TOPOLOGY).entries)
        if hasattr(self, "probes"):
            self.probes.follow(None)

    def link(self, sender: Machine, receiver: Machine) -> ProbeLink | None:
        ends = sender.host.id, receiver.host.id
        return next((one for one in self.probes.links() if (one.sender, one.receiver) == ends), None)


MakeMachines = Callable[..., list[Machine]]


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def machines(store: SqliteStore, wire: Wire) -> Iterator[MakeMachines]:
    with ExitStack() as stack:

        def make(number: int, interval: float = 0) -> list[Machine]:
            hosts = [Host(f"{n:032x}", f"h{n}", f"192.0.2.{n}", probes=True) for n in range(1, number + 1)]
            store.transact([], [Put(host.key, host.encode()) for host in hosts])
            store.transact([], [Put(host.alive_key, "test") for host in hosts])
            made = [Machine(store, wire, host, interval) for host in hosts]
            for one in made:
                stack.callback(one.probes.stop)
            return made

        yield make


def good(link: ProbeLink | None) -> bool:
    return link is not None and (link.small, link.full, link.offloaded, link.mtu) == (0, 0, 0, SIZE)


def bad(link: ProbeLink | None) -> bool:
    return link is not None and link.small == 1


def test_what_two_hosts_measure_a_third_knows(machines: MakeMachines) -> None:
    one, two, three = machines(3)
    links = one.probes.probe([two.host.id])
    assert {(link.sender, link.receiver) for link in links} == {(one.host.id, two.host.id), (two.host.id, one.host.id)}
    assert all(map(good, links))
    assert good(three.link(one, two))
    assert three.link(two, three) is None


def test_one_broken_direction_is_told_from_the_other(machines: MakeMachines, wire: Wire) -> None:
    one, two = machines(2)
    wire.cut_way(one.host, two.host)
    one.probes.probe()
    for observer in (one, two):
        assert bad(observer.link(one, two))
        assert good(observer.link(two, one))


def test_hosts_that_measure_at_the_same_time_ask_nobody(machines: MakeMachines, wire: Wire) -> None:
    one, two, three = machines(3)
    wire.cut_way(one.host, two.host)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda machine: machine.probes.measure(4.0), (one, two)))
    assert not any("requests" in entry.key for entry in one.store.list("probes/").entries)
    assert wait_for(lambda: bad(three.link(one, two)) and good(three.link(two, one)))


def test_the_background_finds_the_direction_by_itself(machines: MakeMachines, wire: Wire) -> None:
    one, two, three = machines(3, interval=0.2)
    assert wait_for(lambda: good(three.link(one, two)))
    wire.cut_way(two.host, one.host)
    assert wait_for(lambda: bad(three.link(two, one)) and good(three.link(one, two)), 20)
    wire.cut.clear()
    assert wait_for(lambda: good(three.link(two, one)) and good(three.link(one, two)), 20)


def test_the_hosts_record_follows_what_passes(machines: MakeMachines, wire: Wire) -> None:
    one, two = machines(2, interval=0.1)
    wire.mtu = 1333
    assert wait_for(lambda: one.me.host.path_mtu == two.me.host.path_mtu == 1383, 60)
    wire.mtu = SIZE
    assert wait_for(lambda: one.me.host.path_mtu == two.me.host.path_mtu == 0, 30)


def test_without_the_background_nothing_follows(machines: MakeMachines, wire: Wire) -> None:
    one, two = machines(2)
    wire.mtu = 1333
    for _ in range(2):
        one.probes._round({two.host.id})  # as when one is heard that did not answer before
    assert {link.mtu for link in one.probes.links()} == {1333}
    assert one.me.host.path_mtu == 0


def test_what_is_no_news_is_not_written(machines: MakeMachines, store: SqliteStore, wire: Wire) -> None:
    one, *_ = machines(2, interval=0.05)
    assert wait_for(lambda: len(store.list(RESULTS).entries) == 2)
    before, sent = store.list(RESULTS), len(wire.sent)
    assert wait_for(lambda: len(wire.sent) > sent + 200), "several rounds"
    assert store.list(RESULTS).entries == before.entries
    assert good(one.probes.links()[0])


def test_a_request_that_is_done_leaves_nothing(machines: MakeMachines, store: SqliteStore) -> None:
    one, two = machines(2)
    one.probes.probe()
    assert store.list("probes/requests/").entries == ()
    store.transact([], [Put(request_key(two.host.id, "nobody"), "x")])
    assert wait_for(lambda: store.list("probes/requests/").entries == ())


def test_who_waits_for_others_reads_no_records(
    machines: MakeMachines, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = machines(3)
    asked: set[str] = set()
    get_many = store.get_many

    def noted(keys: Sequence[str]) -> dict[str, Entry]:
        asked.update(keys)
        return get_many(keys)

    monkeypatch.setattr(store, "get_many", noted)
    one.probes.probe()
    assert asked == {request_key(two.host.id, one.host.id), request_key(three.host.id, one.host.id)}
    assert {entry.key.removeprefix(RESULTS) for entry in store.list(RESULTS).entries} >= {two.host.id, three.host.id}


def test_a_host_that_is_gone_is_in_no_record(machines: MakeMachines, store: SqliteStore) -> None:
    one, two, three = machines(3)
    one.probes.probe()
    store.transact([], [Delete(two.host.key), Delete(RESULTS + two.host.id)])
    two.probes.stop()
    for machine in (one, three):
        machine.refresh()
    assert wait_for(lambda: not any(two.host.id in entry.value for entry in store.list(RESULTS).entries))
    assert one.link(one, two) is None


def test_a_host_in_the_place_of_another_is_answered_and_the_other_forgotten(
    machines: MakeMachines, store: SqliteStore, wire: Wire
) -> None:
    one, _, three = machines(3)
    three.probes.probe()
    new = Host(f"{4:032x}", "h4", "192.0.2.4", probes=True)
    store.transact([], [Delete(three.host.key), Put(new.key, new.encode())])
    one.refresh()
    one.socket.put(forged(mac(new), one.host))
    assert wait_for(lambda: any(frame[:6] == mac(new) for frame in wire.sent))
    one.probes.links()
    assert one.prober._heard.keys() == {(new.id, "plain")}
    assert one.prober._answering.keys() == {new.id}


def test_a_host_that_knows_no_probes_is_unknown(machines: MakeMachines, store: SqliteStore, wire: Wire) -> None:
    one, two = machines(2)
    store.transact([], [Put(two.host.key, replace(two.host, probes=False).encode())])
    one.refresh()
    began = time.monotonic()
    one.probes.probe()
    assert time.monotonic() - began < 2, "nobody waits for it"
    link = one.link(one, two)
    assert link
    assert (link.small, link.faulty, link.when) == (None, False, 0)
    assert not wire.sent


def test_without_the_store_a_host_measures_for_itself(
    machines: MakeMachines, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machines(2)

    def fail(*_: object) -> None:
        raise StoreError("the store is away")

    for method in ("transact", "list", "get_many"):
        monkeypatch.setattr(store, method, fail)
    assert all(map(good, one.probes.probe()))
    assert good(one.link(two, one))


def test_a_damaged_record_stops_nothing(machines: MakeMachines, store: SqliteStore) -> None:
    one, two = machines(2)
    store.transact([], [Put(RESULTS + "somebody", '{"links": 7}')])
    assert all(map(good, one.probes.probe()))
    assert good(two.link(one, two))


# What a stranger can do who reaches the VXLAN port


def forged(source: bytes, target: Host, **fields: object) -> bytes:
    probe = Probe(False, Purpose.SMALL, bytes(8), 1, SMALL_SIZE, Counts(small=1))
    return echo.encode(replace(probe, **fields), source, mac(target))  # type: ignore[arg-type]


def test_an_unknown_mac_gets_no_answer(machines: MakeMachines, wire: Wire) -> None:
    one, two = machines(2)
    stranger = bytes.fromhex("02feedfeed01")
    wire.sockets[stranger] = mine = FakeSocket(wire)
    one.socket.put(forged(stranger, one.host))
    one.socket.put(forged(mac(two.host), one.host))
    assert wait_for(lambda: len(wire.sent) == 1)
    assert wire.sent[0][:6] == mac(two.host), "the host of that MAC is answered, where it is"
    assert not mine.frames
    mine.close()


def test_a_forged_answer_hides_no_fault(machines: MakeMachines, wire: Wire) -> None:
    one, two = machines(2)
    wire.cut_way(one.host, two.host)
    wire.cut_way(two.host, one.host)
    counts = Counts(100, 100, 100, 0, 9000)
    for number in range(1, 100):
        one.socket.put(forged(mac(two.host), one.host, answer=True, number=number, counts=counts))
    one.probes.probe()
    assert bad(one.link(one, two))


def test_answers_to_one_host_are_bounded(machines: MakeMachines, wire: Wire) -> None:
    one, two = machines(2)
    for number in range(2000):
        one.socket.put(forged(mac(two.host), one.host, number=number))
    assert wait_for(lambda: not one.socket.frames, 10)
    assert len(wire.sent) < 1200


# Many hosts


class CountingProber(Prober):
    """Measures nothing."""

    def __init__(self, cluster: Cluster, me: Host) -> None:
        super().__init__(cluster, LocalHost(me), size=lambda kind: SIZE, open_socket=lambda device: FakeSocket(Wire()))
        self.measured: list[set[str]] = []
        self.wrong: set[str] = set()
        self.found: list[ProbeLink] = []

    def measure(self, hosts: Collection[str], seconds: float) -> None:
        self.measured.append(set(hosts))

    def suspects(self) -> set[str]:
        return self.wrong

    def links(self) -> list[ProbeLink]:
        """Each time as if just measured."""
        return [replace(link, when=time.time(), round=token_hex(8)) for link in self.found]


def test_of_a_thousand_hosts_a_few_are_probed_by_chance_and_those_at_fault(store: SqliteStore) -> None:
    hosts = [Host(f"{n:032x}", f"h{n}", f"10.0.{n // 250}.{n % 250}", probes=True) for n in range(1000)]
    cluster = Cluster()
    cluster.apply((host.key, host.encode()) for host in hosts)
    cluster.apply((host.alive_key, "test") for host in hosts[:500])
    prober = CountingProber(cluster, hosts[0])
    prober.wrong = {hosts[7].id, hosts[700].id}
    probes = Probes(store, cluster, LocalHost(hosts[0]), prober, interval=0.01)
    probes.start()
    try:
        assert wait_for(lambda: len(prober.measured) > 20)
    finally:
        probes.stop()
    assert all(len(some) == 11 and hosts[7].id in some and hosts[0].id not in some for some in prober.measured[:20])
    assert 100 < len(set().union(*prober.measured[:20])) < 500
    assert not {host.id for host in hosts[500:]} & set().union(*prober.measured), "nobody waits for those that are off"
    prober.wrong = {host.id for host in hosts[1:900]}
    prober.measured.clear()
    probes.probe(deadline=0.1)
    assert len(prober.measured[0]) <= 60


Counting = tuple[list[Host], CountingProber, Probes]


@pytest.fixture
def counting(store: SqliteStore) -> Counting:
    """Hosts, and what measures on the first of them."""
    hosts = [Host(f"{n:032x}", f"h{n}", f"10.0.{n // 250}.{n % 250}", probes=True) for n in range(301)]
    cluster = Cluster()
    cluster.apply((host.key, host.encode()) for host in hosts)
    prober = CountingProber(cluster, hosts[0])
    return hosts, prober, Probes(store, cluster, LocalHost(hosts[0]), prober, interval=0)


def test_what_goes_on_being_wrong_is_written_once(store: SqliteStore, counting: Counting) -> None:
    (me, other, *_), prober, probes = counting
    prober.found = [ProbeLink(me.id, other.id, "plain", SIZE, 0, "", 1.0, 1.0, 1.0, attested=False)]
    probes._round(set())
    written = store.list(RESULTS).entries
    for _ in range(10):
        probes._round(set())
    assert len(written) == 1
    assert store.list(RESULTS).entries == written


def test_what_the_other_host_cannot_know_is_written_each_time(store: SqliteStore, counting: Counting) -> None:
    (me, other, *_), prober, probes = counting
    prober.found = [
        ProbeLink(me.id, other.id, "plain", SIZE, 0, "", 1.0, 1.0, 1.0, attested=False),
        ProbeLink(other.id, me.id, "plain", SIZE, 0, "", 0.0, 0.0, 0.0),
    ]
    probes._round(set())
    written = store.list(RESULTS).entries
    probes._round(set())
    assert store.list(RESULTS).entries != written, "which of its measurements was heard"


def test_a_record_has_few_links_of_which_nothing_is_wrong(store: SqliteStore, counting: Counting) -> None:
    (me, *others), prober, probes = counting
    prober.found = [ProbeLink(me.id, other.id, "plain", SIZE, 0, "", 0.0, 0.0, 0.0) for other in others]
    prober.found[-1] = replace(prober.found[-1], small=0.5)
    probes._round(set())
    (entry,) = store.list(RESULTS).entries
    links = Results.read(entry).links
    assert [link.receiver for link in links if link.faulty] == [others[-1].id]
    assert len(links) < 50
    assert len(entry.value) < 16_000


def test_a_record_stays_small(store: SqliteStore) -> None:
    link = ProbeLink(
        "a" * 32, "b" * 32, "encrypted", 1390, 1764000000.123456, "0" * 16, 0.5, 0.5, 0.5, 1390, 1, 0.123456
    )
    assert len(Results("a" * 32, (link,) * 200).encode()) < 1 << 16
