"""How often the engine's networks are read: each is a request to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.unit.conftest import FakeHost
from tests.unit.test_agent import eventually
from weft.engine.inventory import Inventory
from weft.engine.sweeper import Outcome, Sweeper
from weft.errors import EngineError, StoreError, WeftError
from weft.store.sqlite import SqliteStore

NETWORKS = [f"n{number}" for number in range(5)]


class Watched:
    """A sweep that keeps what it was given: the names of the networks; None after a silence."""

    def __init__(self) -> None:
        self.again: float | None = None
        self.careful = False
        self.looks = 0
        self.seen: set[str] | None = None
        self.failing: dict[str, str] = {}
        self.silent: WeftError | None = None

    def sweep(self, inventory: Inventory, pools: object) -> Outcome:
        if self.silent:
            raise self.silent
        self.seen = {network.name for network in inventory.networks}
        self.looks += 1
        return Outcome(self.again, self.failing, unsure=self.careful and not inventory.fresh)

    def forget(self) -> None:
        self.seen = None


class Rig:
    """A sweeper that runs, and has read everything."""

    def __init__(self, host: FakeHost) -> None:
        self.engine, self.sweep = FakeEngine(), Watched()
        self.prunes = 0
        for network in NETWORKS:
            self.engine.add(network, network)
        host.cluster.load(host.store.list("topology/").entries)
        self.sweeper = Sweeper(self.engine, host.store, host.record, host.cluster, [self.sweep], pruned=self.prune)
        self.sweeper.sweep()
        self.engine.read.clear()
        self.sweeper.start()
        assert self.reads_until("n4") == NETWORKS  # since events come from now on only

    def prune(self) -> None:
        self.prunes += 1

    def reads_until(self, network: str) -> list[str]:
        """Ids of the networks that were read, to that one."""
        eventually(lambda: network in self.engine.read)
        read = list(self.engine.read)
        self.engine.read.clear()
        return read


@pytest.fixture
def rig(host: Callable[..., FakeHost], store: SqliteStore) -> Iterator[Rig]:
    made = Rig(host())
    yield made
    made.sweeper.stop()
    made.engine.changes.put(None)


def test_just_the_network_of_an_event_is_read_again(rig: Rig) -> None:
    rig.engine.changes.put("n3")
    assert rig.reads_until("n3") == ["n3"]


def test_a_prune_is_told(rig: Rig) -> None:
    rig.engine.changes.put("prune")
    eventually(lambda: rig.prunes == 1)


def test_all_are_read_again_at_once_when_a_sweep_has_to_be_sure(rig: Rig) -> None:
    rig.sweep.careful = True
    rig.engine.changes.put("n3")
    assert rig.reads_until("n4") == ["n3", *NETWORKS]


def test_a_sweep_that_waits_for_something_costs_no_reading(rig: Rig) -> None:
    rig.sweep.again = 0.01
    rig.sweeper.wake()
    eventually(lambda: rig.sweep.looks > 10)
    assert rig.engine.read == []


def test_what_came_and_went_is_known_without_reading_the_rest(rig: Rig) -> None:
    rig.engine.add("new", "new")
    del rig.engine.present["n1"]
    for network in ("n1", "new"):
        rig.engine.changes.put(network)
    assert rig.reads_until("new") == ["new"]
    eventually(lambda: rig.sweep.seen == {"n0", "n2", "n3", "n4", "new"})


def test_all_are_read_again_after_a_silence(rig: Rig) -> None:
    rig.engine.answers = False
    rig.sweeper.wake()
    eventually(lambda: rig.sweep.seen is None)
    rig.engine.answers = True
    assert rig.reads_until("n4") == NETWORKS


@pytest.mark.parametrize("error", [EngineError("does not answer"), StoreError("is away")])
def test_what_is_silent_for_one_sweep_is_forgotten_by_that_alone(
    host: Callable[..., FakeHost], error: WeftError
) -> None:
    one, sweeps = host(), [Watched(), Watched(), Watched()]
    one.cluster.load(one.store.list("topology/").entries)
    sweeper = Sweeper(FakeEngine(), one.store, one.record, one.cluster, sweeps)
    for number, sweep in enumerate(sweeps):
        sweep.failing = {f"object {number}": "is in the way"}
    for silent in (None, error, error):
        sweeps[1].silent = silent
        sweeper.sweep()
    assert [sweep.seen is None for sweep in sweeps] == [False, True, False]
    assert sorted(sweeper.conflicts) == ["object 0", "object 1", "object 2"]


def test_the_more_it_takes_to_read_all_the_less_often_the_timer_does(rig: Rig) -> None:
    assert 50 < rig.sweeper.sweep() <= 60
    read = rig.engine.inventory

    def read_slowly(*asked: Any) -> Inventory:
        time.sleep(0.7)
        return read(*asked)

    rig.engine.inventory = read_slowly  # type: ignore[assignment, method-assign]
    assert rig.sweeper.sweep() > 65


def test_who_asks_at_once_has_all_of_them_read(rig: Rig) -> None:
    rig.sweeper.sweep()
    assert rig.reads_until("n4") == NETWORKS
    rig.sweeper.look()
    assert rig.reads_until("n4") == NETWORKS
