"""Options of `docker network create -o` and `--ipam-opt`: names, validation, and what they mean.

Every option is called `weft.NAME`; the bare NAME is accepted as well. Options that belong to the engine itself
(`com.docker.network.…`) are left to it, except the MTU, which Docker's own drivers know under that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from weft.errors import InvalidRequest
from weft.model import VNI_MAX, VNI_USER_MAX

MTU_MIN = 576
"""The least datagram every IPv4 host must accept (RFC 791)."""
IPV6_MIN_MTU = 1280
"""Of every link that carries IPv6 (RFC 8200)."""
MTU_MAX = 65535

_ALIASES = {"com.docker.network.driver.mtu": "mtu"}


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """What the user asked for; None where nothing was said."""

    vni: int | None = None
    mtu: int | None = None
    network: str | None = None
    encrypted: bool = False


def parse_options(given: Mapping[str, Any]) -> NetworkOptions:
    """Read the options, or raise `InvalidRequest` naming the option and, if it is unknown, all valid ones."""
    values: dict[str, Any] = {}
    for key, text in given.items():
        name = _ALIASES.get(key, key.removeprefix("weft."))
        if name not in _PARSERS:
            if key.startswith("com.docker.network."):
                continue
            raise InvalidRequest(f"unknown option {key!r}: weft knows {', '.join(f'weft.{n}' for n in _PARSERS)}")
        try:
            value = _PARSERS[name](str(text))
        except ValueError as error:
            raise InvalidRequest(f"option {key}={text}: {error}") from None
        if values.setdefault(name, value) != value:
            raise InvalidRequest(f"option {name} is given twice with different values: {values[name]} and {value}")
    return NetworkOptions(**values)


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


def _number(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise ValueError(f"must be a number from {low} to {high}")
    return int(text)


_PARSERS: dict[str, Callable[[str], Any]] = {"vni": _vni, "mtu": _mtu, "network": _network, "encrypted": _flag}

assert set(_PARSERS) == {field.name for field in fields(NetworkOptions)}
