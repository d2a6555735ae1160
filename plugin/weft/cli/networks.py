"""`weft network`: the networks of the cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlencode

from rich.console import Console

from weft.cli import create
from weft.cli.ask import ask
from weft.cli.show import add, pairs, progress, table

_GONE_SECONDS = 10.0


def add_commands(commands: Any) -> None:
    network = commands.add_parser("network", help="the networks of the cluster")
    network = network.add_subparsers(required=True, metavar="COMMAND")
    ls = add(network, "ls", _list_networks, _show_networks, "list the networks")
    ls.set_defaults(without=lambda options: options.offline().networks())
    inspect = add(network, "inspect", _inspect_network, _show_network, "all about one network, as this host sees it")
    inspect.add_argument("network", help="name or VNI")
    create.add_command(network)
    remove = add(
        network, "rm", _remove, _show_removed, "remove a network from all hosts: where it is used, when that ends"
    )
    remove.add_argument("network", help="name or VNI")


def _list_networks(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET", "/weft/networks")


def _inspect_network(options: argparse.Namespace, socket_path: Path) -> Any:
    return ask(socket_path, "GET", f"/weft/networks?{urlencode({'name': options.network})}")


def _remove(options: argparse.Namespace, socket_path: Path) -> Any:
    query = f"/weft/networks?{urlencode({'name': options.network})}"
    with progress(f"Docker removes network {options.network}") as say:
        network = ask(socket_path, "DELETE", query, timeout=create.DOCKER_SECONDS)
        until = monotonic() + _GONE_SECONDS
        while monotonic() < until:
            found = [n for n in ask(socket_path, "GET", "/weft/networks") if n["vni"] == network["vni"]]
            if not found:
                return {**network, "removed": True, "members": [], "hosts": []}
            network = found[0]
            if network["endpoints"]:
                break
            say(f"network {options.network}: waiting for {', '.join(network['members'])}")
            sleep(create.LOOK_SECONDS)
    return {**network, "removed": False}


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
    table(console, ("NAME", "VNI", "SUBNETS", "ENCRYPTED", "ENDPOINTS", "HOSTS"), rows)


def _show_network(network: Any, console: Console) -> None:
    mtu = f"{network['fitting_mtu']} ({'as asked' if network['mtu'] else 'what every host carries'})"
    if others := network["other_mtu"]:
        mtu += f"; until restarted: {', '.join(f'{name} {old}' for name, old in sorted(others.items()))}"
    encrypted = network["encrypted"]
    if without := network["unencryptable"]:
        encrypted += f"; not to {' '.join(without)}: no usable WireGuard key there"
    values = (
        ("name", network["name"] or "-"),
        ("VNI", network["vni"]),
        ("subnets", " ".join(network["subnets"])),
        ("endpoints", f"{network['endpoints']}, on {' '.join(network['hosts']) or 'no host'}"),
        ("hosts", " ".join(network["members"]) or "no host"),
        ("MTU", mtu),
        ("encrypted", encrypted),
        ("internal", "yes" if network["internal"] else "no"),
        ("options", " ".join(f"{name}={value}" for name, value in network["options"].items()) or "-"),
        ("made on", network["creator"]),
        ("removed", "yes: it goes when no container uses it" if network["retired"] else "no"),
    )
    pairs(console, values)


def _show_removed(network: Any, console: Console) -> None:
    if network["removed"]:
        console.print(f"network {network['name']} (VNI {network['vni']}) is removed", highlight=False)
        return
    why = (
        f"{network['endpoints']} containers there use it: it goes with them"
        if network["endpoints"]
        else "see weft's log"
    )
    hosts = ", ".join(network["members"])
    console.print(f"network {network['name']} (VNI {network['vni']}) is still on {hosts}; {why}", highlight=False)
