"""`weft network create`: as `docker network create`, with this host's driver, until all hosts have the network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from rich.console import Console

from weft.cli.ask import ask
from weft.cli.show import add, progress
from weft.errors import InvalidRequest, WeftError
from weft.model import IPAddress, IPNetwork, Network, Pool, Published

DOCKER_SECONDS = 130.0
"""Docker calls the driver meanwhile, on this host and on others."""
LOOK_SECONDS = 0.3
_NAME_SECONDS = 5.0
"""The daemon learns a network's name from Docker, when that has made it."""


def add_command(network: Any) -> None:
    """Add `create` to the parser of `weft network`."""
    meaning = "make a network, on all hosts: as docker network create -d weft --ipam-driver weft"
    create = add(network, "create", _create, _show_created, meaning)
    create.add_argument("name", help="Docker's name for it, on all hosts")
    several: dict[str, Any] = {"action": "append", "default": []}
    create.add_argument("--subnet", **several, metavar="CIDR", help="a pool (default: a free one)")
    create.add_argument("--gateway", **several, metavar="ADDRESS", help="of a subnet")
    create.add_argument("--ip-range", **several, metavar="CIDR", help="part of a subnet: addresses are chosen there")
    create.add_argument("--aux-address", **several, metavar="NAME=ADDRESS", help="that no container shall get")
    create.add_argument("--ipv6", action="store_true", help="IPv6 as well")
    create.add_argument("--internal", action="store_true", help="without a way out of it")
    create.add_argument("--attachable", action="store_true", help="as docker's")
    create.add_argument("--label", **several, metavar="NAME=VALUE", help="as docker's")
    create.add_argument("-o", "--opt", **several, metavar="NAME=VALUE", help="the driver's: encrypted, mtu=1400, …")
    create.add_argument("--ipam-opt", **several, metavar="NAME=VALUE", help="the same for addresses")
    wait = "for the other hosts to have it; 0: do not wait (default: %(default)s)"
    create.add_argument("--wait", type=float, default=30.0, metavar="SECONDS", help=wait)


def _create(options: argparse.Namespace, socket_path: Path) -> Any:
    asked = _network(options)
    with progress(f"Docker makes network {asked.name}") as say:
        made = ask(socket_path, "POST", "/weft/networks", {"network": asked.encode()}, timeout=DOCKER_SECONDS)
        until = monotonic() + max(options.wait, _NAME_SECONDS)
        while True:
            found, missing = _spread(asked.name, socket_path)
            if found and not (missing and made["mirrored"] and options.wait):
                return found
            if monotonic() > until:
                break
            say(f"network {asked.name}: waiting for {', '.join(missing) or 'its name'}")
            sleep(LOOK_SECONDS)
    raise WeftError(
        f"network {asked.name} is made on this host, but {', '.join(missing) or 'the cluster'} does not have it after "
        f"{max(options.wait, _NAME_SECONDS):.0f} s: see weft's log there; it goes on trying"
    )


def _spread(name: str, socket_path: Path) -> tuple[Any, list[str]]:
    """The network, None if its name is not known yet; and the living hosts that lack it."""
    networks = ask(socket_path, "GET", "/weft/networks")
    found = next((n for n in networks if n["name"] == name and not n["retired"]), None)
    hosts = ask(socket_path, "GET", "/weft/hosts")
    return found, [h["name"] for h in hosts if h["alive"] and h["name"] not in (found["members"] if found else ())]


def _network(options: argparse.Namespace) -> Network:
    """The network that is asked for, with the VNI 0; `InvalidRequest` for what does not fit together."""
    subnets = [_subnet(text) for text in options.subnet]
    auxiliary = [(name, _address(value, "auxiliary address")) for name, value in _pairs(options.aux_address).items()]
    typed = [_address(text, "gateway") for text in options.gateway]
    gateways = {_pool_of(gateway, subnets, "gateway"): str(gateway) for gateway in typed}
    ranges = {_pool_of(r.network_address, subnets, "range"): str(r) for r in map(_subnet, options.ip_range)}
    pools = {str(subnet): Pool(str(subnet), gateways.get(str(subnet), "")) for subnet in subnets}
    for name, address in auxiliary:
        cidr = _pool_of(address, subnets, "auxiliary address")
        pools[cidr] = Pool(cidr, pools[cidr].gateway, {**pools[cidr].auxiliary, name: str(address)})
    return Network(
        vni=0,
        name=options.name,
        pools=tuple(pools.values()),
        mtu=0,
        internal=options.internal,
        creator="",
        published=Published(
            labels=_pairs(options.label),
            options=_pairs(options.opt),
            ipam_options=_pairs(options.ipam_opt),
            ranges=ranges,
            gateways=gateways,
            ipv6=options.ipv6 or any(subnet.version == 6 for subnet in subnets),
            attachable=options.attachable,
        ),
    )


def _subnet(text: str) -> IPNetwork:
    try:
        return ip_network(text)
    except ValueError as error:
        raise InvalidRequest(f"{error}: a subnet or range is written like 10.77.0.0/24") from error


def _address(text: str, what: str) -> IPAddress:
    try:
        return ip_address(text)
    except ValueError as error:
        raise InvalidRequest(f"{what} {text!r} is no address") from error


def _pool_of(address: IPAddress, subnets: Sequence[IPNetwork], what: str) -> str:
    """CIDR of the subnet that an address is in."""
    found = next((str(subnet) for subnet in subnets if address in subnet), None)
    if found is None:
        raise InvalidRequest(f"{what} {address} is in none of the subnets: give its own with --subnet")
    return found


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE as Docker reads it: a name alone has the value ""."""
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _show_created(network: Any, console: Console) -> None:
    subnets, hosts = " ".join(network["subnets"]), ", ".join(network["members"])
    console.print(f"network {network['name']} (VNI {network['vni']}), {subnets}, is on {hosts}", highlight=False)
