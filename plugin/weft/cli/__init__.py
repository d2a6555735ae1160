"""The `weft` command for people and scripts: asks the daemon on this host, and shows the answer.

Every command takes `--json`. Exit codes: 0 done, 1 it failed, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket
from time import time
from typing import Any
from urllib.parse import urlencode

from rich.console import Console
from rich.table import Table

from weft import __version__
from weft.errors import ConfigError, WeftError
from weft.model import SCHEMA

_TIMEOUT_SECONDS = 30.0
_PIPE_COLUMNS = 250
_PLUGINS = Path("/run/docker/plugins")

Show = Callable[[Any, Console], None]


class _Connection(HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("weft", timeout=_TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket(AF_UNIX, SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(socket_path: Path, method: str, path: str, body: Any = None) -> Any:
    """The daemon's answer; `WeftError` with its message if it refuses, `ConfigError` if there is no daemon.

    The daemon is looked for at `socket_path`, then where the engine keeps the sockets of managed plugins.
    """
    for place in [socket_path, *sorted(_PLUGINS.glob("*/weft.sock"))]:
        connection = _Connection(place)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (FileNotFoundError, ConnectionRefusedError):
            continue
        except (OSError, HTTPException, ValueError) as error:
            raise WeftError(f"the weft daemon at {place} does not answer: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise WeftError(answer["Err"])
        return answer
    raise ConfigError(f"no weft daemon runs on this host: none listens at {socket_path}")


def answers(socket_path: Path) -> bool:
    """Whether a daemon serves there."""
    try:
        ask(socket_path, "GET", "/weft/version")
    except WeftError:
        return False
    return True


def add_commands(commands: Any) -> None:
    """Add what this module does to `weft`'s parser; each command sets `run` (ask the daemon) and `show`."""
    _add(commands, "version", _version, _show_version, "show the versions of this command and of the running daemon")
    host = commands.add_parser("host", help="the hosts of the cluster").add_subparsers(required=True, metavar="COMMAND")
    _add(host, "ls", _list_hosts, _show_hosts, "list the hosts")
    forget = _add(host, "forget", _forget, _show_forgotten, "collect what a host that is gone for good has")
    forget.add_argument("host", help="name, id or underlay address")
    forget.add_argument("--force", action="store_true", help="even if it was alive a moment ago")
    network = commands.add_parser("network", help="the networks of the cluster")
    network = network.add_subparsers(required=True, metavar="COMMAND")
    _add(network, "ls", _list_networks, _show_networks, "list the networks")
    inspect = _add(network, "inspect", _inspect_network, _show_network, "all about one network, as this host sees it")
    inspect.add_argument("network", help="name or VNI")
    _add(commands, "peers", _list_peers, _show_peers, "the other hosts, as WireGuard on this host sees them")
    _add(commands, "rotate-key", _rotate_key, _show_key, "replace this host's WireGuard key; packets wait a moment")
    gc = _add(commands, "gc", _collect, _show_due, "collect now what Docker, or the cluster, does not have any more")
    gc.add_argument("--dry-run", action="store_true", help="only show what is to be collected, why and when")


def run(options: argparse.Namespace, socket_path: Path) -> int:
    """Do one command and print its answer. Returns the exit code: 0, unless the command's `code` says another."""
    answer = options.run(options, socket_path)
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        # A pipe has no width, and rich would shorten cells to fit 80 columns.
        options.show(answer, Console(soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_COLUMNS))
    code: Callable[[Any], int] = getattr(options, "code", lambda answer: 0)
    return code(answer)


def _add(commands: Any, name: str, work: Callable[..., Any], show: Show, meaning: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=meaning, description=meaning)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=work, show=show)
    return parser


def _version(options: argparse.Namespace, socket_path: Path) -> Any:
    """`daemon` is None if none runs. `schema` is that of the store's records (`model.SCHEMA`)."""
    try:
        daemon = ask(socket_path, "GET", "/weft/version")
    except ConfigError:
        daemon = None
    return {"version": __version__, "schema": SCHEMA, "daemon": daemon}


