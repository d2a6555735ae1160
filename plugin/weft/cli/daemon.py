"""`weft version`, `status`, `plan`, `events`, `gc`: this host's daemon and what it does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import urlencode

from rich.console import Console
from rich.markup import escape

from weft import __version__
from weft.cli.ask import NoDaemon, ask
from weft.cli.show import add, ago, pairs, progress, table
from weft.model import SCHEMA

_WAIT_SECONDS = 5
_RETRY_SECONDS = 1.0
_PAUSE_SECONDS = 0.2
_MOST = 200
"""Changes of a plan that a person is shown."""
_COLOURS = {"warning": "yellow", "error": "red"}


def add_commands(commands: Any) -> None:
    add(commands, "version", _version, _show_version, "show the versions of this command and of the running daemon")
    status = add(commands, "status", _status, _show_status, "how this host's weft is, and what does not work")
    status.set_defaults(without=lambda options: options.offline().status())
    plan = add(commands, "plan", _plan, _show_plan, "what would be changed in the kernel now")
    plan.set_defaults(without=lambda options: options.offline().plan())
    events = add(commands, "events", _events, _show_events, "what happened on this host and in the cluster lately")
    events.add_argument("--follow", action="store_true", help="go on with what happens from now on")
    events.add_argument("--tail", type=int, default=0, metavar="N", help="only the last N of what happened")
    gc = add(commands, "gc", _collect, _show_due, "collect now what Docker, or the cluster, does not have any more")
    what = gc.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only show what is to be collected, why and when")
    entry = "delete this entry of the store, one that weft doctor says is none of weft's"
    what.add_argument("--entry", default="", metavar="KEY", help=entry)


def _version(options: argparse.Namespace, socket_path: Path) -> Any:
    """`daemon` is None if none runs. `schema` is that of the store's records (`model.SCHEMA`)."""
    try:
        daemon = ask(socket_path, "GET", "/weft/version")
    except NoDaemon:
        daemon = None
    return {"version": __version__, "schema": SCHEMA, "daemon": daemon}


def _show_version(answer: Any, console: Console) -> None:
    console.print(f"weft {answer['version']} (store schema {answer['schema']})", highlight=False)
    daemon = answer["daemon"]
    runs = f"weft {daemon['version']} (store schema {daemon['schema']})" if daemon else "none runs on this host"
    console.print(f"daemon: {runs}", highlight=False)


def _status(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET", "/weft/status")


def _show_status(status: Any, console: Console) -> None:
    def known(value: object) -> object:
        return "?" if value is None else value

    host, store, agent, engine = status["host"], status["store"], status["agent"], status["engine"]
    names = status["names"]
    alive = "" if status["alive"] is None else f", {status['alive']} alive"
    state = "in sync" if agent["synced"] else "not in sync" if agent["synced"] is False else "not known"
    last = f", compared {ago(agent['resynced'])} in {agent['seconds'] * 1000:.0f} ms" if agent["resynced"] else ""
    latency = f", answers in {store['seconds'] * 1000:.1f} ms" if store["seconds"] is not None else ""
    started = f", started {ago(host['started'])}" if host["started"] else ""
    answered = "answered" if names["answers"] else "not answered"
    values = (
        ("host", f"{host['name']} ({host['id'][:12]}), VTEP {host['underlay'] or 'not known'}"),
        ("weft", f"{host['version']}, driver {host['driver']}{started}"),
        ("store", f"{store['origin']}{latency}"),
        ("docker", engine["version"] or "not known"),
        ("data plane", f"{state}: {known(agent['links'])} links, {known(agent['rows'])} rows{last}"),
        ("repaired", f"{known(agent['repaired'])} links and rows that others had changed"),
        ("encryption", status["encryption"]),
        ("names", f"{answered} at {names['address']}" if names["address"] else "off"),
        ("cluster", f"{status['hosts']} hosts{alive}; {status['networks']} networks, {status['endpoints']} endpoints"),
    )
    pairs(console, values)
    for problem in status["problems"]:
        console.print(f"[red]problem:[/]     {escape(problem)}", highlight=False)
    if not status["problems"]:
        console.print("[green]no problem[/]", highlight=False)


def _plan(options: argparse.Namespace, socket_path: Path) -> Any:
    with progress("comparing the kernel with the store"):
        return ask(socket_path, "GET", "/weft/plan")


def _show_plan(plan: Any, console: Console) -> None:
    if not plan:
        console.print("nothing: the kernel is as it should be")
    for step in plan[:_MOST]:
        console.print(step["change"], markup=False, highlight=False)
    if len(plan) > _MOST:
        console.print(f"and {len(plan) - _MOST} changes more (all of them with --json)")


def _events(options: argparse.Namespace, socket_path: Path) -> Any:
    found = ask(socket_path, "GET", "/weft/events")[-options.tail :]
    if not options.follow:
        return found
    try:
        for event in _followed(found, socket_path):
            if options.json:
                print(json.dumps(event), flush=True)
            else:
                _show_events([event], Console(soft_wrap=True))
    except (KeyboardInterrupt, BrokenPipeError):
        sys.stdout = None  # Python would complain that it cannot flush a closed pipe
    return None


def _followed(found: list[Any], socket_path: Path) -> Iterator[Any]:
    """These events and all that follow, whatever becomes of the daemon."""
    last, away = 0, False
    while True:
        for event in found:
            last = event["id"]
            yield event
        try:
            found = ask(socket_path, "GET", f"/weft/events?{urlencode({'after': last, 'wait': _WAIT_SECONDS})}")
            away = False
            if not found:  # the daemon may be asked by many, and then it does not wait
                sleep(_PAUSE_SECONDS)
        except NoDaemon as error:
            if not away:
                print(f"weft events: {error}; waiting for it", file=sys.stderr)
            found, away = [], True
            sleep(_RETRY_SECONDS)


def _show_events(events: Any, console: Console) -> None:
    for event in events:
        when = datetime.fromtimestamp(event["when"]).strftime("%Y-%m-%d %H:%M:%S")
        console.print(
            f"{when} {event['severity']:7} {event['source']}: {event['text']}",
            style=_COLOURS.get(event["severity"]),
            markup=False,
            highlight=False,
        )


def _collect(options: argparse.Namespace, socket_path: Path) -> Any:
    if options.entry:
        return ask(socket_path, "POST", "/weft/gc", {"entry": options.entry})
    with progress("looking for what Docker, or the cluster, does not have any more"):
        return ask(socket_path, "GET" if options.dry_run else "POST", "/weft/gc")


def _show_due(due: Any, console: Console) -> None:
    if not due:
        console.print("nothing to collect")
        return
    table(console, ("OBJECT", "WHY", "COLLECTED"), ((one["what"], one["why"], _when(one["seconds"])) for one in due))


def _when(seconds: float | None) -> str:
    if seconds is None:
        return "not by itself"
    return f"in {seconds:.0f} s" if seconds else "now"
