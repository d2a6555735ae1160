"""The page: hosts, networks, faults and events as a live picture, for a browser.

    GET /          the page; its style, scripts and icon are files beside it (`static/`)
    GET /state     all that it shows, as one JSON object of the parts below
    GET /stream    the same as server-sent events, for as long as somebody watches

`/stream` begins with all parts. Then each event `state` brings, whole, only the parts that have changed since; `beat`
says that nothing has. So a browser holds the state, and whoever lost a connection begins anew. Nothing is computed
while nobody watches, and once for all who do.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic, thread_time
from typing import Any

from flask import Blueprint, Response

from weft.doctor.verdict import Examination
from weft.journal import Journal
from weft.probes.links import ProbeLink
from weft.status import Status, endpoint_views, host_view, network_view

BEAT_SECONDS = 2.0
"""The most between two events of a stream; what nobody announces is looked for as often."""
_SETTLE_SECONDS = 0.2
"""Several changes at once are one event."""
_REST = 9
"""After a part was made, so many times as long as that took: no part takes more than a tenth of a processor."""
_EVENTS = 50
_LINKS = 500

Parts = Mapping[str, Callable[[], Any]]
"""What makes each part of the state, for JSON; from memory, since viewers wait for it."""

_STATIC = Path(__file__).with_name("static")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def parts_of(
    status: Status,
    journal: Journal,
    links: Callable[[], Sequence[ProbeLink]],
    examination: Callable[[], Examination | None],
) -> Parts:
    """:param examination: the doctor's last one, at once; the part `findings` is None before the first."""
    cluster = status.cluster

    def hosts() -> list[dict[str, Any]]:
        return [host_view(host, cluster) for host in sorted(cluster.hosts.values(), key=lambda host: host.name)]

    def networks() -> list[dict[str, Any]]:
        endpoints = defaultdict(list)
        for endpoint in endpoint_views(cluster):
            endpoints[endpoint["vni"]].append(endpoint)
        found = sorted(cluster.networks.values(), key=lambda network: (network.name, network.vni))
        encryption = status.encryption.describe()
        views = (network_view(network, cluster, status.me, encryption) for network in found)
        return [{**view, "endpoints": endpoints[view["vni"]]} for view in views]

    def findings() -> list[dict[str, Any]] | None:
        found = examination()
        return None if found is None else [asdict(finding) for finding in found.findings]

    return {
        "status": status.view,
        "hosts": hosts,
        "networks": networks,
        "links": lambda: [link.to_json() for link in _telling(links(), status.me.id)],
        "findings": findings,
        "events": lambda: [asdict(event) for event in journal.after()[-_EVENTS:]],
    }


def _telling(links: Sequence[ProbeLink], me: str) -> Sequence[ProbeLink]:
    """Of too many those that are faulty, then this host's own: a thousand hosts have a million, and none draws them."""
    if len(links) <= _LINKS:
        return links
    return sorted(links, key=lambda link: (not link.faulty, me not in (link.sender, link.receiver)))[:_LINKS]


class Feed:
    """The state in parts, each as JSON.

    :param watched: called again and again while somebody watches. Whoever just asks for the state gets what is known:
        it must not make other hosts work.
    """

    def __init__(self, parts: Parts, watched: Callable[[], None] = lambda: None) -> None:
        self._parts = parts
        self._watched = watched
        self._changed = threading.Condition()
        self._changes = 0
        self._making = threading.Lock()
        self._made: dict[str, str] = {}
        self._made_at = float("-inf")
        self._due: dict[str, float] = {}

    def wake(self) -> None:
        """Something has changed: viewers shall see it now and not at the next beat."""
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def state(self) -> dict[str, str]:
        """All parts as they are now, or were a moment ago; one that takes long to make may be older."""
        with self._making:
            if monotonic() - self._made_at > _SETTLE_SECONDS:
                due = [name for name in self._parts if monotonic() >= self._due.get(name, 0.0)]
                self._made = {**self._made, **{name: self._make(name) for name in due}}
                self._made_at = monotonic()
            return self._made

    def _make(self, name: str) -> str:
        began = thread_time()
        text = json.dumps(self._parts[name](), separators=(",", ":"))
        self._due[name] = monotonic() + _REST * (thread_time() - began)
        return text

    def events(self) -> Iterator[str]:
        """Server-sent events without an end."""
        sent: dict[str, str] = {}
        while True:
            self._watched()
            seen = self._changes
            now = self.state()
            changed = {name: text for name, text in now.items() if sent.get(name) != text}
            yield f"event: state\ndata: {_joined(changed)}\n\n" if changed else "event: beat\ndata:\n\n"
            sent = now
            self._rest(seen)

    def _rest(self, seen: int) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._changes != seen, BEAT_SECONDS):
                self._changed.wait_for(lambda: False, 1.5 * _SETTLE_SECONDS)


def create_page(feed: Feed, respond: Callable[[Iterable[str]], Response]) -> Blueprint:
    """:param respond: makes an answer that goes on as the events do, within the listener's limits."""
    page = Blueprint("page", __name__)
    for file in sorted(_STATIC.iterdir()):
        if file.suffix in _TYPES:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            page.add_url_rule(path, file.name.replace(".", "_"), _file(file), provide_automatic_options=False)

    @page.get("/state", provide_automatic_options=False)
    def state() -> Response:
        return Response(_joined(feed.state()), mimetype="application/json")

    @page.get("/stream", provide_automatic_options=False)
    def stream() -> Response:
        return respond(feed.events())

    return page


def _file(file: Path) -> Callable[[], Response]:
    content, kind = file.read_bytes(), _TYPES[file.suffix]
    return lambda: Response(content, content_type=kind)


def _joined(parts: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{text}" for name, text in parts.items()) + "}"
