"""What happened on this host lately: every decision that weft logged, and what changed in the cluster.

The journal is a logging handler. It keeps what is of level INFO or higher, whatever the log itself shows, so that a
person who looks afterwards finds it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import time

from weft.cluster import Cluster, Touched
from weft.model import Endpoint
from weft.redact import redact

KEPT = 1000
_SEVERITIES = {logging.WARNING: "warning", logging.ERROR: "error", logging.CRITICAL: "error"}
_MANY = 5
"""Endpoints that change at once on one network; more are only counted."""


@dataclass(frozen=True, slots=True)
class Event:
    """
    :param id: grows from event to event, over restarts as well.
    :param when: Unix time.
    :param severity: `info`, `warning` or `error`.
    :param source: who said it: a module of weft, or `cluster`.
    """

    id: int
    when: float
    severity: str
    source: str
    text: str


class Journal(logging.Handler):
    """The last events, in memory. Any thread may call."""

    def __init__(self, clock: Callable[[], float] = time) -> None:
        super().__init__(logging.INFO)
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._last = int(clock() * 1000)
        self._changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.exc_info and record.exc_info[1]:
                text += f" ({type(record.exc_info[1]).__name__}: {record.exc_info[1]})"
        except Exception:
            self.handleError(record)
            return
        self.add(_SEVERITIES.get(record.levelno, "info"), record.name.removeprefix("weft."), redact(text))

    def add(self, severity: str, source: str, text: str) -> None:
        with self._changed:
            self._last += 1
            self._events.append(Event(self._last, self._clock(), severity, source, text))
            self._changed.notify_all()

    def after(self, event: int = 0, *, wait: float = 0.0) -> list[Event]:
        """The events after the one of this id, oldest first.

        :param wait: seconds to wait for one if there is none.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._last > event, wait)
            return [one for one in self._events if one.id > event]

    def follow(self, cluster: Cluster) -> Callable[[Touched | None], None]:
        """A listener of the agent that notes what changed in the cluster."""

        def note(touched: Touched | None) -> None:
            for text in changes(cluster, touched):
                self.add("info", "cluster", text)

        return note


def changes(cluster: Cluster, touched: Touched | None) -> Iterator[str]:
    """What a batch of changes means, in words; after a snapshot (None), what there is now."""
    if touched is None:
        hosts, networks = len(cluster.hosts), len(cluster.networks)
        endpoints = sum(map(len, cluster.endpoints.values()))
        yield f"read from the store: {hosts} hosts, {networks} networks, {endpoints} endpoints"
        return
    yield from (_host(cluster, host, host in touched.hosts) for host in sorted(touched.hosts | touched.alive))
    yield from (_network(cluster, vni) for vni in sorted(touched.networks))
    for vni, before in sorted(touched.endpoints.items()):
        yield from _endpoints(cluster, vni, before)


def _host(cluster: Cluster, host_id: str, moved: bool) -> str:
    host = cluster.hosts.get(host_id)
    if host is None:
        return f"host {host_id[:12]} is gone"
    reached = f" and is reached at {host.underlay}" if moved else ""
    return f"host {host.name} is {'alive' if host_id in cluster.alive else 'silent'}{reached}"


def _network(cluster: Cluster, vni: int) -> str:
    network = cluster.networks.get(vni)
    if network is None:
        return f"network VNI {vni} is gone"
    names = (cluster.hosts.get(host) for host in cluster.members.get(vni, ()))
    hosts = ", ".join(sorted(host.name for host in names if host)) or "no host"
    return f"{network.title}{' is removed, but still' if network.retired else ' is'} on {hosts}"


def _endpoints(cluster: Cluster, vni: int, before: dict[str, Endpoint | None]) -> Iterator[str]:
    """What came, moved or went on one network."""
    network, now = cluster.networks.get(vni), cluster.endpoints.get(vni, {})
    title = network.title if network else f"network VNI {vni}"
    changed = [(old, now.get(one)) for one, old in sorted(before.items()) if old != now.get(one)]
    if len(changed) > _MANY:
        yield f"{title}: {len(changed)} endpoints changed, {len(now)} there are"
        return
    for old, new in changed:
        if here := new or old:
            host = cluster.hosts.get(here.host)
            where = f"on {host.name if host else here.host[:12]}"
            addresses = ", ".join(here.addresses) or here.mac
            yield f"{title}: endpoint {addresses} {where} {'is there' if new else 'is gone'}"
