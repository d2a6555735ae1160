"""`weft endpoint ls`, `weft addresses`: who is where."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from rich.console import Console

from weft.cli.ask import ask
from weft.cli.show import add, table


def add_commands(commands: Any) -> None:
    endpoint = commands.add_parser("endpoint", help="the endpoints of the cluster: containers on its networks")
    endpoint = endpoint.add_subparsers(required=True, metavar="COMMAND")
    ls = add(endpoint, "ls", _list_endpoints, _show_endpoints, "list the endpoints")
    ls.set_defaults(without=lambda options: options.offline().endpoints())
    meaning = "the pools, how much of each is used, and who has which address"
    addresses = add(commands, "addresses", _list_addresses, _show_addresses, meaning)
    addresses.add_argument("network", nargs="?", help="name or VNI: only its pools")
    addresses.set_defaults(without=lambda options: options.offline().addresses(options.network))


def _list_endpoints(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET", "/weft/endpoints")


def _show_endpoints(endpoints: Any, console: Console) -> None:
    rows = (
        (
            e["network"] or f"VNI {e['vni']}",
            " ".join(e["addresses"]) or "-",
            " ".join(e["names"]) or "-",
            e["host"],
            e["mac"],
            e["rate"] or "-",
            e["id"][:12],
        )
        for e in endpoints
    )
    table(console, ("NETWORK", "ADDRESSES", "NAMES", "HOST", "MAC", "RATE", "ID"), rows)


def _list_addresses(options: argparse.Namespace, socket_path: Path) -> Any:
    query = f"?{urlencode({'name': options.network})}" if options.network else ""
    return ask(socket_path, "GET", f"/weft/addresses{query}")


def _show_addresses(found: Any, console: Console) -> None:
    pools = ((p["pool"], p["network"] or "-", str(p["used"]), str(p["free"])) for p in found["pools"])
    table(console, ("POOL", "NETWORK", "USED", "FREE"), pools)
    console.print()
    rows = ((a["pool"], a["address"], a["holder"], a["host"] or "-") for a in found["addresses"])
    table(console, ("POOL", "ADDRESS", "HOLDER", "HOST"), rows)
