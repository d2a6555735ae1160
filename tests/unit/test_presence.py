"""Signs of life, the grace, deletes that wait, and the snapshot on disk."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes import FakeEngine
from tests.unit.conftest import FakeHost, together
from tests.unit.test_agent import eventually
from weft.engine.adoption import Adoption
from weft.engine.restarts import Restarts
from weft.errors import ConfigError, KernelError, StoreError
from weft.hosts import Hosts, IdInUse
from weft.keys import KeyFile, PrivateKey
from weft.model import Host
from weft.presence import Presence
from weft.snapshot import SnapshotFile
from weft.store import Delete, Entry, Put
from weft.unfinished import Unfinished

CIDR = "10.1.0.0/24"


class World:
    """A host's presence, without its thread."""

    def __init__(self, one: FakeHost, path: Path, *, grace: float = 0.0) -> None:
        self.one = one
        self.underlay = one.record.underlay
        self.moves: list[str] = []
        self.answers: dict[str, bool] | None = None
        """Who answers pings; None: nobody does."""
        self.asked: list[str] = []
        self.here: set[str] = set()
        """Addresses that this host has besides."""
        self.snapshot = SnapshotFile(path, "here")
        hosts = Hosts(one.store, one.cluster, one.driver, one.ipam)
        self.presence = Presence(
            hosts,
            one.cluster,
            one.me,
            self.snapshot,
            instance="boot",
            locate=self.locate,
            is_here=lambda address: address in {self.underlay, *self.here},
            reached=self.reached,
            measure=one.attachments.refresh_mtu,
            moved=self.move,
            grace=grace,
        )

    def locate(self, present: str) -> str:
        if not self.underlay:
            raise ConfigError("this host has no default route")
        return self.underlay

    def reached(self, addresses: Iterable[str]) -> dict[str, bool]:
        self.asked += addresses
        return dict.fromkeys(addresses, False) if self.answers is None else self.answers

    def move(self) -> None:
        self.moves.append(self.underlay)

    def beat(self) -> None:
        self.one.cluster.load(self.one.store.list("topology/").entries)
        self.presence.beat()

    def beat_until(self, condition: Callable[[], bool]) -> None:
        def holds() -> bool:
            self.beat()
            return condition()

        eventually(holds)


@pytest.fixture
def world(host: Callable[..., FakeHost], tmp_path: Path) -> Callable[..., World]:
    return lambda number=1, **options: World(host(number), tmp_path / f"snapshot{number}", **options)


def test_a_silent_host_is_collected_after_the_grace_by_one_host(world: Callable[..., World]) -> None:
    low, high = world(1), world(2)
    gone = world(3).one
    for one in (low, high, high):  # the higher id never does it
        one.beat()
    assert gone.store.get(gone.record.key)
    low.beat_until(lambda: not gone.store.get(gone.record.key))


