"""This host as the others see it: registered and alive; and what goes with that, at every beat.

At each beat the underlay address is looked up again, what the store could not take is made up for, hosts that were
silent for the whole grace are collected, and the last state known is kept on disk. The grace is counted by this host's
own monotonic clock, and only while the store answers: no clock of another host, and no outage, shortens it.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
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
_DUTY = 50
"""Writing the snapshot may take one fiftieth of the time."""


class Presence:
    """
    :param instance: tells this run of the machine from others (`identity.instance`).
    :param locate: the underlay address now, given the present one; may raise `ConfigError` or `KernelError`.
    :param is_here: whether this host has an address.
    :param measure: looks at the underlay's MTU again, and says whether it has changed; may raise `KernelError`.
    :param moved: called when the underlay's address or MTU has changed.
    :param grace: seconds that a host must be silent before what it has is collected.
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
        self._measure = measure
        self._seen = ""
        """Another underlay address than the published one, at the last beat: it counts from the second look on."""
        self._moved = moved
        self._grace = grace
        self._unfinished = Unfinished()
        self._silent_since: dict[str, float] = {}
        self._saved = 0
        self._next_save = 0.0
        self._began = monotonic()
        self._beating = threading.Lock()
        self._forgetting = threading.Thread()
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
        now = monotonic()
        return [
            Due(
                host.title,
                "it gives no sign of life",
                max(0.0, self._silent_since.get(host.id, now) + self._grace - now),
            )
            for host in list(self._cluster.hosts.values())
            if self._is_silent(host.id)
        ]

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
        for host in silent:
            if host.id not in self._silent_since:
                log.warning("%s is silent: its entries stay for %.0f s, unless it returns", host.title, self._grace)
        self._silent_since = {host.id: self._silent_since.get(host.id, now) for host in silent}
        due = [host for host in silent if now - self._silent_since[host.id] >= self._grace]
        mine = min(self._cluster.alive, default="") == self._me.id
        if due and mine and not self._forgetting.is_alive():
            # It may take longer than the lease, and must not keep this host from beating.
            self._forgetting = threading.Thread(target=self._forget, args=(due,), name="forgetting", daemon=True)
            self._forgetting.start()

    def _forget(self, hosts: list[Host]) -> None:
        for host in hosts:
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
