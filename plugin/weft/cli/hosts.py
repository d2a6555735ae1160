"""`weft host`, `weft peers`, `weft rotate-key`: the hosts of the cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from weft.cli.ask import ask
from weft.cli.show import add, ago, progress, table

_STATES = {True: "[green]alive[/]", False: "[red]silent[/]", None: "not known"}


def add_commands(commands: Any) -> None:
    host = commands.add_parser("host", help="the hosts of the cluster").add_subparsers(required=True, metavar="COMMAND")
    ls = add(host, "ls", _list_hosts, _show_hosts, "list the hosts")
    ls.set_defaults(without=lambda options: options.offline().hosts())
    forget = add(host, "forget", _forget, _show_forgotten, "collect what a host that is gone for good has")
    forget.add_argument("host", help="name, id or underlay address")
    forget.add_argument("--force", action="store_true", help="even if it was alive a moment ago")
    add(commands, "peers", _list_peers, _show_peers, "the other hosts, as WireGuard on this host sees them")
    add(commands, "rotate-key", _rotate_key, _show_key, "replace this host's WireGuard key; packets wait a moment")


def _list_hosts(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET", "/weft/hosts")


def _forget(options: argparse.Namespace, socket_path: Path) -> Any:
    with progress(f"collecting what host {options.host} has"):
        return ask(socket_path, "POST", "/weft/hosts/forget", {"host": options.host, "force": options.force})


def _list_peers(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET", "/weft/peers")


def _rotate_key(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "POST", "/weft/rotate-key")


def _show_hosts(hosts: Any, console: Console) -> None:
    rows = (
        (
            h["name"],
            h["underlay"],
            _STATES[h["alive"]],
            str(h["endpoints"]),
            h["version"],
            h["id"][:12],
        )
        for h in hosts
    )
    table(console, ("NAME", "UNDERLAY", "STATE", "ENDPOINTS", "WEFT", "ID"), rows)


def _show_forgotten(host: Any, console: Console) -> None:
    console.print(f"host {host['name']} ({host['underlay']}) is forgotten, with {host['endpoints']} endpoints")


def _show_peers(peers: Any, console: Console) -> None:
    rows = (
        (
            p["host"],
            p["address"] or "-",
            p["endpoint"] or "-",
            ago(p["handshake"]) if p["state"] == "peer" else f"({p['state']})",
            str(p["received"]),
            str(p["sent"]),
            p["backend"] or "-",
        )
        for p in peers
    )
    table(console, ("HOST", "ADDRESS", "ENDPOINT", "HANDSHAKE", "RECEIVED", "SENT", "BACKEND"), rows)


def _show_key(answer: Any, console: Console) -> None:
    console.print(f"the WireGuard key of this host is {answer['key']} now", markup=False)
