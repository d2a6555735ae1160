"""The page's server side: its files, and the state in parts. What a browser makes of it: tests/engine/test_page.py."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient

import weft
from lab import sample
from weft.journal import Journal
from weft.probes.links import ProbeLink
from weft.web import page
from weft.web.page import Feed, create_page, parts_of

STATIC = Path(weft.__file__).parent / "web" / "static"
FILES = sorted(file.name for file in STATIC.iterdir())


class World:
    """Parts that a test changes, and how often they were made."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = sample.healthy()
        self.made = 0
        self.watched = 0
        self.feed = Feed({name: self._maker(name) for name in self.parts}, self._watch)

    def _watch(self) -> None:
        self.watched += 1

    def _maker(self, name: str) -> Any:
        def make() -> Any:
            self.made += 1
            return self.parts[name]

        return make


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(page, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(page, "BEAT_SECONDS", 0.01)
    return World()


@pytest.fixture
def client(world: World) -> FlaskClient:
    def respond(events: Iterable[str]) -> Response:
        return Response(next(iter(events)), mimetype="text/event-stream")

    app = Flask(__name__, static_folder=None)
    app.register_blueprint(create_page(world.feed, respond))
    return app.test_client()


def read(event: str) -> tuple[str, Any]:
    name, data = re.fullmatch(r"event: (\w+)\ndata: ?(.*)\n\n", event).groups()  # type: ignore[union-attr]
    return name, json.loads(data) if data else None


def test_a_stream_begins_with_everything_and_goes_on_with_what_has_changed(world: World) -> None:
    events = world.feed.events()
    assert read(next(events)) == ("state", world.parts)
    assert read(next(events)) == ("beat", None)
    world.parts["hosts"][0]["alive"] = False
    assert read(next(events)) == ("state", {"hosts": world.parts["hosts"]})
    assert read(next(events)) == ("beat", None)
    assert read(next(world.feed.events())) == ("state", world.parts)


def test_a_change_that_is_announced_is_sent_before_the_next_beat(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "BEAT_SECONDS", 3600)
    events, found = world.feed.events(), []
    next(events)
    world.parts["findings"] = ["a fault"]
    world.feed.wake()
    reader = threading.Thread(target=lambda: found.append(next(events)), daemon=True)
    reader.start()
    reader.join(10)
    assert read(found[0]) == ("state", {"findings": ["a fault"]})


def test_all_viewers_share_what_is_made_once_and_nothing_is_made_for_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_SETTLE_SECONDS", 3600)
    assert world.made == 0
    for _ in range(10):
        next(world.feed.events())
    assert world.made == len(world.parts)


def test_a_part_that_takes_long_is_made_rarely_and_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_SETTLE_SECONDS", -1.0)
    busy = 0.0
    made = {"links": 0, "hosts": 0}

    def links() -> list[str]:
        nonlocal busy
        busy += 3600.0
        made["links"] += 1
        return []

    def hosts() -> list[str]:
        made["hosts"] += 1
        return []

    monkeypatch.setattr(page, "thread_time", lambda: busy)
    feed = Feed({"links": links, "hosts": hosts})
    for _ in range(5):
        assert feed.state() == {"links": "[]", "hosts": "[]"}
    assert made == {"links": 1, "hosts": 5}


def test_of_too_many_links_those_in_trouble_are_told_and_this_hosts_own() -> None:
    ids = [f"host-{n}" for n in range(40)]
    ways = [ProbeLink(a, b, "plain", 1450, 0.0, small=0.0) for a in ids for b in ids if a != b]
    faulty = [replace(one, small=1.0) for one in ways[-3:]]
    status: Any = SimpleNamespace(cluster=None, view=None, me=SimpleNamespace(id="host-7"))
    told = parts_of(status, Journal(), lambda: [*ways[:-3], *faulty], lambda: None)["links"]()
    assert len(told) == page._LINKS
    keys = {(one["from"], one["to"]) for one in told}
    assert keys >= {(one.sender, one.receiver) for one in ways if "host-7" in (one.sender, one.receiver)}
    assert sum(one["small"] for one in told) == 3


def test_the_state_is_what_the_stream_tells(world: World, client: FlaskClient) -> None:
    assert client.get("/state").json == world.parts
    assert read(client.get("/stream").text) == ("state", world.parts)


def test_only_who_watches_makes_others_work(world: World, client: FlaskClient) -> None:
    client.get("/state")
    assert world.watched == 0
    client.get("/stream")
    assert world.watched == 1


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_served_as_what_it_is(client: FlaskClient, name: str) -> None:
    answer = client.get("/" if name == "index.html" else f"/{name}")
    assert answer.data == (STATIC / name).read_bytes()
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert answer.mimetype == types[Path(name).suffix]


def test_the_page_asks_for_its_own_files_only_and_has_nothing_inline() -> None:
    html = (STATIC / "index.html").read_text()
    assert set(re.findall(r'(?:href|src)="([^#"][^"]*)"', html)) == {"icon.svg", "page.css", "page.js"}
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", html)
    assert not re.search(r"url\(|@import", (STATIC / "page.css").read_text())


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_scripts_import_their_neighbours_and_never_parse_html(name: str) -> None:
    script = (STATIC / name).read_text()
    assert set(re.findall(r'from "(.*?)"', script)) <= {f"./{file}" for file in FILES}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|DOMParser|srcdoc", script)
