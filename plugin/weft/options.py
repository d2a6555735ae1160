"""Options of `docker network create -o` and `--ipam-opt`, and of a container's `--driver-opt`: names, validation, and
what they mean.

Every option is called `weft.NAME`; the bare NAME is accepted as well, and so are names that Docker's own drivers have
for the same. Other options that begin like the engine's (`com.docker.network.…`) are left to it, but for those of the
bridge driver: who asks for separated containers, say, must not be left to believe that he has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any

from weft.errors import InvalidRequest
from weft.model import INHERIT, MTU_MAX, PORT_MAX, RATE_MAX, UNLIMITED, VNI_MAX, VNI_USER_MAX, Network

MTU_MIN = 576
"""The least datagram every IPv4 host must accept (RFC 791)."""

RATE_MIN = 64_000
"""In bit/s. With less, what may pass at once (kernel/shaping.py) would be a matter of minutes."""
_RATE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)(|[kmgt]|[kmgt]i)(|bit|bps)", re.IGNORECASE | re.ASCII)
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_RATE_WORDS = "a rate as tc writes it, from 64kbit to 32gbit: 500kbit, 100mbit, 1.5gbit, or in bytes 12mbps"

_INTERFACE_NAME = "com.docker.network.endpoint.ifname"
"""Compose's `interface_name`, since Docker Engine 28. The engine drops what a driver outside of it answers."""

_ALIASES = {"com.docker.network.driver.mtu": "mtu", "com.docker.network.container_iface_prefix": "ifname"}


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """What the user asked for; None where nothing was said."""

    vni: int | None = None
    mtu: int | None = None
    network: str | None = None
    encrypted: bool = False
    port: int | None = None
    source_ports: str | None = None
    ttl: int | None = None
    dscp: int | None = None
    udp_checksum: bool | None = None
    multicast: int | None = None
    ifname: str | None = None
    rate: int | None = None
    tx_checksum: bool | None = None
    floating: bool | None = None

    def chosen(self) -> dict[str, Any]:
        """Those of `CARRIAGE` that the user gave."""
        return {name: value for name in CARRIAGE if (value := getattr(self, name)) is not None}

    def contradictions(self, network: Network) -> Iterator[str]:
        """In which of `CARRIAGE` the network is otherwise than the user says."""
        for name, value in self.chosen().items():
            if (has := getattr(network, name)) != value:
                yield f"its {_option(name)} is {shown(name, has)}, not {shown(name, value)}"


def chosen_options(network: Network) -> dict[str, str]:
    """What was chosen for a network with `-o`, as far as it is not the default."""
    fields = Network.__dataclass_fields__
    values = ((name, getattr(network, name)) for name in CARRIAGE)
    return {_option(name): shown(name, value) for name, value in values if value != fields[name].default}


