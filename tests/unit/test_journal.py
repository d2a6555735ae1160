"""The last events: in order, waited for, and what a change of the cluster means in words."""

from __future__ import annotations

import threading

from weft.cluster import Cluster, Touched
from weft.journal import KEPT, Journal, changes
from weft.model import Endpoint, Host, Member, Network, Pool

H1, H2 = Host("a" * 32, "h1", "192.0.2.1"), Host("b" * 32, "h2", "192.0.2.2")
NETWORK = Network(42, "app", (Pool("10.0.0.0/24"),), 0, False, "h1")


def endpoint(number: int, host: Host = H2) -> Endpoint:
    return Endpoint(f"{number:064x}", 42, f"02:42:0a:00:00:{number:02x}", (f"10.0.0.{number}",), host.id)


def cluster() -> Cluster:
    made = Cluster()
    records = (H1, H2, NETWORK, Member(42, H1.id, "n"))
    made.apply([(record.key, record.encode()) for record in records])
    return made


def test_ids_grow_over_a_restart() -> None:
    first, second = Journal(clock=lambda: 1000.0), Journal(clock=lambda: 1001.0)
    for journal in (first, second):
        journal.add("info", "agent", "something")
    assert second.after()[0].id > first.after()[-1].id


def test_only_the_last_are_kept_and_only_later_ones_given() -> None:
    journal = Journal()
    for number in range(KEPT + 5):
        journal.add("info", "agent", str(number))
    kept = journal.after()
    assert [kept[0].text, kept[-1].text, len(kept)] == ["5", str(KEPT + 4), KEPT]
    assert [event.text for event in journal.after(kept[-3].id)] == [str(KEPT + 3), str(KEPT + 4)]


def test_who_waits_is_woken_by_the_next() -> None:
    journal = Journal()
    journal.add("info", "agent", "old")
    last = journal.after()[-1].id
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.extend(e.text for e in journal.after(last, wait=60)))
    waiting.start()
    journal.add("warning", "agent", "new")
    waiting.join(30)
    assert found == ["new"]
    assert journal.after(journal.after()[-1].id, wait=0.01) == []


def test_what_came_and_went_is_said() -> None:
    known = cluster()
    touched = known.apply([(endpoint(2).key, endpoint(2).encode()), (H2.alive_key, "x")])
    assert list(changes(known, touched)) == [
        "host h2 is alive",
        "network app (VNI 42): endpoint 10.0.0.2 on h2 is there",
    ]
    touched = known.apply([(endpoint(2).key, None), (H2.alive_key, None), (NETWORK.key, None)])
    assert list(changes(known, touched)) == [
        "host h2 is silent",
        "network VNI 42 is gone",
        "network VNI 42: endpoint 10.0.0.2 on h2 is gone",
    ]


def test_many_at_once_are_only_counted() -> None:
    known = cluster()
    touched = known.apply([(endpoint(number).key, endpoint(number).encode()) for number in range(2, 30)])
    assert list(changes(known, touched)) == ["network app (VNI 42): 28 endpoints changed, 28 there are"]


def test_an_endpoint_that_came_and_went_in_one_batch_is_nothing() -> None:
    known = cluster()
    assert list(changes(known, known.apply([(endpoint(2).key, endpoint(2).encode()), (endpoint(2).key, None)]))) == []


def test_a_snapshot_is_told_by_its_size() -> None:
    assert list(changes(cluster(), None)) == ["read from the store: 2 hosts, 1 networks, 0 endpoints"]
    assert list(changes(cluster(), Touched())) == []
