"""The running containers of this host: what they are called and on which networks, as their engine has them.

The engine's events name containers that may have changed, and each of those is inspected. An inspect waits while the
engine holds the container, which it does for as long as one of our own handlers works for it; so each has a thread to
wait in, and none holds up the others. Events get lost, so all is compared with the engine's list at start, when the
events come back, and on a timer; that is one call and no inspect if nothing has changed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from weft.errors import EngineError

log = logging.getLogger(__name__)

_THREADS = 16
_COMPARE_SECONDS = 60.0
_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container's place on a network of any driver. `network` is what this engine calls it."""

    network_id: str
    network: str
    endpoint: str
    aliases: tuple[str, ...]
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Container:
    """:param sandbox: path of its network namespace; "" if it uses another's or the host's."""

    id: str
    name: str
    hostname: str
    sandbox: str
    attachments: tuple[Attachment, ...]

    @property
    def outline(self) -> Outline:
        return Outline(self.name, frozenset(a.endpoint for a in self.attachments))


@dataclass(frozen=True, slots=True)
class Outline:
    """As much of a container as the engine's list tells: if that is the same, so is the rest."""

    name: str
    endpoints: frozenset[str]


class Engine(Protocol):
    """What is asked of the Docker Engine; see `engine.DockerEngine`. All may raise `EngineError`."""

    def outlines(self) -> Mapping[str, Outline]:
        """All running containers, by id."""
        ...

    def container(self, container_id: str) -> Container | None:
        """It as it is now; None if it is not running. Waits while the engine holds it."""
        ...

    def gateways(self) -> Mapping[str, str]:
        """The containers' addresses on docker_gwbridge, with the first digits of their sandboxes' ids."""
        ...

    def follow_containers(self, began: Callable[[], None], changed: Callable[[str], None]) -> None:
        """Call `began` once events come, then `changed` with the id of each container that may be another; ends only
        by an error."""
        ...


Listener = Callable[[Container | None, Container | None], None]
"""Told what a container was and what it is; calls come from several threads, but of one container in order."""


class Containers:
    """One per host. `running` has the containers by id, for reading."""

    def __init__(self, engine: Engine, listeners: Sequence[Listener]) -> None:
        self.running: dict[str, Container] = {}
        self._engine = engine
        self._listeners = listeners
        self._lock = threading.Lock()
        self._inspecting: dict[str, bool] = {}
        """Ids whose inspect is under way; True if it must be repeated."""
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(_THREADS, "inspect")

    def start(self) -> None:
        for name, work in (("container-events", self._follow), ("containers", self._loop)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _follow(self) -> None:
        while not self._stopping.is_set():
            try:
                self._engine.follow_containers(self._wake.set, self._inspect_soon)
            except EngineError as error:
                log.debug("no events of containers: %s", error)  # the collector says so
            except Exception:
                log.exception("following containers met a bug; trying again")
            self._stopping.wait(_RETRY_SECONDS)

    def _loop(self) -> None:
        pause = 0.0
        while not self._stopping.is_set():
            self._wake.wait(pause)
            self._wake.clear()
            try:
                self.compare()
                pause = _COMPARE_SECONDS
            except EngineError as error:
                log.debug("containers are not compared now: %s", error)
                pause = _RETRY_SECONDS
            except Exception:
                log.exception("comparing containers met a bug")
                pause = _COMPARE_SECONDS

    def compare(self) -> None:
        """Inspect what is not as the engine's list says; returns before that is done."""
        before = dict(self.running)
        present = self._engine.outlines()
        for one in before.keys() | present.keys():
            has = before.get(one)
            if (has and has.outline) != present.get(one):
                self._inspect_soon(one)

    def _inspect_soon(self, container_id: str) -> None:
        with self._lock:
            if self._stopping.is_set():
                return
            if container_id in self._inspecting:
                self._inspecting[container_id] = True
                return
            self._inspecting[container_id] = False
        self._pool.submit(self._inspect, container_id)

    def _inspect(self, container_id: str) -> None:
        failed = False
        while not self._stopping.is_set():
            try:
                self._replace(container_id, self._engine.container(container_id))
            except EngineError as error:
                log.debug("container %s is looked at later: %s", container_id[:12], error)
                failed = True
            except Exception:
                log.exception("looking at container %s met a bug", container_id[:12])
            with self._lock:
                if failed or not self._inspecting[container_id]:
                    del self._inspecting[container_id]
                    break
                self._inspecting[container_id] = False
        if failed:
            self._stopping.wait(_RETRY_SECONDS)
            self._wake.set()

    def _replace(self, container_id: str, now: Container | None) -> None:
        before = self.running.get(container_id)
        if before == now:
            return
        if now is not None:
            self.running[container_id] = now
        else:
            del self.running[container_id]
        for listener in self._listeners:
            listener(before, now)
