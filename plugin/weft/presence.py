"""This host as the others see it: registered and alive; and what goes with that, at every beat.

At each beat the underlay address is looked up again, what the store could not take is made up for, hosts that were
silent for the whole grace are collected, and the last state known is kept on disk. The grace is counted by this host's
own monotonic clock, and only while the store answers: no clock of another host, and no outage, shortens it. And only
while the silent host answers no ping either: if just its weft is stopped, its containers go on with their addresses.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic

from weft.cluster import Cluster
from weft.engine.sweeper import Due
from weft.errors import ConfigError, Conflict, KernelError, StoreError, WeftError
from weft.hosts import LEASE_SECONDS, AddressInUse, Hosts, IdInUse, TunnelInUse, Unlike
from weft.identity import LocalHost
from weft.model import Host
from weft.snapshot import SnapshotFile
from weft.unfinished import Unfinished

log = logging.getLogger(__name__)

NOT_REGISTERED = "this host is not registered"
_BEAT_SECONDS = 3.0
_RETRY_SECONDS = 1.0
_START_SECONDS = 30.0
"""So long after weft's start a container's start waits for the store: at a reboot of everything etcd may be slower."""
_WAITERS = 24
"""Calls that wait for it at once: the other threads of 32 are for calls that need not wait."""
_ASKED = 10
"""So often within the grace is a silent host asked for an answer."""
_NAMED = 10
"""Hosts that fall silent together and have a line each: after an outage of the store it may be all of a thousand."""
_DUTY = 50
"""Writing the snapshot may take one fiftieth of the time."""


class Presence:
    """
    :param instance: tells this run of the machine from others (`identity.instance`).
    :param locate: the underlay address now, given the present one; may raise `ConfigError` or `KernelError`.
    :param is_here: whether this host has an address.
    :param reached: which of these addresses answer a ping; who is missing could not be asked.
    :param measure: looks at the underlay's MTU again, and says whether it has changed; may raise `KernelError`.
    :param moved: called when the underlay's address or MTU has changed.
    :param grace: seconds that a host must be silent, and answer no ping, before what it has is collected.
    """

    def __init__(
        self,
        hosts: Hosts,
        cluster: Cluster,
        me: LocalHost,
        snapshot: SnapshotFile,
        *,
        instance: str,
        locate: Callable[[str], str],
        is_here: Callable[[str], bool],
        reached: Callable[[Iterable[str]], Mapping[str, bool]],
        measure: Callable[[], bool],
        moved: Callable[[], None],
        grace: float,
    ) -> None:
        self.problem = ""
        """Why the last beat failed; "" if it did not."""
        self.seconds: float | None = None
        """How long the store took to answer the last beat; None: it did not yet."""
        self.turned = monotonic()
        """When the loop last went round, whether the store answered or not."""
        self.refused = threading.Event()
        """Set when something was refused because this host was not registered."""
        self._hosts = hosts
        self._cluster = cluster
        self._me = me
        self._snapshot = snapshot
        self._instance = instance
        self._locate = locate
        self._is_here = is_here
        self._reached = reached
        self._measure = measure
        self._seen = ""
        """Another underlay address than the published one, at the last beat: it counts from the second look on."""
        self._moved = moved
        self._grace = grace
        self._unfinished = Unfinished()
        self._silent_since: dict[str, float] = {}
        self._up: Mapping[str, str] = {}
        """By id of a silent host, why it is taken to be up all the same."""
        self._up_at: dict[str, float] = {}
        """When it was last so."""
        self._next_asking = 0.0
        self._saved = 0
        self._next_save = 0.0
        self._began = monotonic()
        self._beating = threading.Lock()
        self._asking = threading.Thread()
        self._registered = threading.Event()
        self._waiters = threading.Semaphore(_WAITERS)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="presence", daemon=True)

    def start(self, *, restored: bool) -> None:
        """Register, and go on to give signs of life.

        :param restored: the last state known was found on disk: then a store that is away is no reason not to start.
        """
        while not self._registered.is_set():
            try:
                self._register()
            except TunnelInUse as error:
                log.warning("%s; this host takes another", error)
            except (IdInUse, Unlike):
                # A sign of life of ourselves before a reboot, at another address, goes by itself; so does that of a
                # host that was stopped to change the whole cluster over.
                if self._stopping.wait(_RETRY_SECONDS) or monotonic() - self._began > LEASE_SECONDS + 2:
                    raise
            except StoreError as error:
                if not restored:
                    raise
                self._note(error)
                break
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def admit(self) -> None:
        """Before a call that adds something: be registered, and have nothing left to undo. Else `StoreError`."""
        if not self._registered.is_set() and not self._wait():
            self.refused.set()
            raise StoreError(f"{NOT_REGISTERED}: {self.problem}")
        self._unfinished.settle()

    def _wait(self) -> bool:
        """Whether this host gets registered in time; False at once if too many wait already."""
        if not self._waiters.acquire(blocking=False):
            return False
        try:
            return self._registered.wait(max(0.0, self._began + _START_SECONDS - monotonic()))
        finally:
            self._waiters.release()

    def finish(self, what: str, work: Callable[[], object]) -> None:
        """Do what takes something away now, or as soon as the store is back."""
        self._unfinished.do(what, work)

    def due(self) -> list[Due]:
        """The silent hosts, of which all would be collected."""
        return [self._due(host) for host in list(self._cluster.hosts.values()) if self._is_silent(host.id)]

    def _due(self, host: Host) -> Due:
        why = "it gives no sign of life"
        if up := self._up.get(host.id):
            return Due(host.title, f"{why}; kept: {up}; if it is gone for good: weft host forget {host.name}", None)
        return Due(host.title, why, self._left(host.id, monotonic()))

    def _left(self, host: str, now: float) -> float:
        """Seconds until the grace of a silent host is over, if nothing changes."""
        since = max(self._silent_since.get(host, now), self._up_at.get(host, 0.0))
        return max(0.0, since + self._grace - now)

    def _loop(self) -> None:
        pause = _BEAT_SECONDS
        while not self._stopping.wait(pause * random.uniform(0.9, 1.0)):
            self.turned = monotonic()
            try:
                self.beat()
                pause = _RETRY_SECONDS if self._seen else _BEAT_SECONDS
            except WeftError as error:
                self._note(error)
                self._silent_since.clear()
                pause = _RETRY_SECONDS
            except Exception:
                log.exception("a beat met a bug; trying again")

    def publish(self) -> None:
        """Let the others know what this host's record is now."""
        with self._beating:
            self._register()

    def beat(self) -> None:
        """All that is due now."""
        with self._beating:
            self._follow_underlay()
            self._follow_mtu()
            self._register()
            self._unfinished.settle()
            self._collect_silent()
            self._save()

    def _note(self, error: WeftError) -> None:
        if not self.problem:
            log.error("%s; the data plane stays as it is, trying again", error)
        self.problem = str(error)

    def _register(self) -> None:
        began = monotonic()
        try:
            self._hosts.register(self._me.host, self._instance)
        except TunnelInUse:
            self._me.encrypt("", "", 0)  # the store was lost, or the machine was copied: take another
            self._moved()
            raise
        except Conflict as error:
            self._registered.clear()  # what is added now would be in somebody else's name
            if isinstance(error, AddressInUse):
                self._hosts.withdraw(self._me.host, self._is_here)
            raise
        if self.problem:
            log.info("this host is registered again")
        self.problem, self.seconds = "", monotonic() - began
        self._registered.set()

    def _follow_underlay(self) -> None:
        """An address that is missing for a moment is no change yet."""
        present = self._me.host.underlay
        try:
            found = self._locate(present)
        except (ConfigError, KernelError) as error:
            log.warning("the underlay address %s stays: %s", present, error)
            return
        certain, self._seen = found == self._seen, found if found != present else ""
        if found != present and certain:
            log.warning("the underlay address changed from %s to %s", present, found)
            self._seen = ""
            self._me.move(found)
            self._moved()

    def _follow_mtu(self) -> None:
        try:
            if self._measure():
                self._moved()
        except KernelError as error:
            log.warning("the underlay's MTU is taken to be %d still: %s", self._me.host.mtu, error)

    def _collect_silent(self) -> None:
        """Of all hosts that are alive, the one with the lowest id does it, so that not everybody tries."""
        silent = [host for host in list(self._cluster.hosts.values()) if self._is_silent(host.id)]
        now = monotonic()
        fresh = [host for host in silent if host.id not in self._silent_since]
        for host in fresh[:_NAMED]:
            log.warning("%s is silent: its entries stay for %.0f s, unless it returns", host.title, self._grace)
        if (more := len(fresh) - _NAMED) > 0:
            log.warning("hosts that fell silent as well: %d more (weft host ls)", more)
        self._silent_since = {host.id: self._silent_since.get(host.id, now) for host in silent}
        self._up = {host.id: self._up[host.id] for host in silent if host.id in self._up}
        mine = min(self._cluster.alive, default="") == self._me.id
        due = [host for host in silent if mine and not self._left(host.id, now)]
        asks = fresh or due or (silent and now >= self._next_asking)
        if asks and not self._asking.is_alive():
            self._next_asking = now + self._grace / _ASKED
            # It may take longer than the lease, and must not keep this host from beating.
            self._asking = threading.Thread(target=self._ask, args=(silent, due), name="asking", daemon=True)
            self._asking.start()

    def _ask(self, silent: Sequence[Host], due: Sequence[Host]) -> None:
        """Which of the silent hosts are up, and forget those that are due and are not."""
        try:
            up = self._find_up(silent)
            self._up_at |= dict.fromkeys(up, monotonic())
            self._note_up(silent, up)
            for host in due:
                if host.id not in up:
                    self._forget(host)
        except WeftError as error:
            log.warning("whether silent hosts are up is not known now: %s", error)
        except Exception:
            log.exception("asking silent hosts met a bug; trying again")

    def _find_up(self, silent: Sequence[Host]) -> dict[str, str]:
        """Why, by id. What answers at an address that is ours by now, or a living host's, is not who had it."""
        living = {host.underlay for host in list(self._cluster.hosts.values()) if not self._is_silent(host.id)}
        family = self._me.host.family  # there is no way to a host of the other one
        asked = [host for host in silent if host.family == family and host.underlay not in living]
        asked = [host for host in asked if not self._is_here(host.underlay)]
        answers = self._reached([host.underlay for host in asked]) if asked else {}
        whys = {True: "it answers pings", None: "it cannot be pinged from here"}
        return {host.id: whys[answer] for host in asked if (answer := answers.get(host.underlay)) is not False}

    def _note_up(self, silent: Sequence[Host], up: Mapping[str, str]) -> None:
        before, self._up = self._up, up
        for host in silent:
            if host.id in up and host.id not in before:
                log.warning(
                    "%s gives no sign of life, but %s: all that it has stays. Start weft there; or, if it is gone for "
                    "good, type weft host forget %s",
                    *(host.title, up[host.id], host.name),
                )
            elif host.id in before and host.id not in up:
                text = "%s answers no ping any more: its entries stay for %.0f s, unless it returns"
                log.warning(text, host.title, self._grace)

    def _forget(self, host: Host) -> None:
        try:
            self._hosts.forget(host)
        except WeftError as error:
            log.warning("%s is not forgotten now: %s", host.title, error)
        except Exception:
            log.exception("forgetting %s met a bug", host.title)

    def _is_silent(self, host: str) -> bool:
        return host not in self._cluster.alive and host != self._me.id

    def _save(self) -> None:
        version, now = self._cluster.version, monotonic()
        if version != self._saved and now >= self._next_save:
            self._snapshot.save(self._cluster.entries_of(self._me.id))
            self._saved = version
            self._next_save = now + _DUTY * (monotonic() - now)
