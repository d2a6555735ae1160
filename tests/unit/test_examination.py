"""What an examination of a large cluster costs the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Semaphore
from time import monotonic, time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.netns.plugin import wait_until
from weft.cluster import Cluster
from weft.config import from_environment
from weft.dataplane import Peer, Tunnel
from weft.doctor import checkup, examination
from weft.doctor.checkup import Checkup, Place
from weft.doctor.examination import Doctor
from weft.doctor.facts import Facts, Report
from weft.doctor.verdict import Examination
from weft.foreign import Foreign
from weft.identity import LocalHost
from weft.model import ALIVE, QUESTIONS, REPORTS, TOPOLOGY, Host
from weft.reconcile import Contact, ObservedTunnel
from weft.store import Entry, Listing, Put
from weft.store.sqlite import SqliteStore

HOSTS = [
    Host(f"{n:032x}", f"h{n}", f"10.0.{n // 250}.{n % 250 + 1}", wg_key=f"key-{n:040}", wg_port=51820)
    for n in range(150)
]
ME, *OTHERS = HOSTS
SILENT, LACKING, WAITING = OTHERS[3], OTHERS[5], OTHERS[140]


class Answering:
    """A store whose other hosts answer at once, all but one, and how often each answer was read."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.read: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def beat(self, key: str, value: str, seconds: float) -> bool:
        if key.startswith(QUESTIONS):
            question = key.removeprefix(QUESTIONS)
            for host in OTHERS:
                if host is not SILENT:
                    report = Report(host.id, host.name, question, time(), "0.1.0")
                    self._store.transact([], [Put(f"{REPORTS}{question}/{host.id}", report.encode())])
        return self._store.beat(key, value, seconds)

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        found = self._store.get_many(keys)
        self.read.update(found.keys())
        return found

    def list(self, prefix: str) -> Listing:
        found = self._store.list(prefix)
        self.read.update(entry.key for entry in found.entries)
        return found


def tunnel() -> ObservedTunnel:
    """To all others but one; another one never answered."""
    peers = {host.wg_key: Peer(host.wg_key, "", host.underlay, 51820) for host in OTHERS if host is not LACKING}
    contacts = {key: Contact(time() - 20, 1000, 1000) for key in peers}
    contacts[WAITING.wg_key] = Contact(0.0, 0, 500)
    return ObservedTunnel(Tunnel(ME.wg_key, "", 51820, 1420, frozenset(peers.values())), "kernel", contacts=contacts)


@pytest.fixture
def answering(store: SqliteStore) -> Answering:
    for host in HOSTS:
        store.transact([], [Put(host.key, host.encode()), Put(ALIVE + host.id, "")])
    return Answering(store)


@pytest.fixture
def doctor(answering: Answering) -> Doctor:
    cluster = Cluster()
    cluster.load(answering.list(TOPOLOGY).entries)
    answering.read.clear()
    checkup: Any = SimpleNamespace(look=lambda: Facts("h0", 4789), reached=lambda addresses: {})
    probes: Any = SimpleNamespace(probe=lambda deadline: None, links=lambda **_: [])
    store: Any = answering
    foreign = Foreign(store, cluster).look
    return Doctor(store, cluster, LocalHost(ME), checkup, probes, tunnel=tunnel, foreign=foreign, port=4789)


