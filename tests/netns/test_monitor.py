"""Kernel events of the data plane."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Thread

import pytest

from tests.netns.world import MTU, Host, wait_for
from weft.dataplane import FLOOD_MAC, Fdb, KernelEvent, LinkEvent, Neighbour, Overflow, Port, Row, RowEvent, Station
from weft.dataplane import pack_address as packed
from weft.kernel.monitor import GROUPS, Monitor
from weft.kernel.netlink import open_socket
from weft.reconcile import Create, Remove, RowPlan

MAC = bytes.fromhex("02420a000002")
ROWS: tuple[Row, ...] = (
    Fdb("vx7", MAC, packed("192.0.2.2")),
    Fdb("vx7", FLOOD_MAC, packed("192.0.2.2")),
    Station("vx7", MAC),
    Neighbour("br7", packed("10.0.0.2"), MAC),
    Neighbour("br7", packed("fd00::2"), MAC),
)


@contextmanager
def follow(monitor: Monitor) -> Iterator[list[KernelEvent]]:
    """The events as they come."""
    events: list[KernelEvent] = []

    def listen() -> None:
        for event in monitor:
            events.append(event)

    thread = Thread(target=listen)
    thread.start()
    try:
        yield events
    finally:
        monitor.close()
        thread.join(5)
        assert not thread.is_alive()


@pytest.fixture
def network(host: Host) -> Host:
    host.apply(*host.network(7), Port("wp1", "br7", MTU, peer="wc1"))
    return host


@pytest.fixture
def events(network: Host) -> Iterator[list[KernelEvent]]:
    with follow(network.kernel.monitor()) as followed:
        yield followed


def seen(events: list[KernelEvent], *expected: KernelEvent) -> bool:
    return wait_for(lambda: set(expected) <= set(events))


def test_links_come_and_go(network: Host, events: list[KernelEvent]) -> None:
    network.dp.ip("link del vx7")
    assert seen(events, LinkEvent("vx7", False))
    network.dp.ip("link add foreign type bridge")
    assert seen(events, LinkEvent("foreign", True))
    network.dp.ip("link set foreign name stranger")
    assert seen(events, LinkEvent("foreign", False), LinkEvent("stranger", True))
    network.ip("link del wc1")
    assert seen(events, LinkEvent("wp1", False))


def test_port_that_leaves_its_bridge_is_not_gone(network: Host, events: list[KernelEvent]) -> None:
    network.dp.ip("link set wp1 nomaster")
    network.dp.ip("link set wp1 down")
    assert seen(events, LinkEvent("wp1", True))
    assert LinkEvent("wp1", False) not in events


def test_rows_deleted_and_put_by_others(network: Host, events: list[KernelEvent]) -> None:
    network.put(*ROWS)
    events.clear()
    network.dp.bridge(f"fdb del {MAC.hex(':')} dev vx7 dst 192.0.2.2 self")
    network.dp.bridge(f"fdb del {MAC.hex(':')} dev vx7 master")
    network.dp.bridge("fdb append 00:00:00:00:00:00 dev vx7 dst 192.0.2.9 self")
    network.dp.ip(f"neigh replace fd00::2 dev br7 lladdr {MAC[::-1].hex(':')} nud permanent")
    assert seen(
        events,
        RowEvent(ROWS[0], False),
        RowEvent(ROWS[2], False),
        RowEvent(Fdb("vx7", FLOOD_MAC, packed("192.0.2.9")), True),
        RowEvent(Neighbour("br7", packed("fd00::2"), MAC[::-1]), True),
    )


@pytest.mark.parametrize("command", ["del 10.0.0.2 dev br7", "replace 10.0.0.2 dev br7 nud failed"])
def test_neighbour_that_is_gone_has_the_key_but_no_mac(network: Host, events: list[KernelEvent], command: str) -> None:
    network.put(*ROWS)
    network.dp.ip(f"neigh {command}")
    assert seen(events, RowEvent(Neighbour("br7", packed("10.0.0.2"), b""), False))


def test_row_that_becomes_short_lived_is_gone(network: Host, events: list[KernelEvent]) -> None:
    network.put(*ROWS)
    network.dp.bridge(f"fdb replace {MAC.hex(':')} dev vx7 dst 192.0.2.2 self dynamic")
    assert seen(events, RowEvent(ROWS[0], False))


def test_own_writes_are_events_as_well(network: Host, events: list[KernelEvent]) -> None:
    network.put(*ROWS)
    assert seen(events, *(RowEvent(row, True) for row in ROWS))
    network.kernel.write_rows(RowPlan(delete=ROWS))
    assert seen(events, *(RowEvent(row, False) for row in ROWS[:3]))


def test_many_events_of_several_kinds_are_all_told_but_for_what_is_no_news(network: Host) -> None:
    """They are read together: runs of one kind, and kinds in turn."""
    macs = [(0x02420A010000 + number).to_bytes(6, "big") for number in range(1000)]
    runs: list[Row] = [Fdb("vx7", mac, packed("192.0.2.2")) for mac in macs]
    runs += [Neighbour("br7", packed(f"10.1.{number >> 8}.{number & 255}"), mac) for number, mac in enumerate(macs)]
    turns: list[Row] = []
    for mac in macs[:200]:
        turns += [Station("vx7", mac), Neighbour("br7", packed(f"fd00::{mac[-2:].hex()}"), mac)]
    with follow(network.kernel.monitor()) as everything, follow(network.kernel.monitor(_odd)) as news:
        network.put(*runs)
        network.put(*turns)
        assert wait_for(lambda: len(everything) == len(runs) + len(turns))
        assert wait_for(lambda: len(news) == 500)
    told = [event.row for event in everything if isinstance(event, RowEvent) and event.present]
    assert sorted(told, key=str) == sorted([*runs, *turns], key=str)
    assert news == [RowEvent(row, True) for row in told if _odd([row], True)]


def _odd(rows: Iterable[Row], present: bool) -> list[Row]:
    return [row for row in rows if isinstance(row, Fdb) and row.mac[-1] % 2]


def test_what_the_kernel_does_by_itself_is_no_row_event(network: Host, events: list[KernelEvent]) -> None:
    network.kernel.perform(Create(Port("wp2", "br7", MTU, peer="wc2")))
    network.ip("link set wc2 up")
    network.dp.bridge(f"fdb add {MAC.hex(':')} dev vx7 master dynamic")
    network.dp.bridge(f"fdb add {MAC[::-1].hex(':')} dev wp1 master static")
    network.kernel.perform(Remove("wp2", "not wanted"))
    network.kernel.perform(Create(Port("wp3", "br7", MTU, peer="wc3")))
    assert seen(events, LinkEvent("wp2", False), LinkEvent("wp3", True))
    assert not [event for event in events if isinstance(event, RowEvent)]


def test_lost_events_are_told_and_later_ones_follow(network: Host) -> None:
    small = network.dp.do(partial(open_socket, receive_buffer=1, groups=GROUPS))
    monitor = Monitor(small, network.kernel._lookup.find)
    network.put(*(Station("vx7", (0x02420A000000 + number).to_bytes(6, "big")) for number in range(1000)))
    with follow(monitor) as events:
        assert seen(events, Overflow())
        network.put(ROWS[0])
        assert seen(events, RowEvent(ROWS[0], True))
        assert events.count(Overflow()) == 1


def test_closing_is_final_and_frees_all(network: Host) -> None:
    open_files = set(os.listdir("/proc/self/fd"))
    monitor = network.kernel.monitor()
    monitor.close()
    monitor.close()
    assert not list(monitor)

    with follow(network.kernel.monitor()) as events:
        network.dp.ip("link set wp1 down")
        assert seen(events, LinkEvent("wp1", True))
    assert set(os.listdir("/proc/self/fd")) == open_files