def shown(name: str, value: Any) -> str:
    """The value of one of `CARRIAGE` as users write it."""
    if name in ("rate", "multicast"):
        return {0: "off", UNLIMITED: "on"}.get(value) or rate_text(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    if name == "dscp" and value == INHERIT:
        return "inherit"
    return str(value) or "automatic"


def rate_text(rate: int) -> str:
    """A rate in bit/s as users write it."""
    scale, unit = next(one for one in ((10**9, "g"), (10**6, "m"), (1000, "k"), (1, "")) if rate % one[0] == 0)
    return f"{rate // scale}{unit}bit"


def _option(name: str) -> str:
    return name.replace("_", "-")


def parse_options(given: Mapping[str, Any]) -> NetworkOptions:
    """Read the options, or raise `InvalidRequest` naming the option and, if it is unknown, all valid ones."""
    values: dict[str, Any] = {}
    for key, text in given.items():
        name = _ALIASES.get(key, key.removeprefix("weft.")).replace("-", "_")
        if name not in _PARSERS:
            if key.startswith("com.docker.network.bridge."):
                raise InvalidRequest(f"option {key} is for Docker's bridge driver, weft does not have it: leave it out")
            if key.startswith("com.docker.network."):
                continue
            known = ", ".join(f"weft.{_option(one)}" for one in _PARSERS)
            raise InvalidRequest(f"unknown option {key!r}: weft knows {known}")
        try:
            value = _PARSERS[name](str(text))
        except ValueError as error:
            raise InvalidRequest(f"option {key}={text}: {error}") from None
        if values.setdefault(name, value) != value:
            both = f"{values[name]} and {value}"
            raise InvalidRequest(f"option {_option(name)} is given twice with different values: {both}")
    if values.get("floating") and values.get("multicast") == 0:
        raise InvalidRequest(
            "floating=on and multicast=off: a floating IPv6 address is announced by multicast, choose one"
        )
    return NetworkOptions(**values)


def parse_endpoint_rate(given: Mapping[str, Any]) -> int | None:
    """The one option of a container's attachment (`--driver-opt`): bit/s, 0: no limit, None: not given.

    Names with a dot, but for `weft.`, are the engine's or somebody else's.
    """
    rate = None
    for key, text in given.items():
        if key == _INTERFACE_NAME:
            raise InvalidRequest(
                f"option {key} of a container is for Docker's own drivers, only they may name its interface: leave "
                "it out, or create the network with -o weft.ifname=app for app0, app1 and so on"
            )
        if key not in ("rate", "weft.rate"):
            if "." not in key or key.startswith("weft."):
                raise InvalidRequest(f"unknown option {key!r} of a container: weft knows weft.rate")
            continue
        try:
            value = _rate_or_off(str(text))
        except ValueError as error:
            raise InvalidRequest(f"option {key}={text}: {error}") from None
        if rate not in (None, value):
            raise InvalidRequest("option rate is given twice with different values")
        rate = value
    return rate


def _vni(text: str) -> int:
    vni = _number(text, 1, VNI_MAX)
    if vni > VNI_USER_MAX:
        raise ValueError(f"weft itself uses it, to probe the network between the hosts: choose 1 to {VNI_USER_MAX}")
    return vni


def _mtu(text: str) -> int:
    return _number(text, MTU_MIN, MTU_MAX)


def _network(text: str) -> str:
    if not text:
        raise ValueError("must be the name or the VNI of an existing weft network")
    return text


def _flag(text: str) -> bool:
    """`-o encrypted` arrives as an empty value."""
    if text.lower() not in ("", "true", "1", "false", "0"):
        raise ValueError("must be true or false")
    return text.lower() in ("", "true", "1")


def _port(text: str) -> int:
    return _number(text, 1, PORT_MAX)


def _ports(text: str) -> str:
    low, dash, high = text.partition("-")
    if not dash or _port(low) >= _port(high):
        raise ValueError("must be LOW-HIGH, two ports from 1 to 65535, for example 40000-50000")
    return f"{int(low)}-{int(high)}"


def _ttl(text: str) -> int:
    return _number(text, 1, 255)


def _dscp(text: str) -> int:
    return INHERIT if text == "inherit" else _number(text, 0, 63)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("must be on or off")
    return text == "on"


def _multicast(text: str) -> int:
    if text in ("on", "off"):
        return UNLIMITED if text == "on" else 0
    return _rate(text, "on, off, or ")


def _rate_or_off(text: str) -> int:
    return 0 if text == "off" else _rate(text, "off, or ")


def _rate(text: str, instead: str) -> int:
    """In bit/s, whole bytes."""
    if found := _RATE.fullmatch(text):
        number, prefix, unit = found.groups()
        rate = int(Decimal(number) * _SCALES[prefix.lower()]) * (8 if unit.lower() == "bps" else 1)
        if RATE_MIN <= rate <= RATE_MAX:
            return rate // 8 * 8
    raise ValueError(f"must be {instead}{_RATE_WORDS}")


def _ifname(text: str) -> str:
    """The engine appends a number, and a name has 15 characters at most."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,11}", text) or text == "lo":
        raise ValueError("must be a letter and up to 11 letters, digits, _ and -: Docker appends a number")
    return text


def _number(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise ValueError(f"must be a number from {low} to {high}")
    return int(text)


CARRIAGE: dict[str, Callable[[str], Any]] = {
    "port": _port,
    "source_ports": _ports,
    "ttl": _ttl,
    "dscp": _dscp,
    "udp_checksum": _switch,
    "multicast": _multicast,
    "ifname": _ifname,
    "rate": _rate_or_off,
    "tx_checksum": _switch,
    "floating": _switch,
}
"""How a network's frames are carried, and given to containers: fields of `Network` by the same name."""
_PARSERS: dict[str, Callable[[str], Any]] = {
    "vni": _vni,
    "mtu": _mtu,
    "network": _network,
    "encrypted": _flag,
    **CARRIAGE,
}

assert set(_PARSERS) == {field.name for field in fields(NetworkOptions)}