def test_many_hosts_that_fall_silent_at_once_have_few_lines(
    world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    one = world(1)
    hosts = [Host(f"{number:032x}", f"peer{number}", f"192.0.2.{number}") for number in range(2, 14)]
    one.one.store.transact([], [Put(host.key, host.encode()) for host in hosts])
    one.beat()
    one.beat()
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("is silent" in line for line in said) == 10
    assert "hosts that fell silent as well: 2 more (weft host ls)" in said


@pytest.mark.parametrize("answers", [{"192.168.78.3": True}, {}])
def test_a_silent_host_that_is_up_is_kept_until_it_answers_no_more(
    world: Callable[..., World], caplog: pytest.LogCaptureFixture, answers: dict[str, bool]
) -> None:
    """Its weft is stopped and its containers run; or nobody knows whether they do."""
    low, gone = world(1), world(3).one
    low.answers = answers
    for _ in range(3):
        low.beat_until(lambda: len(low.asked) >= 3)
        low.asked.clear()
    assert gone.store.get(gone.record.key)
    assert caplog.text.count("gives no sign of life, but it") == 1
    (due,) = low.presence.due()
    assert due.seconds is None
    assert "weft host forget h3" in due.why
    low.answers = None
    low.beat_until(lambda: not gone.store.get(gone.record.key))
    assert caplog.text.count("answers no ping any more") == 1


def test_the_grace_of_a_silent_host_begins_with_its_last_answer(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("weft.presence.monotonic", lambda: clock[0])
    low, gone = world(1, grace=600), world(3).one
    low.answers = {gone.record.underlay: True}
    low.beat()
    low.beat_until(lambda: low.presence.due()[0].seconds is None)
    low.answers = None
    for seconds, asked in ((59, 1), (61, 2), (599, 3)):
        clock[0] = 1000.0 + seconds
        low.beat_until(lambda: not low.presence._asking.is_alive())
        assert len(low.asked) == asked
    assert gone.store.get(gone.record.key)
    assert 0 < (low.presence.due()[0].seconds or 0) <= 1
    clock[0] = 1601.0
    low.beat_until(lambda: not gone.store.get(gone.record.key))


@pytest.mark.parametrize("mine", [True, False])
def test_who_has_the_address_of_a_silent_host_by_now_is_no_sign_of_it(world: Callable[..., World], mine: bool) -> None:
    low, other, gone = world(1), world(2), world(3).one
    low.answers = {gone.record.underlay: True}
    if mine:
        low.here.add(gone.record.underlay)
    else:
        other.beat()
        heir = replace(other.one.record, underlay=gone.record.underlay)
        other.one.store.transact([], [Put(heir.key, heir.encode())])
    low.beat_until(lambda: not gone.store.get(gone.record.key))
    assert gone.record.underlay not in low.asked


def test_nobody_is_collected_before_the_grace_is_over(world: Callable[..., World]) -> None:
    low, gone = world(1, grace=3600), world(3).one
    for _ in range(3):
        low.beat()
    assert gone.store.get(gone.record.key)


def test_a_host_that_was_forgotten_registers_again(world: Callable[..., World]) -> None:
    one = world(1)
    one.beat()
    store, record = one.one.store, one.one.record
    store.transact([], [Delete(record.key), Delete(record.alive_key)])
    one.beat()
    assert store.get(record.key)
    assert store.get(record.alive_key)


def test_a_changed_address_is_published_and_an_address_that_is_missing_for_a_moment_is_not(
    world: Callable[..., World],
) -> None:
    one = world(1)
    one.beat()
    one.underlay = ""
    one.beat()
    assert one.one.me.host.underlay == "192.168.78.1"
    assert not one.moves
    one.underlay = "192.168.78.91"
    one.beat()
    assert one.moves == []
    one.beat()
    assert one.moves == ["192.168.78.91"]
    entry = one.one.store.get(one.one.record.key)
    assert entry
    assert "192.168.78.91" in entry.value


def test_the_snapshot_has_the_networks_of_this_host_only(world: Callable[..., World]) -> None:
    one, other = world(1), world(2)
    mine = one.one.create_network("a" * 64, CIDR)
    other.one.create_network("b" * 64, CIDR)
    remote = other.one.run("b" * 64, "e" * 64, CIDR)
    other.one.create_network("c" * 64, "10.2.0.0/24")
    one.beat()
    kept = {entry.key: entry.value for entry in one.snapshot.load()}
    assert {key for key in kept if key.startswith("topology/networks/")} == {mine.key}
    assert kept[remote.key] == remote.encode()
    assert one.one.record.key in kept
    assert other.one.record.key in kept


@pytest.mark.parametrize("text", ["", "{", "[]", '{"origin":"there","entries":[["a","b"]]}', '{"origin":"here"}'])
def test_a_snapshot_that_is_broken_or_of_another_store_is_not_used(tmp_path: Path, text: str) -> None:
    file = SnapshotFile(tmp_path / "snapshot.json", "here")
    assert file.load() == ()
    file.save([("a", "b")])
    assert file.load() == (Entry("a", "b", 0),)
    (tmp_path / "snapshot.json").write_text(text)
    assert file.load() == ()


class Work:
    """A delete that the store does not take while it is away."""

    def __init__(self) -> None:
        self.away = True
        self.done: list[str] = []

    def __call__(self, name: str) -> Callable[[], None]:
        def work() -> None:
            if self.away:
                raise StoreError("away")
            self.done.append(name)

        return work


def test_deletes_wait_for_the_store_and_are_done_in_order_once() -> None:
    unfinished, work = Unfinished(), Work()
    unfinished.do("one", work("one"))
    unfinished.do("two", work("two"))
    with pytest.raises(StoreError):
        unfinished.settle()
    work.away = False
    together(*[unfinished.settle] * 4)
    unfinished.do("three", work("three"))
    assert work.done == ["one", "two", "three"]


def test_a_delete_that_meets_a_bug_does_not_hold_up_the_others(caplog: Any) -> None:
    unfinished, work = Unfinished(), Work()
    unfinished.do("first", work("first"))
    unfinished.do("broken", lambda: [].pop())
    unfinished.do("last", work("last"))
    work.away = False
    unfinished.settle()
    assert work.done == ["first", "last"]
    assert "broken" in caplog.text


def test_nothing_is_added_before_this_host_is_registered(world: Callable[..., World], monkeypatch: Any) -> None:
    monkeypatch.setattr("weft.presence._START_SECONDS", 0.0)
    one = world(1)
    one.presence.problem = "etcd is away"
    with pytest.raises(StoreError, match="not registered: etcd is away"):
        one.presence.admit()
    one.beat()
    one.presence.admit()


def test_only_so_many_calls_wait_at_boot(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """weft serve has a fixed number of threads, and calls that need no store must find one."""
    monkeypatch.setattr("weft.presence._WAITERS", 2)
    one = world(1)
    one.presence.problem = "etcd is away"
    outcomes: Queue[str] = Queue()

    def admit() -> None:
        try:
            one.presence.admit()
            outcomes.put("admitted")
        except StoreError as error:
            outcomes.put(str(error))

    threads = [threading.Thread(target=admit) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert outcomes.get(timeout=5) == "this host is not registered: etcd is away"
    assert outcomes.empty()
    assert one.presence.refused.is_set()
    one.beat()
    assert [outcomes.get(timeout=5) for _ in range(2)] == ["admitted"] * 2
    for thread in threads:
        thread.join()


def test_what_was_refused_at_boot_is_started_when_the_store_is_back(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.presence._START_SECONDS", 0.0)
    one, engine = world(1), FakeEngine()
    restarts = Restarts(engine, one.presence, cast(Adoption, SimpleNamespace(found_networks=False)))
    with pytest.raises(StoreError) as refusal:
        one.presence.admit()
    engine.refused = [("web", f"remote: {refusal.value}"), ("db", "no such file or directory")]
    one.presence.problem = "etcd is away"
    restarts.sweep(engine.inventory((), ()), ())
    assert len(engine.refused) == 2
    one.beat()
    for _ in range(2):
        restarts.sweep(engine.inventory((), ()), ())
        assert [name for name, _ in engine.refused] == ["db"]


def test_nothing_is_added_under_an_id_that_another_machine_has_taken(
    world: Callable[..., World], monkeypatch: Any
) -> None:
    monkeypatch.setattr("weft.presence._START_SECONDS", 0.0)
    one = world(1)
    one.beat()
    record, store = one.one.record, one.one.store
    clone = replace(record, underlay="192.168.78.99")
    store.transact([], [Delete(record.alive_key)])
    store.transact([], [Put(record.alive_key, "of the clone"), Put(record.key, clone.encode())])
    with pytest.raises(IdInUse):
        one.beat()
    with pytest.raises(StoreError, match="not registered"):
        one.presence.admit()
    store.transact([], [Delete(record.alive_key)])
    one.beat()
    one.presence.admit()


def test_a_kernel_that_cannot_tell_the_address_keeps_nobody_from_living(
    world: Callable[..., World], monkeypatch: Any
) -> None:
    one = world(1)

    def fail(present: str) -> str:
        raise KernelError("read the host's routes", 4)

    monkeypatch.setattr(one.presence, "_locate", fail)
    one.beat()
    assert one.one.store.get(one.one.record.alive_key)


def test_who_waits_for_deletes_does_not_try_them_again_one_by_one() -> None:
    unfinished, tries, begin = Unfinished(), [], threading.Barrier(8)

    def hang() -> None:
        tries.append(1)
        if len(tries) > 1:
            time.sleep(0.2)
        raise StoreError("hangs")

    unfinished.do("one", hang)
    refusals: list[str] = []

    def wait() -> None:
        begin.wait()
        with pytest.raises(StoreError) as refusal:
            unfinished.settle()
        refusals.append(str(refusal.value))

    together(*[wait] * 8)
    assert refusals == ["hangs"] * 8
    assert len(tries) <= 4  # who came after the first had failed may try once more


def test_a_wireguard_address_that_another_host_got_meanwhile_is_given_up(
    world: Callable[..., World], tmp_path: Path
) -> None:
    """The store was lost, and the other one was first. This host stays one of the cluster, and takes another."""
    first, second = world(1).one, world(2)
    second.one.encryption._publish = second.presence.publish
    second.one.encryption.require()
    taken = second.one.me.host.wg_address
    first.me.encrypt(PrivateKey.generate().public, taken, 51820)
    first.publish()
    second.one.store.transact([], [Delete(second.one.record.key)])
    second.one.cluster.load([])
    again = World(second.one, tmp_path / "again")
    again.presence.start(restored=False)
    try:
        assert not second.one.me.host.wg_address
        assert second.one.store.get(second.one.record.key)
        second.one.encryption.require()
        assert second.one.me.host.can_encrypt
        assert second.one.me.host.wg_address != taken
        assert first.me.host.wg_address == taken
    finally:
        again.presence.stop()


@pytest.mark.parametrize("first_to_encrypt", ["the copy", "both"])
def test_a_copied_machine_makes_a_key_of_its_own(
    world: Callable[..., World], tmp_path: Path, first_to_encrypt: str
) -> None:
    """Its owner has deleted the id only. With one key on two hosts, nobody would take either of them as a peer."""
    first, second = world(1), world(2)
    for each in (first, second):
        each.one.encryption._publish = each.presence.publish
    first.one.encryption.require()
    key = first.one.me.host.wg_key
    shutil.copy(tmp_path / "1.key", tmp_path / "2.key")
    if first_to_encrypt == "both":  # by an earlier weft
        second.one.me.encrypt(key, "100.64.0.9", 51820)
        second.one.publish()
        second.one.store.transact([], [Delete(second.one.record.key)])
        second.one.cluster.load([])
        again = World(second.one, tmp_path / "again")
        again.presence.start(restored=False)
        again.presence.stop()
        assert not second.one.me.host.wg_key
    second.one.encryption.require()
    record = second.one.store.get(second.one.record.key)
    assert record
    assert Host.read(record) == second.one.me.host
    assert second.one.me.host.can_encrypt
    assert second.one.me.host.wg_key != key == first.one.me.host.wg_key
    assert second.one.kernel.tunnel
    assert second.one.kernel.tunnel.key == second.one.me.host.wg_key
    kept = KeyFile(tmp_path / "2.key").read()
    assert kept
    assert kept.public == second.one.me.host.wg_key
