"""The one loop that compares the local Docker Engine with the store.

Triggers only say that something may differ: Docker's network events, changes of the cluster's networks, a timer. The
loop reads the engine's networks once and hands them to its sweeps, one after the other. Each network is a request, and
listing them costs more with each that there is, so only the timer reads those that no event has named. While the engine
or the store does not answer nothing is done: silence is not emptiness.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from weft.cluster import Cluster
from weft.engine.inventory import Engine, Inventory
from weft.errors import EngineError, StoreError, Unreadable, WeftError
from weft.model import POOLS, Host
from weft.store import Entry, Store

log = logging.getLogger(__name__)

_IDLE_SECONDS = 60.0
_DUTY = 100
"""Reading all networks by the timer may take a hundredth of the time: events tell of every change."""
_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one sweep.

    :param again: seconds after which to look again, None: at the next change.
    :param failing: by object, what could not be done and what a person may do about it.
    :param unsure: what is to be done needs a look at all networks afresh.
    """

    again: float | None = None
    failing: Mapping[str, str] = field(default_factory=dict)
    unsure: bool = False


@dataclass(frozen=True, slots=True)
class Due:
    """Something that is to be collected, why, and in how many seconds if nothing changes; None: not by itself."""

    what: str
    why: str
    seconds: float | None


class Sweep(Protocol):
    def sweep(self, inventory: Inventory, pools: Sequence[Entry]) -> Outcome:
        """Compare and correct.

        :param pools: the store's claims of pools, read before the inventory.
        """
        ...

    def forget(self) -> None:
        """Docker or the store was silent."""
        ...