def test_each_report_is_read_once(answering: Answering, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(examination, "_POLL_SECONDS", 0.02)
    table = doctor.examine().table
    reports = [times for key, times in answering.read.items() if key.startswith(REPORTS)]
    assert reports == [1] * (len(OTHERS) - 1)
    assert table[SILENT.name]["host"] == "warning"
    assert table[LACKING.name]["host"] == "ok"


def test_a_foreign_entry_of_the_store_is_a_warning(answering: Answering, doctor: Doctor) -> None:
    answering.transact([], [Put("elsewhere", "1")])
    (finding,) = [one for one in doctor.examine().findings if one.check == "store"]
    assert (finding.severity, finding.command) == ("warning", "weft gc --entry elsewhere")
    assert "weft knows no such key" in finding.evidence


def test_a_report_is_short_and_has_the_peers_that_matter(answering: Answering, doctor: Doctor) -> None:
    doctor._cluster.questions = {"q": OTHERS[0].id}
    doctor.start()
    doctor.notice(None)
    wait_until(lambda: answering.get(f"{REPORTS}q/{ME.id}"), "the report")
    doctor.stop()
    text = answering.get(f"{REPORTS}q/{ME.id}").value
    assert len(text) < 10_000
    report = Report.decode(text)
    assert report.unpeered == (LACKING.wg_key,)
    assert next(iter(report.peerings)) == WAITING.wg_key


def test_whoever_asks_gets_an_examination_that_began_afterwards(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ask while one is under way: what that has seen may be from before a repair. They share the next one."""
    under_way, may_end, begun = Event(), Event(), []

    def examine() -> Examination:
        begun.append(monotonic())
        under_way.set()
        assert may_end.wait(10)
        return Examination((), {str(len(begun)): {}})

    asking = Semaphore(0)

    def clock() -> float:
        asking.release()
        return monotonic()

    monkeypatch.setattr(doctor, "_examine", examine)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(doctor.examine)
        assert under_way.wait(10)
        monkeypatch.setattr(examination, "monotonic", clock)
        later = [pool.submit(doctor.examine) for _ in range(2)]
        assert all(asking.acquire(timeout=10) for _ in later)
        may_end.set()
        assert list(first.result().table) == ["1"]
        assert [list(one.result().table) for one in later] == [["2"], ["2"]]
    assert len(begun) == 2


def test_a_part_of_the_checkup_that_hangs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "_LOOK_SECONDS", 0.5)
    answered = Event()

    def hanging() -> dict[str, Any]:
        answered.wait()
        return {"engine": "too late"}

    host: Any = SimpleNamespace(users=lambda ports: {}, switches=list, mounts=lambda: "not shared")
    looking = Checkup(from_environment({}), host, lambda: Place("", ()), [hanging, lambda: {"listener": "not there"}])
    try:
        facts = looking.look()
    finally:
        answered.set()
    assert (facts.mounts, facts.listener, facts.engine) == ("not shared", "not there", "")


def test_an_examination_ends_whatever_hosts_and_probes_do(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One host never answers, none says that it has probed, and our own probing goes on for ever."""
    assert examination._ANSWER_SECONDS < examination._LONGEST_SECONDS < 10
    monkeypatch.setattr(examination, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(examination, "_LONGEST_SECONDS", 0.3)
    monkeypatch.setattr(examination, "_MESH", len(HOSTS))
    ended = Event()
    monkeypatch.setattr(doctor, "_probe", ended.wait)
    try:
        assert len(doctor.examine().table) == len(HOSTS)
    finally:
        ended.set()


def test_a_long_look_into_the_store_is_not_held_against_the_others(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins with the question, and all but one host answer that; it takes as long as it may, and longer."""
    monkeypatch.setattr(examination, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(examination, "_LONGEST_SECONDS", 0.3)
    asked: list[int] = []
    ended = Event()

    def search(end: float) -> None:
        asked.append(len(doctor._store.list(QUESTIONS).entries))
        ended.wait()

    monkeypatch.setattr(doctor, "_foreign", search)
    try:
        table = doctor.examine().table
    finally:
        ended.set()
    assert asked == [1]
    assert [name for name, row in table.items() if row["host"] != "ok"] == [SILENT.name]
    assert table[ME.name]["store"] == "unknown"


def test_of_many_hosts_an_examination_is_renewed_more_rarely(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float] = []
    now = 1000.0
    monkeypatch.setattr(examination, "monotonic", lambda: now)
    monkeypatch.setattr(doctor, "_renew", lambda: begun.append(now))
    doctor._last = now, Examination((), {})
    for moment in (1061.0, 1089.0, 1091.0):
        now = moment
        doctor.renew()
    wait_until(lambda: begun, "an examination")
    assert begun == [1091.0]
