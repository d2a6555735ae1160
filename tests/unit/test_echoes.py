"""The monitor's thread drops events of what is as it should be: no order of things may hide drift by that."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Set
from typing import Self

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeKernel
from weft.agent.rows import Rows, _Wanted
from weft.cluster import Cluster
from weft.dataplane import Bridge, Fdb, Neighbour, Row, RowEvent, Station, Vxlan
from weft.identity import LocalHost
from weft.model import Host
from weft.reconcile import RowPlan

VNI = 7
MACS = (b"\x02" * 6, b"\x04" * 6)
PLACES = (b"\xc0\x00\x02\x01", b"\xc0\x00\x02\x02")
ROWS: list[Row] = [
    *(Fdb("vx7", mac, vtep) for mac in MACS for vtep in PLACES),
    *(Station("vx7", mac) for mac in MACS),
    *(Neighbour("br7", address, mac) for address in PLACES for mac in MACS),
]
WISHES = st.sets(st.sampled_from(ROWS)).map(lambda rows: set({row.key: row for row in rows}.values()))
"""One row for each key."""


class Kernel(FakeKernel):
    """Tells what happens to its rows as the real one does: nothing of a row that is replaced, no MAC of a neighbour
    that is gone. `meanwhile` is what others do before each row is written."""

    def __init__(self) -> None:
        super().__init__()
        self.events: deque[RowEvent] = deque()
        self.meanwhile: Callable[[], None] = lambda: None

    def write_rows(self, plan: RowPlan) -> None:
        for write, rows in ((self.put, plan.put), (self.delete, plan.delete)):
            for row in rows:
                self.meanwhile()
                write(row)

    def put(self, row: Row) -> None:
        if row not in self.rows:
            self.rows = {other for other in self.rows if other.key != row.key} | {row}
            self.events.append(RowEvent(row, True))

    def delete(self, row: Row) -> None:
        """A neighbour is deleted by its address."""
        key = row.key if isinstance(row, Neighbour) else None
        for found in [other for other in self.rows if other == row or other.key == key]:
            self.rows.remove(found)
            told = found._replace(mac=b"") if isinstance(found, Neighbour) else found
            self.events.append(RowEvent(told, False))


class Bench:
    """Rows whose threads do their steps when they are told to."""

    def __init__(self) -> None:
        cluster, me = Cluster(), LocalHost(Host("e" * 32, "here", "192.0.2.9"))
        cluster.loaded = True
        self.kernel = Kernel()
        self.rows = Rows(self.kernel, cluster, me)
        self.wanted = self.rows._wanted[VNI] = _Wanted()
        self._queue: deque[RowEvent] = deque()

    def want(self, rows: set[Row]) -> None:
        self.rows._change(VNI, set(self.wanted.rows), rows)

    def listen(self) -> None:
        """The monitor reads an event."""
        if self.kernel.events:
            event = self.kernel.events.popleft()
            self._queue.extend(RowEvent(row, event.present) for row in self.rows.news([event.row], event.present))

    def repair(self) -> None:
        """The loop takes what has been told."""
        told = {event.row: event.present for event in self._queue}
        self._queue.clear()
        self.rows.repair(told)

    def settle(self) -> None:
        while self.kernel.events or self._queue:
            while self.kernel.events:
                self.listen()
            self.repair()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_others_do_and_whenever_it_is_heard_of_the_kernel_ends_as_wanted(data: st.DataObject) -> None:
    bench = Bench()
    others: list[Callable[[], None]] = [
        bench.listen,
        lambda: bench.kernel.put(data.draw(st.sampled_from(ROWS))),
        lambda: bench.kernel.delete(data.draw(st.sampled_from(ROWS))),
    ]
    ours: list[Callable[[], None]] = [lambda: bench.want(data.draw(WISHES)), bench.repair]

    def meanwhile() -> None:
        for act in data.draw(st.lists(st.sampled_from(others), max_size=2)):
            act()

    bench.kernel.meanwhile = meanwhile
    for act in data.draw(st.lists(st.sampled_from([*others, *ours]), max_size=20)):
        act()
    bench.kernel.meanwhile = lambda: None
    bench.settle()
    assert bench.kernel.rows == bench.wanted.rows


def test_echoes_are_no_news_and_what_undoes_drift_is() -> None:
    bench = Bench()
    bench.want({ROWS[0]})
    assert list(bench.rows.news([ROWS[0]], True)) == []
    assert list(bench.rows.news([ROWS[1]], False)) == []
    assert list(bench.rows.news([ROWS[0]], False)) == [ROWS[0]]
    assert list(bench.rows.news([ROWS[0]], True)) == [ROWS[0]]
    assert list(bench.rows.news([ROWS[0]], True)) == []
    assert list(bench.rows.news([Fdb("vx8", MACS[0], PLACES[0])], True)) == []


def test_what_is_wanted_has_changed_when_the_kernel_is_written_to() -> None:
    bench, wants = Bench(), list[int]()
    bench.kernel.meanwhile = lambda: wants.append(bench.rows.counts[VNI])
    bench.want({ROWS[0]})
    bench.kernel.links |= {"br7": Bridge("br7", 1500), "vx7": Vxlan("vx7", VNI, "192.0.2.9", 4789, 1450, "br7")}
    bench.rows.sync({VNI})
    assert wants == [1, 0]
    assert not bench.kernel.rows


def test_a_row_that_stays_is_never_missing_while_what_is_wanted_changes() -> None:
    """The monitor looks meanwhile."""
    looks: list[bool] = []

    class Rows(set[Row]):
        def __isub__(self, other: Set[object]) -> Self:
            looks.append({ROWS[0], ROWS[4], ROWS[5]} <= self)
            return super().__isub__(other)

    wanted = _Wanted(Rows([ROWS[0], ROWS[4]]))
    wanted.change({ROWS[0], ROWS[4]}, {ROWS[0], ROWS[5]})
    assert looks == [True]
    assert wanted.rows == {ROWS[0], ROWS[5]}