class Patience:
    """Tells what has been seen at every look for so many seconds, from what is only passing.

    :param seconds: 0: at the first look.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[Hashable, float] = {}

    def lasting(self, seen: Iterable[Hashable]) -> set[Hashable]:
        now = monotonic()
        self._since = {one: self._since.get(one, now) for one in seen}
        return {one for one, since in self._since.items() if now - since >= self._seconds}

    def left(self, one: Hashable) -> float:
        """Seconds until it lasts, if it goes on."""
        return max(0.0, self._since.get(one, now := monotonic()) + self._seconds - now)

    def forget(self) -> None:
        """What was seen before a silence may be something else of that name after it."""
        self._since.clear()


class Sweeper:
    """The sweeps of one host.

    :param pruned: called when the engine has pruned networks.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        host: Host,
        cluster: Cluster,
        sweeps: Iterable[Sweep],
        *,
        pruned: Callable[[], None] = lambda: None,
    ) -> None:
        self._pruned = pruned
        self._engine = engine
        self._store = store
        self._me = host
        self._cluster = cluster
        self._sweeps = tuple(sweeps)
        self.conflicts: dict[str, str] = {}
        """By object, what does not agree with the cluster and cannot be made to, since two sweeps at least."""
        self.problem = ""
        """Why the engine cannot be followed; "" if it can."""
        self.version = ""
        """The engine's, once it answered."""
        self._failing: set[str] = set()
        self._said: dict[Sweep, Mapping[str, str]] = {}
        """What each sweep could not do, at last."""
        self._known: Inventory | None = None
        """As the last sweep has read it."""
        self._changed: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Ids of networks that were changed since; "": any may be."""
        self._next_reading = 0.0
        """When to read all of them again."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="sweeper", daemon=True)

    def start(self) -> None:
        threading.Thread(target=self._follow, name="engine-events", daemon=True).start()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout=5)

    def wake(self) -> None:
        """Something may differ."""
        self._wake.set()

    def _follow(self) -> None:
        failing = False

        def changed(network: str) -> None:
            nonlocal failing
            if failing:
                log.info("the Docker Engine answers again")
            failing = False
            self.problem = ""
            self._changed.put(network)
            self._wake.set()

        while not self._stopping.is_set():
            try:
                self._engine.follow(changed, self._pruned)
            except EngineError as error:
                if not failing:
                    log.warning("%s; networks of other hosts and clean-up wait for it", error)
                failing = True
                self.problem = str(error)
            except Exception:
                log.exception("following the engine's events met a bug; trying again")
            self._stopping.wait(_RETRY_SECONDS)

    def _loop(self) -> None:
        pause = 0.0
        while not self._stopping.is_set():
            self._wake.wait(pause)
            self._wake.clear()
            began = monotonic()
            try:
                with self._lock:
                    pause = self._sweep(*self._news())
                self._stopping.wait(monotonic() - began)  # an engine with hundreds of networks has other work as well
            except WeftError as error:
                log.debug("nothing compared now: %s", error)
                for sweep in self._sweeps:
                    sweep.forget()
                pause = _RETRY_SECONDS
            except Exception:
                log.exception("comparing with Docker met a bug")
                self._stopping.wait(_IDLE_SECONDS)

    def look(self, before: Inventory | None = None, changed: Collection[str] = ()) -> tuple[Inventory, Sequence[Entry]]:
        """What a sweep compares.

        :param before: what was read before the networks with the ids `changed` were changed. (None: all is read)
        """
        pools = self._store.list(POOLS).entries
        subnets = {entry.key.removeprefix(POOLS) for entry in pools}
        inventory = self._engine.inventory(self._cluster.memberships(self._me.id), subnets, before, changed)
        self.version = inventory.version
        return inventory, pools

    def sweep(self) -> float:
        """Read and compare everything once; return the seconds until the next time."""
        with self._lock:
            return self._sweep(None)

    def _news(self) -> tuple[Inventory | None, set[str]]:
        """What was read, unless it is time to read all; and the ids of the networks that events have named since."""
        changed: set[str] = set()
        with suppress(queue.Empty):
            while True:
                changed.add(self._changed.get_nowait())
        if "" in changed or monotonic() >= self._next_reading:
            return None, set()
        return self._known, changed

    def _sweep(self, before: Inventory | None, changed: Collection[str] = ()) -> float:
        self._known = None  # should this fail, all is read again
        if not self._cluster.loaded:
            return _IDLE_SECONDS  # the agent's first snapshot wakes us
        began = monotonic()
        inventory, pools = self.look(before, changed)
        took = monotonic() - began
        outcomes = [self._run(sweep, inventory, pools) for sweep in self._sweeps if not self._stopping.is_set()]
        self._report({what: text for outcome in outcomes for what, text in outcome.failing.items()})
        self._known = inventory
        now = monotonic()
        if any(outcome.unsure for outcome in outcomes):
            self._next_reading = now
        elif before is None:
            self._next_reading = now + max(_IDLE_SECONDS, _DUTY * took)
        pauses = [outcome.again for outcome in outcomes if outcome.again is not None]
        return max(0.0, min([*pauses, self._next_reading - now]))

    def _run(self, sweep: Sweep, inventory: Inventory, pools: Sequence[Entry]) -> Outcome:
        """One sweep's failure keeps no other from its work, nor lets it forget what it has seen."""
        try:
            outcome = sweep.sweep(inventory, pools)
        except WeftError as error:
            sweep.forget()
            name = type(sweep).__name__.lower()
            failing: Mapping[str, str] = {name: f"weft's {name} cannot go on: {error}"}
            if isinstance(error, EngineError | StoreError) and not isinstance(error, Unreadable):
                log.debug("weft's %s waits: %s", name, error)
                failing = self._said.get(sweep, {})  # silence ends no conflict
            outcome = Outcome(_RETRY_SECONDS, failing)
        except Exception:
            log.exception("comparing with Docker met a bug")
            outcome = Outcome()
        self._said[sweep] = outcome.failing
        return outcome

    def _report(self, failing: Mapping[str, str]) -> None:
        """A race is over by the next sweep; what is not is said, once."""
        lasting = {what: text for what, text in failing.items() if what in self._failing}
        for what in sorted(lasting.keys() - self.conflicts.keys()):
            log.error("conflict: %s", lasting[what])
        for what in sorted(self.conflicts.keys() - lasting.keys()):
            log.info("the conflict about %s is over", what)
        self.conflicts, self._failing = lasting, set(failing)
