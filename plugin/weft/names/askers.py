"""Which container a question comes from, by its source address.

- On an internal network it comes over the overlay, from the endpoint's own address.
- Otherwise it takes the container's default route: through docker_gwbridge, from an address that only Docker's
  description of that network ties to the container's sandbox, or through a bridge network that it is on as well.

A container may ask before its events have been followed. Then the questioner waits a moment, and only that one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from math import inf
from time import monotonic

from weft.cluster import Cluster
from weft.engine.containers import Container, Engine
from weft.errors import EngineError
from weft.names.lookup import Asker

log = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds until an unknown source counts as none of ours; the engine waits four before it asks the next server."""
_STRANGER_SECONDS = 10.0
_MOST_STRANGERS = 1000
_MOST_WAITING = 4
"""Sources of which not even docker_gwbridge knows that may wait at once: forged ones would keep others from it."""
_READINGS = 5
"""Times that docker_gwbridge is read again, if a container left its address there meanwhile."""


class Askers:
    """See `resolver.Directory`. `follow` is a listener of `containers.Containers`.

    `heard` is the monotonic time of the last question that came through docker_gwbridge.

    :param me: id of this host.
    """

    def __init__(self, cluster: Cluster, me: str, engine: Engine) -> None:
        self.heard = 0.0
        self._cluster = cluster
        self._me = me
        self._engine = engine
        self._by_endpoint: dict[str, Container] = {}
        self._by_sandbox: dict[str, Container] = {}
        self._by_address: dict[str, Container] = {}
        self._gateways: Mapping[str, str] = {}
        """Digits of a sandbox's id by its address on docker_gwbridge."""
        self._read = -inf
        """When that was read."""
        self._departures = 0
        self._waiting = threading.Semaphore(_MOST_WAITING)
        self._changed = threading.Condition()
        self._refreshing = threading.Lock()
        self._strangers: dict[str, float] = {}

    def follow(self, before: Container | None, now: Container | None) -> None:
        with self._changed:
            if before:
                for table, key in _keys(self, before):
                    if table.get(key) == before:
                        del table[key]
                self._depart(before)
            if now:
                for table, key in _keys(self, now):
                    table[key] = now
            self._changed.notify_all()

    def known(self, source: str) -> Asker | None:
        container = self._container(source)
        if container is not None:
            return self._asker(container)
        endpoint = self._cluster.holders.get(source)
        return Asker.on({endpoint.vni: ""}) if endpoint and endpoint.host == self._me else None

    def _depart(self, container: Container) -> None:
        """With another network than before, it may have no address on docker_gwbridge any more, or another's."""
        self._departures += 1
        sandbox = _sandbox(container)
        self._gateways = {address: one for address, one in self._gateways.items() if one != sandbox}

    def find(self, source: str) -> Asker | None:
        now = monotonic()
        if now - self._strangers.get(source, -_STRANGER_SECONDS) < _STRANGER_SECONDS:
            return None
        self._refresh(source)
        if source in self._gateways:
            return self._await(source)
        if not self._waiting.acquire(blocking=False):
            return self.known(source)
        try:
            return self._await(source)
        finally:
            self._waiting.release()

    def _await(self, source: str) -> Asker | None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.known(source), timeout=_PATIENCE):
                if len(self._strangers) >= _MOST_STRANGERS:
                    self._strangers.clear()
                self._strangers[source] = monotonic()
        return self.known(source)

    def _container(self, source: str) -> Container | None:
        if (endpoint := self._cluster.holders.get(source)) and (found := self._by_endpoint.get(endpoint.id)):
            return found
        if (sandbox := self._gateways.get(source)) and (found := self._by_sandbox.get(sandbox)):
            self.heard = monotonic()
            return found
        return self._by_address.get(source)

    def _asker(self, container: Container) -> Asker:
        vnis = {self._cluster.bindings.get((self._me, a.network_id)): a.network for a in container.attachments}
        return Asker.on({vni: name for vni, name in vnis.items() if vni is not None})

    def _refresh(self, source: str) -> None:
        """Read docker_gwbridge again, once for all who wait for that."""
        asked = monotonic()
        with self._refreshing:
            if self._read >= asked or self.known(source):
                return
            try:
                for _ in range(_READINGS):
                    departures, began = self._departures, monotonic()
                    gateways = self._engine.gateways()
                    with self._changed:
                        if self._departures == departures:
                            self._gateways, self._read = gateways, began
                            return
            except EngineError as error:
                log.debug("who asks from %s is not known: %s", source, error)


def _sandbox(container: Container) -> str:
    return container.sandbox.rpartition("/")[2]


def _keys(tables: Askers, container: Container) -> list[tuple[dict[str, Container], str]]:
    """Where a container is entered."""
    sandbox = _sandbox(container)
    keys = [(tables._by_sandbox, sandbox)] if sandbox else []
    for attachment in container.attachments:
        keys.append((tables._by_endpoint, attachment.endpoint))
        keys += [(tables._by_address, address) for address in attachment.addresses]
    return keys
