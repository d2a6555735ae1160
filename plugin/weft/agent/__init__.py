"""The one loop that keeps this host's kernel as the store says.

Triggers only say what may be wrong: store changes, kernel events, a timer. The loop coalesces them and plans again.
Three sizes of work, all planned by `reconcile`:

- *delta*: the rows of just the endpoints that a store change touched;
- *repair*: just the links and rows that a kernel event named, where they differ from what is wanted;
- *resync*: everything against a fresh dump: at start, after lost events or a failure, and on the timer.

Nothing is removed before the store's first snapshot; until that comes, what was last known is put where it is
missing, and nothing else is done. While the store is away the last known state stays in force. The timer backs off
when a resync is dear, so that its share of a CPU stays small.

What there should be, and how to get there, is in `links` and `rows`. Links come first: a row needs its device.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from math import inf
from time import monotonic, time
from typing import Protocol

from weft.agent.links import Links
from weft.agent.rows import Rows
from weft.attachments import Attachments
from weft.cluster import Cluster, Touched
from weft.dataplane import KernelEvent, LinkEvent, News, Overflow, Row, RowEvent, TunnelEvent, vnis_of
from weft.encryption import Encryption
from weft.errors import KernelError, WeftError
from weft.identity import LocalHost
from weft.model import TOPOLOGY
from weft.reconcile import Kernel, Plan, TunnelPlan
from weft.store import Changes, Snapshot, Store, Watch
from weft.topology import Limit

log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
_RETRY_MOST = 30.0
_TUNNEL_RETRY_SECONDS = 2.0
_DUTY = 50
"""A timed resync may take one fiftieth of the time."""


class Monitor(Protocol):
    """Iterating blocks for kernel events; `close()` from any thread ends it."""

    def __iter__(self) -> Iterator[KernelEvent]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Question:
    """Asked by another thread, and answered by the loop when its work is done."""

    ask: Callable[[], Plan | None]
    answer: Future[Plan | None]

    def settle(self) -> None:
        try:
            self.answer.set_result(self.ask())
        except Exception as error:
            self.answer.set_exception(error)


Trigger = Snapshot | Changes | KernelEvent | _Question | None
"""None is the last of all."""


@dataclass(slots=True)
class _Batch:
    """Triggers that came together, sorted by what they ask for."""

    stop: bool = False
    loaded: bool = False
    resync: bool = False
    tunnel: bool = False
    touched: Touched = field(default_factory=Touched)
    links: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    rows: dict[Row, bool] = field(default_factory=dict)
    questions: list[_Question] = field(default_factory=list)

    @property
    def follows(self) -> bool:
        """True if the store asks for it; otherwise what there is to do is drift."""
        return bool(self.loaded or self.touched.networks or self.touched.hosts or self.touched.endpoints)


class Agent:
    """One per host. Its loop alone changes mirror, links and rows; other threads queue triggers (but see `Rows.news`).

    :param cluster: the mirror, which the agent feeds.
    :param monitor: opens the stream of kernel events.
    :param resync: seconds between timed resyncs.
    :param tunnel_monitor: the same as `monitor` for what encrypted networks need, if there can be some.
    :param probes: have the networks for probes as well.
    """

    def __init__(
        self,
        store: Store,
        cluster: Cluster,
        kernel: Kernel,
        me: LocalHost,
        attachments: Attachments,
        *,
        monitor: Callable[[News], Monitor],
        resync: float,
        encryption: Encryption | None = None,
        tunnel_monitor: Callable[[], Monitor] | None = None,
        probes: bool = False,
    ) -> None:
        self._failures: list[KernelError] = []
        self.cluster = cluster
        self.rows = Rows(kernel, cluster, me)
        self.links = Links(
            kernel, cluster, me, attachments, encryption, self.rows.networks, self._failures.append, probes=probes
        )
        self.listeners: list[Callable[[Touched | None], None]] = []
        """Called after each batch from the store, quickly and never raising; with None after a snapshot."""
        self.problem = ""
        """What of the last work failed; "" if nothing did."""
        self.resynced: float | None = None
        """When everything was last compared, in Unix time."""
        self.seconds = 0.0
        """How long that took."""
        self.repaired = 0
        """Links and rows that were otherwise than they should be although nothing had changed."""
        self.busy_since: float | None = None
        """When the loop began what it does now, by the monotonic clock; None while it waits."""
        self.work = {"resync": (0, 0.0), "changes": (0, 0.0)}
        """How often everything was compared, or just what had changed; and how many seconds that took in all."""
        self.losses = 0
        """How often kernel events were lost, so that everything had to be compared."""
        self._me = me
        self._attachments = attachments
        self._resync_seconds = resync
        self._encryption = encryption
        self._triggers: queue.SimpleQueue[Trigger] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._tasks: dict[str, Callable[[], None]] = {
            "agent": self._loop,
            "store-watch": partial(self._follow, "store", lambda: store.watch(TOPOLOGY)),
            "kernel-monitor": partial(self._follow, "kernel", lambda: monitor(self.rows.news)),
        }
        if tunnel_monitor:
            self._tasks["tunnel-monitor"] = partial(self._follow, "tunnel", tunnel_monitor)
        self._sources: dict[str, Watch | Monitor] = {}
        self._loaded = False
        self._coming: Cluster | None = None
        """What has come of a snapshot until now."""
        self._limit: Limit | None = None
        """As the last resync had it."""
        self._retry_seconds = _RETRY_SECONDS
        self._next_resync = monotonic()
        self._next_tunnel = inf
        """When to try again to make encrypted networks work."""

    def refresh(self) -> None:
        """Compare everything soon. Any thread may call."""
        self._triggers.put(Overflow())

    def responds(self, seconds: float) -> bool:
        """Whether the loop goes round within so many seconds. Any thread may call."""
        try:
            self._ask(lambda: None).result(seconds)
        except TimeoutError:
            return False
        return True

    def preview(self, seconds: float) -> Plan:
        """See `plan`, of the running loop; `KernelError` if that does not come round in time. Any thread may call."""
        try:
            plan = self._ask(self.plan).result(seconds)
        except TimeoutError as error:
            raise KernelError("plan", 0, f"the agent has been busy for {seconds:.0f} s: see weft's log") from error
        return plan or Plan()

    def _ask(self, ask: Callable[[], Plan | None]) -> Future[Plan | None]:
        question = _Question(ask, Future())
        self._triggers.put(question)
        return question.answer

    def start(self, *, restored: bool = False) -> None:
        """:param restored: the mirror holds what was last known, to begin with, since the store may be away."""
        self._loaded = restored
        self._threads = [threading.Thread(target=work, name=name, daemon=True) for name, work in self._tasks.items()]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all threads. The data plane stays as it is."""
        self._stopping.set()
        for source in list(self._sources.values()):
            source.close()
        self._triggers.put(None)
        for thread in self._threads:
            thread.join(timeout=5)

    # Triggers

    def _follow(self, name: str, open_source: Callable[[], Watch | Monitor]) -> None:
        """Pass on everything from a source; open it again whenever it fails."""
        failing = False
        while not self._stopping.is_set():
            try:
                source = self._sources[name] = open_source()
                for trigger in source:
                    self.losses += isinstance(trigger, Overflow)
                    self._triggers.put(trigger)
                    if failing:
                        log.info("%s events are back", name)
                    failing = False
                    del trigger  # a snapshot is large, and the next trigger may be long in coming
            except WeftError as error:
                if not failing:
                    log.error("no %s events: %s; the data plane stays as it is, trying again", name, error)
                failing = True
            except Exception:
                log.exception("following %s events met a bug; trying again", name)
            self._stopping.wait(_RETRY_SECONDS)

    def _collect(self) -> _Batch:
        """Wait for a trigger or the timer, and take all that has come."""
        batch = _Batch()
        events: list[tuple[str, str | None]] = []
        try:
            due = min(self._next_resync, self._next_tunnel)
            trigger = self._triggers.get(timeout=max(0.0, due - monotonic()) if self._loaded else None)
            while True:
                match trigger:
                    case Snapshot():
                        if self._take(trigger):
                            batch.loaded = batch.resync = True
                            events.clear()
                    case Changes():
                        events.extend(trigger.events)
                    case LinkEvent(name, present):
                        (batch.links if present else batch.lost).add(name)
                    case RowEvent():
                        batch.rows[trigger.row] = trigger.present
                    case TunnelEvent():
                        batch.tunnel = True
                    case Overflow():
                        batch.resync = True
                    case _Question():
                        batch.questions.append(trigger)
                    case None:
                        batch.stop = True
                trigger = self._triggers.get_nowait()
        except queue.Empty:
            pass
        batch.touched = self.cluster.apply(events)
        return batch

    def _take(self, part: Snapshot) -> bool:
        """Read a part of what the store has, while the next one is on its way; whether it was the last.

        A part that cannot be read makes the whole worthless: what it lacks would be removed.
        """
        coming, self._coming = self.cluster.blank() if part.first else self._coming, None
        if coming is None:
            return False
        coming.apply((entry.key, entry.value) for entry in part.entries)
        if part.last:
            self.cluster.become(coming)
            self._loaded = True
        else:
            self._coming = coming
        return part.last

    # The loop

    def _loop(self) -> None:
        while True:
            try:
                batch = self._collect()
            except Exception:
                log.exception("the agent met a bug in what the store sent; comparing everything")
                batch = _Batch(resync=True)
            if batch.stop:
                return
            self.busy_since = monotonic()
            if self._loaded:
                for listener in self.listeners:
                    listener(None if batch.loaded else batch.touched)
                self._work(batch)
            for question in batch.questions:
                question.settle()
            self.busy_since = None

    def _work(self, batch: _Batch) -> None:
        began = monotonic()
        self._attachments.unpin_seen()
        before, attaching = self.links.done + self.rows.done, bool(self._attachments.pinned())
        batch.resync |= monotonic() >= self._next_resync
        try:
            if batch.resync:
                self._refresh_mtu()
            elif batch.touched.hosts and self._attachments.limit(paths=True) != self._limit:
                batch.resync = True
            batch.resync |= self._sync_encryption(batch)
            if batch.resync:
                self.resync()
            else:
                self._follow_changes(batch)
                self.rows.repair(batch.rows)
        except KernelError as error:
            self._failures.append(error)
        except Exception:
            log.exception("the agent met a bug; trying again in %.0f s", _RETRY_MOST)
            self._next_resync = monotonic() + _RETRY_MOST
        if not (batch.follows or attaching):
            self.repaired += self.links.done + self.rows.done - before
        self._retry_failures()
        kind = "resync" if batch.resync else "changes"
        times, seconds = self.work[kind]
        self.work[kind] = times + 1, seconds + monotonic() - began

    def _retry_failures(self) -> None:
        """One broken network does not keep the others from being served: failures come up when all is done."""
        if not self._failures:
            return
        self.problem = "; ".join(map(str, self._failures))
        for error in self._failures:
            log.error("%s; trying again in %.0f s", error, self._retry_seconds)
        self._failures.clear()
        self._next_resync = monotonic() + self._retry_seconds
        self._retry_seconds = min(self._retry_seconds * 2, _RETRY_MOST)

    def resync(self) -> None:
        """Compare everything with the kernel and correct it."""
        began = monotonic()
        self._limit = self._attachments.limit(paths=True)
        active = self.links.active()
        self.rows.forget(self.rows.networks - active)
        self.links.sync(None)
        self.rows.sync(active)
        self.links.report_mtu(active & self.cluster.networks.keys())  # the probes' networks have no record
        if not self._failures:
            self._retry_seconds, self.problem = _RETRY_SECONDS, ""
        self.resynced, self.seconds = time(), monotonic() - began
        pause = max(self._resync_seconds * random.uniform(0.8, 1.2), _DUTY * self.seconds)
        self._next_resync = monotonic() + pause

    def plan(self) -> Plan:
        """What a full comparison would do now, but for devices that stay a while after their last container."""
        steps = tuple(self.links.plan())
        rows = self.rows.plan(self.rows.networks | self.links.active())
        return Plan(steps, rows, self._encryption.plan() if self._encryption else TunnelPlan())

    def _refresh_mtu(self) -> None:
        try:
            self._attachments.refresh_mtu()
        except KernelError as error:
            self._failures.append(error)

    def _sync_encryption(self, batch: _Batch) -> bool:
        """WireGuard comes before what relies on it. True if the devices of encrypted networks have to be other ones."""
        now = monotonic()
        due = batch.resync or batch.tunnel or now >= self._next_tunnel
        first = batch.touched.networks and not self._me.host.wg_key  # one of them may be our first encrypted one
        if self._encryption is None or not (due or batch.touched.hosts or first):
            return False
        try:
            changed = self._encryption.sync()
        except Exception:  # plain networks do not need it
            log.exception("encryption met a bug; trying again in %.0f s", _RETRY_MOST)
            self._next_tunnel = now + _RETRY_MOST
            return False
        self._next_tunnel = now + _TUNNEL_RETRY_SECONDS if self._encryption.unsettled else inf
        return changed

    def _follow_changes(self, batch: _Batch) -> None:
        """Links first: networks that came or went, and what kernel events named. Then the rows of what changed."""
        links, rows, touched = self.links, self.rows, batch.touched
        active = links.active()
        fresh = active - rows.networks
        gone = links.dropped(touched.networks & rows.networks - active)
        rows.forget(gone)
        changed = fresh | gone | touched.networks & rows.networks
        remade = links.sync(batch.links | batch.lost | links.names(changed))
        # A device that is remade, by us or by a handler, has lost its rows, and a remade bridge its ports as well.
        remade = (remade | vnis_of(batch.lost)) & rows.networks
        if remade:
            log.warning("devices of %s were missing and are made again", ", ".join(f"VNI {vni}" for vni in remade))
            links.sync(links.names(remade))
        anew = fresh | remade | rows.moved(touched)
        rows.sync(anew)
        rows.follow(touched, rows.networks - anew - vnis_of(links.shut({})))
