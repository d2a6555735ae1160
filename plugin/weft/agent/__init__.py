"""The one loop that keeps this host's kernel as the store says.

Triggers only say what may be wrong: store changes, kernel events, a timer. The loop coalesces them and plans again.
Three sizes of work, all planned by `reconcile`:

- *delta*: the rows of just the endpoints that a store change touched;
- *repair*: just the links and rows that a kernel event named, where they differ from what is wanted;
- *resync*: everything against a fresh dump: at start, after lost events or a failure, and on the timer.

Nothing is removed before the store's first snapshot; until that comes, what was last known is put where it is
missing, and nothing else is done. While the store is away the last known state stays in force. The timer backs off
when a resync is dear, so that its share of a CPU stays small.

A network is *active* while this host has endpoints on it. Its devices stay for a while after the last one has gone
(until the next timed resync, or until Docker removes the network), since a container that restarts wants them back.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from math import inf
from time import monotonic, time
from typing import Protocol

from weft import topology
from weft.attachments import Attachments
from weft.cluster import Cluster, Touched
from weft.dataplane import (
    KernelEvent,
    Link,
    LinkEvent,
    Neighbour,
    News,
    Overflow,
    Port,
    Row,
    RowEvent,
    Shaper,
    TunnelEvent,
    Vxlan,
    device_names,
    shaper_names,
    source_of,
    vni_of,
    vxlan_name,
)
from weft.encryption import Encryption
from weft.errors import KernelError, WeftError
from weft.identity import LocalHost
from weft.model import TOPOLOGY
from weft.reconcile import (
    Create,
    Kernel,
    ObservedLink,
    Plan,
    Remove,
    RowPlan,
    Step,
    TunnelPlan,
    plan_links,
    plan_rows,
)
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


class _Stop:
    """Last trigger of all."""


@dataclass(frozen=True, slots=True)
class _Question:
    """Asked by another thread, and answered by the loop when its work is done."""

    ask: Callable[[], Plan | None]
    answer: Future[Plan | None]


Trigger = Snapshot | Changes | KernelEvent | _Question | _Stop


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
        touched = self.touched
        return self.loaded or bool(touched.networks or touched.hosts or touched.endpoints)


@dataclass(slots=True)
class _Wanted:
    """The rows of one network. `neighbours` finds one by address: the event of a deleted one lacks the MAC."""

    rows: set[Row] = field(default_factory=set)
    neighbours: dict[bytes, Neighbour] = field(default_factory=dict)

    def change(self, old: set[Row], new: set[Row]) -> None:
        """A row that stays is never missing, whoever looks meanwhile."""
        gone = old - new
        self.rows |= new
        self.neighbours.update((row.address, row) for row in new if isinstance(row, Neighbour))
        for row in gone:
            if isinstance(row, Neighbour) and self.neighbours.get(row.address) == row:
                del self.neighbours[row.address]
        self.rows -= gone

    def complete(self, row: Row) -> Row:
        """The row that an event means."""
        if isinstance(row, Neighbour) and not row.mac:
            return self.neighbours.get(row.address, row)
        return row


class Agent:
    """One per host.

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
        self.cluster = cluster
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
        self.steps: Counter[str] = Counter()
        """What was done to links (`create`, `update`, `remove`) and to rows (`put`, `delete`)."""
        self.losses = 0
        """How often kernel events were lost, so that everything had to be compared."""
        self._store = store
        self._kernel = kernel
        self._me = me
        self._attachments = attachments
        self._open_monitor = monitor
        self._resync_seconds = resync
        self._encryption = encryption
        self._open_tunnel_monitor = tunnel_monitor
        self._with_probes = probes
        self._triggers: queue.SimpleQueue[Trigger] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._sources: dict[str, Watch | Monitor] = {}
        self._loaded = False
        self._coming: Cluster | None = None
        """What has come of a snapshot until now."""
        self._wanted: dict[int, _Wanted] = {}
        """By the VNI of each network that has devices here."""
        self._told: set[Hashable] = set()
        """Keys of the rows that the kernel's monitor has last told to be otherwise than wanted."""
        self._failures: list[KernelError] = []
        self._limit: Limit | None = None
        """As the last resync had it."""
        self._stale: set[str] = set()
        """Endpoints with an MTU that is not their network's any more, and were reported."""
        self._large: set[tuple[int, int]] = set()
        """Networks whose users chose an MTU that is too large, with what fits; these were reported as well."""
        self._done = 0
        """Steps done and rows written."""
        self._kept: set[str] = set()
        """Ports that are in use but not in the store, and were reported."""
        self._retry_seconds = _RETRY_SECONDS
        self._held: set[str] = set()
        """Tunnel devices that stay encrypted against the store's word, and were reported."""
        self._next_resync = monotonic()
        self._next_tunnel = inf
        """When to try again to make encrypted networks work."""

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

    @property
    def sizes(self) -> tuple[int, int]:
        """How many links and rows there should be."""
        rows = self.rows
        ports = [e for vni in rows for e in self.cluster.local_endpoints(vni, self._me.id)]
        networks = filter(None, map(self.cluster.networks.get, rows))
        shapers = sum(e.rate > 0 for e in ports) + sum(network.multicast > 0 for network in networks)
        return 2 * len(rows) + len(ports) + shapers, sum(rows.values())

    @property
    def rows(self) -> dict[int, int]:
        """How many rows there should be, by VNI."""
        return {vni: len(wanted.rows) for vni, wanted in list(self._wanted.items())}

    def _ask(self, ask: Callable[[], Plan | None]) -> Future[Plan | None]:
        question = _Question(ask, Future())
        self._triggers.put(question)
        return question.answer

    def start(self, *, restored: bool = False) -> None:
        """:param restored: the mirror holds what was last known, to begin with, since the store may be away."""
        self._loaded = restored
        sources = [("store-watch", self._watch), ("kernel-monitor", self._monitor)]
        if self._open_tunnel_monitor:
            sources.append(("tunnel-monitor", partial(self._follow, "tunnel", self._open_tunnel_monitor)))
        for name, work in (("agent", self._loop), *sources):
            thread = threading.Thread(target=work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End all threads. The data plane stays as it is."""
        self._stopping.set()
        for source in list(self._sources.values()):
            source.close()
        self._triggers.put(_Stop())
        for thread in self._threads:
            thread.join(timeout=5)

    # Triggers

    def _watch(self) -> None:
        self._follow("store", lambda: self._store.watch(TOPOLOGY))

    def _monitor(self) -> None:
        self._follow("kernel", lambda: self._open_monitor(self._news))

    def _news(self, rows: Iterable[Row], present: bool) -> Iterable[Row]:
        """Of rows that have come or gone, those that should not have, and what undoes that again.

        The others are echoes of our own writes, 300,000 of them when a large network is programmed. This runs in the
        monitor's thread while the loop works, and misses nothing: what is wanted changes before the kernel is written
        to. So whatever is as it should be now is put right by a later change itself if it is not any more then, and a
        network that nobody wants yet is compared with a dump when somebody does.
        """
        for one in rows:
            if wanted := self._wanted.get(vni_of(one.device) or 0):
                row = wanted.complete(one)
                if present != (row in wanted.rows):
                    self._told.add(row.key)
                    yield row
                elif self._told and row.key in self._told:
                    self._told.remove(row.key)
                    yield row

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
                    case _Stop():
                        batch.stop = True
                trigger = self._triggers.get_nowait()
        except queue.Empty:
            pass
        batch.touched = self.cluster.apply(events)
        return batch

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
                _answer(question)
            self.busy_since = None

    def _work(self, batch: _Batch) -> None:
        began = monotonic()
        self._unpin_seen()
        before, attaching = self._done, bool(self._attachments.pinned())
        batch.resync |= monotonic() >= self._next_resync
        try:
            if batch.resync:
                self._refresh_mtu()
            elif batch.touched.hosts and self._attachments.limit(paths=True) != self._limit:
                batch.resync = True
            if self._sync_encryption(batch):
                batch.resync = True
            if batch.resync:
                self.resync()
            else:
                self._follow_changes(batch)
                self._repair_rows(batch.rows)
        except KernelError as error:
            self._failures.append(error)
        except Exception:
            log.exception("the agent met a bug; trying again in %.0f s", _RETRY_MOST)
            self._next_resync = monotonic() + _RETRY_MOST
        if not (batch.follows or attaching):
            self.repaired += self._done - before
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
        active = self._active()
        for vni in self._wanted.keys() - active:
            del self._wanted[vni]
        self._sync_links(None)
        self._sync_rows(active)
        self._report_mtu(active & self.cluster.networks.keys())  # the probes' networks have no record
        if not self._failures:
            self._retry_seconds, self.problem = _RETRY_SECONDS, ""
        self.resynced, self.seconds = time(), monotonic() - began
        pause = max(self._resync_seconds * random.uniform(0.8, 1.2), _DUTY * self.seconds)
        self._next_resync = monotonic() + pause

    def plan(self) -> Plan:
        """What a full comparison would do now, but for devices that stay a while after their last container."""
        steps, _ = self._plan_links(None)
        wanted, observed = set[Row](), set[Row]()
        for vni in self._wanted.keys() | self._active():
            wanted |= topology.network_rows(self.cluster, vni, self._me.host)
            if self._kernel.has_links(device_names(vni)):
                observed |= self._kernel.observe_rows(device_names(vni))
        rows = plan_rows(self._adopted(wanted, observed), observed)
        return Plan(tuple(steps), rows, self._encryption.plan() if self._encryption else TunnelPlan())

    def _adopted(self, wanted: set[Row], observed: set[Row]) -> set[Row]:
        """The rows that shall be there: before the store's first snapshot, what is there may be newer than what was
        last known."""
        if self.cluster.loaded:
            return wanted
        present = {row.key for row in observed}
        return observed | {row for row in wanted if row.key not in present}

    def _report_mtu(self, vnis: set[int]) -> None:
        """Name the containers that keep an MTU which is not the network's any more, once."""
        stale: set[str] = set()
        large: set[tuple[int, int]] = set()
        for network in (topology.network_of(self.cluster, vni) for vni in sorted(vnis)):
            mtu = self._attachments.mtu(network)
            local = self._attachments.with_mtu(self.cluster.local_endpoints(network.vni, self._me.id))
            others = [endpoint for endpoint in local if endpoint.mtu not in (0, mtu)]
            stale.update(endpoint.id for endpoint in others)
            if {endpoint.id for endpoint in others} - self._stale:
                log.warning(
                    "the MTU of %s is %d now; until they are restarted, these containers keep another: %s",
                    network.title,
                    mtu,
                    ", ".join(f"{self.cluster.title(endpoint)} ({endpoint.mtu})" for endpoint in others),
                )
            fits = self._attachments.limit(encrypted=network.encrypted, paths=True).mtu if network.mtu else 0
            if network.mtu > fits:
                large.add((network.vni, fits))
                if (network.vni, fits) not in self._large:
                    log.warning("%s was made with mtu=%d, but only %d gets through", network.title, network.mtu, fits)
        self._stale, self._large = stale, large

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

    def _active(self) -> set[int]:
        pinned = {endpoint.vni for endpoint in self._attachments.pinned()}
        used = {vni for vni in self.cluster.local_networks(self._me.id) | pinned if vni in self.cluster.networks}
        return used | self._probe_networks()

    def _probe_networks(self) -> set[int]:
        return topology.probe_networks(self.cluster, self._me.host) if self._with_probes else set()

    def _unpin_seen(self) -> None:
        for endpoint in self._attachments.pinned():
            if endpoint.id in self.cluster.endpoints.get(endpoint.vni, ()):
                self._attachments.unpin(endpoint.id)

    def _follow_changes(self, batch: _Batch) -> None:
        """Links first: networks that came or went, and what kernel events named. Then the rows of what changed."""
        touched, active = batch.touched, self._active()
        fresh = active - self._wanted.keys()
        gone = {vni for vni in touched.networks & self._wanted.keys() - active if not self._keeps(vni)}
        for vni in gone:
            del self._wanted[vni]
        moved = {vni for vni in self._wanted if self._moved(vni, touched)}
        changed = fresh | gone | touched.networks & self._wanted.keys()
        remade = self._sync_links(batch.links | batch.lost | {name for vni in changed for name in self._names(vni)})
        # A device that is remade, by us or by a handler, has lost its rows, and a remade bridge its ports as well.
        remade = (remade | set(filter(None, map(vni_of, batch.lost)))) & self._wanted.keys()
        if remade:
            log.warning("devices of %s were missing and are made again", ", ".join(f"VNI {vni}" for vni in remade))
            self._sync_links({name for vni in remade for name in self._names(vni)})
        anew = fresh | moved | remade
        self._sync_rows(anew)
        shut = set(filter(None, map(vni_of, self._shut({}))))
        for vni in touched.endpoints.keys() & self._wanted.keys() - anew - shut:
            self._apply_delta(vni, touched)
        if touched.hosts:
            for vni in self._probe_networks() & self._wanted.keys() - anew - shut:
                self._change(vni, set(self._wanted[vni].rows), topology.network_rows(self.cluster, vni, self._me.host))

    def _moved(self, vni: int, touched: Touched) -> bool:
        """True if a host that has, or until now had, endpoints on the network is at another address."""
        if not touched.hosts:
            return False
        return not touched.hosts.isdisjoint(self.cluster.hosts_of(vni) | touched.spread.get(vni, set()))

    def _keeps(self, vni: int) -> bool:
        """True while this host's engine has the network, used or not."""
        return vni in self.cluster.networks and self._me.id in self.cluster.members.get(vni, ())

    def _names(self, vni: int) -> set[str]:
        ports = {topology.port_name(e.id) for e in self.cluster.local_endpoints(vni, self._me.id)}
        return {*device_names(vni), *ports}  # `_plan_links` adds what limits them

    # Links

    def _wanted_links(self, names: set[str] | None = None) -> dict[str, Link]:
        """Those of these names, with others of the same networks. (None: all)"""
        wanted: dict[str, Link] = {}
        pinned = self._attachments.pinned()
        vnis = self._wanted.keys() | self._active()
        for vni in vnis if names is None else vnis & self._networks_of(names):
            local = self.cluster.local_endpoints(vni, self._me.id)
            endpoints = [*local, *(e for e in pinned if e.vni == vni)]
            network = topology.network_of(self.cluster, vni)
            wanted.update((link.name, link) for link in self._attachments.links(network, endpoints))
        return wanted

    def _networks_of(self, names: set[str]) -> set[int]:
        """VNIs of the networks whose links have these names, as far as there are such."""
        here = [*self._attachments.pinned(), *self.cluster.endpoints_of(self._me.id)]
        ports = {endpoint.vni for endpoint in here if topology.port_name(endpoint.id) in names}
        return ports | set(filter(None, map(vni_of, names)))

    def _sync_links(self, names: set[str] | None) -> set[int]:
        """Correct the links of these names (None: all); return the VNIs of which a device had to be made."""
        if names is not None and not names:
            return set()
        steps, wrong = self._plan_links(names)
        self._perform(steps, wrong)
        made = (step.link.name for step in steps if isinstance(step, Create))
        return set(filter(None, map(vni_of, made)))

    def _plan_links(self, names: set[str] | None) -> tuple[list[Step], set[str]]:
        """What corrects the links of these names, and those that no handler needs as they are."""
        if names is not None:  # a link and what limits it belong together, whichever has changed
            names = names | set(filter(None, map(source_of, names)))
            names |= shaper_names(names)
        observed = self._kernel.observe_links(names)
        # Read after the kernel: a port made meanwhile is pinned, hence wanted.
        wanted = {n: link for n, link in self._wanted_links(names).items() if names is None or n in names}
        # A veth that is gone cannot be given to a running container again: only a handler makes one.
        lost = {name for name, link in wanted.items() if isinstance(link, Port) and name not in observed}
        lost |= {name for name, link in wanted.items() if isinstance(link, Shaper) and link.source in lost}
        steps = plan_links([link for name, link in wanted.items() if name not in lost], observed)
        pruned = {step.name for step in steps if isinstance(step, Remove)} - wanted.keys()
        used = pruned if not self.cluster.loaded else self._used(pruned) if pruned else set()
        held = self._held_back(steps, observed)
        shut = self._shut(observed)
        used = (used | held) - shut
        steps = [step for step in steps if not (isinstance(step, Remove) and step.name in used)]
        held |= shaper_names(held)
        steps = [step for step in steps if not (isinstance(step, Create) and step.link.name in held)]
        return steps, shut.union(step.link.name for step in steps if isinstance(step, Create))

    def _shut(self, observed: Mapping[str, ObservedLink]) -> set[str]:
        """Tunnel devices that must not be there: those of encrypted networks while that cannot be relied on."""
        if self._encryption is None or not self._encryption.breached:
            return set()
        networks = {**topology.PROBE_NETWORKS, **self.cluster.networks}
        known = {vxlan_name(vni) for vni, network in networks.items() if network.encrypted}
        return known.union(filter(None, map(_encrypted, observed.values())))  # the store may have lost some

    def _used(self, names: set[str]) -> set[str]:
        """Those of these links that a running container uses, although the store does not know it.

        The store may be another than it was, or restored from a backup. A veth cannot be given back: it is kept.
        """
        used = {name for p in self._used_ports() for name in (p.name, p.bridge, f"vx{p.bridge[2:]}")}
        used |= shaper_names(used)
        if new := {name for name in names & used if topology.is_port_name(name)} - self._kept:
            self._kept |= new
            log.error("%s: in use by a container, but not in the store; kept", ", ".join(sorted(new)))
        return names & used

    def _held_back(self, steps: Iterable[Step], observed: Mapping[str, ObservedLink]) -> set[str]:
        """Encrypted tunnel devices that must not become plain ones, although the store says so.

        A running container uses the network that the store does not know (see `_used`): it would be heard by others.
        """
        creations = (step.link for step in steps if isinstance(step, Create))
        plain = {link.name: link for link in creations if isinstance(link, Vxlan) and not link.encrypted}
        possible = plain.keys() & (self._held | set(filter(None, map(_encrypted, observed.values()))))
        if not possible:
            return set()
        ports, known = self._used_ports(), self._wanted_links()  # in this order, as in `_sync_links`
        strangers = {port.bridge: port.name for port in ports if port.name not in known}
        held = {name for name in possible if plain[name].bridge in strangers}
        for link in (plain[name] for name in sorted(held - self._held)):
            log.error(
                "%s is a plain one in the store, but a container that is not in there uses it encrypted (%s): it has "
                "no way to other hosts; stop its containers here, and make the network anew with -o encrypted",
                self.cluster.networks[link.vni].title,
                strangers[link.bridge],
            )
        self._held = (self._held - possible) | held
        return held

    def _used_ports(self) -> list[Port]:
        """Those of running containers."""
        links = self._kernel.observe_links().items()
        ports = [seen.link for name, seen in links if seen.carrier and topology.is_port_name(name)]
        return [port for port in ports if isinstance(port, Port)]

    def _perform(self, steps: list[Step], wrong: set[str]) -> None:
        """:param wrong: links that no handler needs as they are."""
        for step in steps:
            with self._attachments.step_lock:
                if self._is_a_handlers(step, wrong):
                    continue
                log.info("%s", step)
                try:
                    self._kernel.perform(step)
                    self._done += not self._lingers(step)
                    self.steps[type(step).__name__.lower()] += 1
                except KernelError as error:
                    self._failures.append(error)

    def _lingers(self, step: Step) -> bool:
        """True if a device goes because its last container did: that is no drift."""
        return isinstance(step, Remove) and vni_of(source_of(step.name) or step.name) in self.cluster.networks

    def _is_a_handlers(self, step: Step, wrong: set[str]) -> bool:
        """True if a handler, since the plan was made, has begun to need what goes or has made what is missing."""
        match step:
            case Remove(name):
                return name in self._pinned_names() - wrong
            case Create(link):
                return self._kernel.has_links([link.name])
        return False

    def _pinned_names(self) -> set[str]:
        pinned = self._attachments.pinned()
        names = {name for e in pinned for name in (*device_names(e.vni), topology.port_name(e.id))}
        return names | shaper_names(names)

    # Rows

    def _sync_rows(self, vnis: set[int]) -> None:
        """Compute the rows of these networks anew and compare them with a dump."""
        for vni in vnis:
            self._wanted[vni] = _Wanted()
            self._wanted[vni].change(set(), topology.network_rows(self.cluster, vni, self._me.host))
        # A device that could not be made is among the failures already.
        ready = [vni for vni in vnis if self._kernel.has_links(device_names(vni))]
        if not ready:
            return
        observed = self._kernel.observe_rows([name for vni in ready for name in device_names(vni)])
        rows = [self._wanted[vni].rows for vni in ready]
        wanted = rows[0] if len(rows) == 1 else set[Row]().union(*rows)
        self._write(plan_rows(self._adopted(wanted, observed), observed))

    def _apply_delta(self, vni: int, touched: Touched) -> None:
        """Follow what changed on one network, without looking at the rest of it."""
        before, now = touched.endpoints[vni], self.cluster.endpoints.get(vni, {})
        old = topology.endpoint_rows(self.cluster, (e for e in before.values() if e), self._me.host)
        new = topology.endpoint_rows(self.cluster, (now[i] for i in before if i in now), self._me.host)
        if (hosts := self.cluster.hosts_of(vni)) != touched.spread[vni]:
            old |= topology.flood_rows(self.cluster, vni, touched.spread[vni], self._me.host)
            new |= topology.flood_rows(self.cluster, vni, hosts, self._me.host)
        self._change(vni, old, new)

    def _change(self, vni: int, old: set[Row], new: set[Row]) -> None:
        """Put these rows of a network in the place of those."""
        plan = plan_rows(new, old)
        self._wanted[vni].change(old, new)
        self._write(plan)

    def _repair_rows(self, events: dict[Row, bool]) -> None:
        """Put right what somebody else changed: a stranger that has gone again may have replaced what is wanted."""
        if not self.cluster.loaded:
            return
        by_network = ((self._wanted.get(vni_of(row.device) or 0), row, present) for row, present in events.items())
        seen = [(wanted, row, present) for wanted, row, present in by_network if wanted]
        keys = {row.key for wanted, row, present in seen if not (present and row in wanted.rows)}
        if not keys:
            return
        networks = {id(wanted): wanted for wanted, row, _ in seen if row.key in keys}
        wanted_rows = {row for wanted in networks.values() for row in wanted.rows if row.key in keys}
        strange = {row for _, row, present in seen if present and row.key in keys} - wanted_rows
        plan = plan_rows(wanted_rows, strange)
        for row in plan.put:
            log.warning("drift repaired: put back %s", row)
        for row in plan.delete:
            log.warning("drift repaired: removed %s", row)
        self._write(plan)

    def _write(self, plan: RowPlan) -> None:
        if plan:
            self._kernel.write_rows(plan)
            self._done += len(plan)
            self.steps.update(put=len(plan.put), delete=len(plan.delete))
            log.info("rows: %d put, %d deleted", len(plan.put), len(plan.delete))


def _answer(question: _Question) -> None:
    try:
        question.answer.set_result(question.ask())
    except Exception as error:
        question.answer.set_exception(error)


def _encrypted(seen: ObservedLink) -> str:
    """The name of an encrypted network's tunnel device; "" if it is none."""
    return seen.link.name if isinstance(seen.link, Vxlan) and seen.link.encrypted else ""