def _list_hosts(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET", "/weft/hosts")


def _forget(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "POST", "/weft/hosts/forget", {"host": options.host, "force": options.force})


def _collect(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET" if options.dry_run else "POST", "/weft/gc")


def _show_version(answer: Any, console: Console) -> None:
    console.print(f"weft {answer['version']} (store schema {answer['schema']})", highlight=False)
    daemon = answer["daemon"]
    runs = f"weft {daemon['version']} (store schema {daemon['schema']})" if daemon else "none runs on this host"
    console.print(f"daemon: {runs}", highlight=False)


def _list_networks(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET", "/weft/networks")


def _inspect_network(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET", f"/weft/networks?{urlencode({'name': options.network})}")


def _list_peers(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET", "/weft/peers")


def _rotate_key(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "POST", "/weft/rotate-key")


def _show_networks(networks: Any, console: Console) -> None:
    rows = (
        (
            n["name"] or "-",
            str(n["vni"]),
            " ".join(n["subnets"]),
            n["encrypted"],
            str(n["endpoints"]),
            " ".join(n["hosts"]),
        )
        for n in networks
    )
    _table(console, ("NAME", "VNI", "SUBNETS", "ENCRYPTED", "ENDPOINTS", "HOSTS"), rows)


def _show_network(network: Any, console: Console) -> None:
    shown = {
        **network,
        "subnets": " ".join(network["subnets"]),
        "hosts": " ".join(network["hosts"]),
        "mtu": f"{network['fitting_mtu']} ({'as asked' if network['mtu'] else 'what every host carries'})",
    }
    del shown["fitting_mtu"]
    if others := shown.pop("other_mtu"):
        shown["mtu"] += f"; until restarted: {', '.join(f'{name} {mtu}' for name, mtu in sorted(others.items()))}"
    if without := shown.pop("unencryptable"):
        shown["encrypted"] += f"; not to {' '.join(without)}: no usable WireGuard key there"
    for name, value in shown.items():
        console.print(f"{name + ':':12} {value}", markup=False, highlight=False)


def _show_peers(peers: Any, console: Console) -> None:
    rows = (
        (
            p["host"],
            p["address"] or "-",
            p["endpoint"] or "-",
            _ago(p["handshake"]) if p["state"] == "peer" else f"({p['state']})",
            str(p["received"]),
            str(p["sent"]),
            p["backend"] or "-",
        )
        for p in peers
    )
    _table(console, ("HOST", "ADDRESS", "ENDPOINT", "HANDSHAKE", "RECEIVED", "SENT", "BACKEND"), rows)


def _ago(moment: int) -> str:
    return f"{max(0, round(time() - moment))} s ago" if moment else "never"


def _show_key(answer: Any, console: Console) -> None:
    console.print(f"the WireGuard key of this host is {answer['key']} now", markup=False)


def _show_hosts(hosts: Any, console: Console) -> None:
    rows = (
        (
            h["name"],
            h["underlay"],
            "[green]alive[/]" if h["alive"] else "[red]silent[/]",
            str(h["endpoints"]),
            h["version"],
            h["id"][:12],
        )
        for h in hosts
    )
    _table(console, ("NAME", "UNDERLAY", "STATE", "ENDPOINTS", "WEFT", "ID"), rows)


def _show_forgotten(host: Any, console: Console) -> None:
    console.print(f"host {host['name']} ({host['underlay']}) is forgotten, with {host['endpoints']} endpoints")


def _show_due(due: Any, console: Console) -> None:
    if not due:
        console.print("nothing to collect")
        return
    rows = ((one["what"], one["why"], f"in {one['seconds']:.0f} s" if one["seconds"] else "now") for one in due)
    _table(console, ("OBJECT", "WHY", "COLLECTED"), rows)


def _table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
