"""Tells the other hosts what the containers of this one are called.

A record of names beside each endpoint, written from what the Docker API says, by the one host that runs the container
and never in a handler. It goes with its endpoint, in the same transaction; a record that came too late for that is
found by the comparison and deleted. Nobody answers from it meanwhile: names count only beside their endpoint.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from time import monotonic

from weft.cluster import Cluster
from weft.engine.containers import Attachment, Container
from weft.errors import StoreError
from weft.model import Binding, EndpointNames, Host, binding_key
from weft.store import Delete, Put, Store, Write

log = logging.getLogger(__name__)

_BATCH = 64
"""Writes to a transaction: etcd takes 128 at most unless it is told otherwise."""
_COMPARE_SECONDS = 60.0
_RETRY_SECONDS = 1.0


class Publisher:
    """One per host. `follow` is a listener of `containers.Containers`, and `running` its table."""

    def __init__(self, store: Store, host: Host, cluster: Cluster) -> None:
        self.running: Mapping[str, Container] = {}
        self._store = store
        self._me = host
        self._cluster = cluster
        self._changed: queue.SimpleQueue[Container | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="publisher", daemon=True)
        self._foreign: set[str] = set()
        """NetworkIDs of this engine that are not weft's."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._changed.put(None)
        self._thread.join(timeout=5)

    def follow(self, before: Container | None, now: Container | None) -> None:
        if now is not None:
            self._changed.put(now)

    def _loop(self) -> None:
        compare_at = monotonic() + _RETRY_SECONDS
        while not self._stopping.is_set():
            changed = self._next(max(0.0, compare_at - monotonic()))
            try:
                self._write(chain.from_iterable(map(self._puts, changed)))
                if monotonic() >= compare_at:
                    self.compare()
                    compare_at = monotonic() + _COMPARE_SECONDS
            except StoreError as error:
                log.debug("names wait for the store: %s", error)
                compare_at = monotonic() + _RETRY_SECONDS
            except Exception:
                log.exception("publishing names met a bug")
                compare_at = monotonic() + _COMPARE_SECONDS

    def _next(self, patience: float) -> list[Container]:
        """All that changed; waits for the first. The last word on each container counts."""
        changed: dict[str, Container] = {}
        try:
            one = self._changed.get(timeout=patience)
            while True:
                if one is not None:
                    changed[one.id] = one
                one = self._changed.get_nowait()
        except queue.Empty:
            return list(changed.values())

    def compare(self) -> None:
        """Write what is missing in the mirror, and delete what there is no endpoint for."""
        self._foreign.clear()
        self._write(chain(chain.from_iterable(map(self._puts, list(self.running.values()))), self._leftovers()))

    def _write(self, writes: Iterable[Write]) -> None:
        writes = iter(writes)
        while batch := list(islice(writes, _BATCH)):
            self._store.transact([], batch)

    def _puts(self, container: Container) -> Iterator[Write]:
        for attachment in container.attachments:
            vni = self._vni(attachment)
            if vni is None:
                continue
            names = EndpointNames(
                vni=vni,
                endpoint=attachment.endpoint,
                host=self._me.id,
                container=container.name,
                aliases=attachment.aliases,
                hostname=container.hostname,
                short_id=container.id[:12],
            )
            if self._cluster.names.get(vni, {}).get(attachment.endpoint) != names:
                yield Put(names.key, names.encode())

    def _vni(self, attachment: Attachment) -> int | None:
        network_id = attachment.network_id
        vni = self._cluster.bindings.get((self._me.id, network_id))
        if vni is None and network_id not in self._foreign:
            # A network may be younger than the mirror.
            entry = self._store.get(binding_key(self._me.id, network_id))
            if entry is not None:
                return Binding.read(entry).vni
            self._foreign.add(network_id)
        return vni

    def _leftovers(self) -> Iterator[Write]:
        for vni, names in list(self._cluster.names.items()):
            endpoints = self._cluster.endpoints.get(vni, {})
            for one in list(names.values()):
                if one.endpoint not in endpoints and (one.host == self._me.id or one.host not in self._cluster.hosts):
                    yield Delete(one.key)
