"""The plugin protocol's JSON, read into the driver's words and written from them.

Shapes as in moby `daemon/libnetwork/drivers/remote/api` and `ipams/remote/api`. Engines differ in small ways: calls
without arguments have no body, fields may be absent or null, newer engines send more. Text becomes a value here, once;
whatever is wrong raises `InvalidRequest` naming the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from weft.driver import EndpointRequest
from weft.errors import InvalidRequest
from weft.ipam import PoolId
from weft.model import IPAddress, IPInterface, IPNetwork, Pool
from weft.networks import NetworkRequest, PoolRequest
from weft.options import parse_endpoint_rate, parse_options

_GENERIC = "com.docker.network.generic"
_INTERNAL = "com.docker.network.internal"
_GATEWAY_TYPE = "com.docker.network.gateway"
_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")


class Malformed(InvalidRequest):
    """The body is not what an engine sends."""


class Body:
    """A request's JSON object with typed, checked access. Field names match in any case, as in Go."""

    def __init__(self, fields: Mapping[str, Any], path: str = "") -> None:
        self._fields = {name.lower(): value for name, value in fields.items()}
        self._path = path

    @classmethod
    def parse(cls, raw: bytes) -> Body:
        """Read a request; an empty body is an empty object (calls that need fields then say which is missing)."""
        try:
            fields = json.loads(raw) if raw.strip() else {}
        except (ValueError, RecursionError):
            raise Malformed("the request's body is not JSON") from None
        if not isinstance(fields, dict):
            raise Malformed("the request's body is not a JSON object")
        return cls(fields)

    def text(self, name: str) -> str:
        """A text, "" if absent."""
        return self._typed(name, str, "a text") or ""

    def required(self, name: str) -> str:
        value = self.text(name)
        if not value:
            raise Malformed(f"field {self._path}{name} is missing: was this call cut off and repeated by the engine?")
        return value

    def identifier(self, name: str) -> str:
        """An id that the engine chose: any letters and digits."""
        value = self.required(name)
        if not (value.isascii() and value.isalnum() and len(value) <= 128):
            raise Malformed(f"field {self._path}{name} is not an id: {value[:40]!r}")
        return value

    def flag(self, name: str) -> bool:
        return bool(self._typed(name, bool, "true or false"))

    def object(self, name: str) -> Body:
        """A nested object, empty if absent or null."""
        return Body(self.mapping(name), f"{self._path}{name}.")

    def mapping(self, name: str) -> dict[str, Any]:
        return self._typed(name, dict, "an object") or {}

    def objects(self, name: str) -> list[Body]:
        values = self._typed(name, list, "a list") or []
        if not all(isinstance(value, dict) for value in values):
            raise Malformed(f"field {self._path}{name} must be a list of objects")
        return [Body(value, f"{self._path}{name}.") for value in values]

    def network(self, name: str) -> IPNetwork | None:
        text = self.text(name)
        try:
            return ip_network(_without_zone(text)) if text else None
        except ValueError as error:
            why = f"{error}; one is written like 10.77.0.0/24"
            raise InvalidRequest(f"{self._path}{name} {text!r} is not a subnet: {why}") from None

    def address(self, name: str) -> IPAddress | None:
        text = self.text(name)
        try:
            return ip_address(_without_zone(text)) if text else None
        except ValueError:
            raise InvalidRequest(f"{self._path}{name} {text!r} is not an IP address") from None

    def interface(self, name: str) -> IPInterface | None:
        """An address with its prefix length."""
        text = self.text(name)
        try:
            return ip_interface(_without_zone(text)) if text else None
        except ValueError:
            raise InvalidRequest(f"{self._path}{name} {text!r} is not an address with a prefix length") from None

    def _typed(self, name: str, kind: type, what: str) -> Any:
        value = self._fields.get(name.lower())
        if value is not None and not isinstance(value, kind):
            raise Malformed(f"field {self._path}{name} must be {what}")
        return value


def _without_zone(text: str) -> str:
    """An IPv6 address with a zone (`fe80::1%eth0`) would be the same address under another name."""
    if "%" in text:
        raise ValueError("it has a zone")
    return text


def network_request(body: Body) -> NetworkRequest:
    options = body.object("Options")
    data = [*body.objects("IPv4Data"), *body.objects("IPv6Data")]
    return NetworkRequest(
        network_id=body.identifier("NetworkID"),
        pools=tuple(map(_pool_request, data)),
        options=parse_options(options.mapping(_GENERIC)),
        internal=options.flag(_INTERNAL),
    )


def _pool_request(body: Body) -> PoolRequest:
    pool = body.network("Pool")
    if pool is None:
        raise InvalidRequest("IPAM gave no pool: weft needs one")
    gateway = body.interface("Gateway")
    auxiliary = body.mapping("AuxAddresses")
    named = Body(auxiliary, "AuxAddresses.")
    addresses = {name: named.interface(name) for name in sorted(auxiliary)}
    return PoolRequest(
        space=body.text("AddressSpace"),
        pool=Pool(
            cidr=str(pool),
            gateway=str(gateway.ip) if gateway else "",
            auxiliary={name: str(address.ip) for name, address in addresses.items() if address},
        ),
    )


def endpoint_request(body: Body) -> EndpointRequest:
    interface = body.object("Interface")
    given = (interface.interface("Address"), interface.interface("AddressIPv6"))
    mac = interface.text("MacAddress").lower().replace("-", ":")
    if mac and (not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00"):
        raise InvalidRequest(f"MAC address {mac!r} is not a unicast Ethernet address")
    return EndpointRequest(
        network_id=body.identifier("NetworkID"),
        endpoint_id=body.identifier("EndpointID"),
        addresses=tuple(str(address.ip) for address in given if address),
        mac=mac,
        rate=parse_endpoint_rate(body.mapping("Options")),
    )


def sub_pool(body: Body, pool: IPNetwork | None) -> IPNetwork | None:
    """The --ip-range of a RequestPool."""
    sub = body.network("SubPool")
    if sub is not None:
        if pool is None:
            raise InvalidRequest(f"--ip-range {sub} needs a --subnet that contains it")
        if sub.version != pool.version or not sub.subnet_of(pool):  # type: ignore[arg-type]
            raise InvalidRequest(f"--ip-range {sub} is not inside --subnet {pool}")
    return sub


def wants_gateway(body: Body) -> bool:
    return body.object("Options").text("RequestAddressType") == _GATEWAY_TYPE


def pool_reply(pool_id: PoolId) -> dict[str, Any]:
    return {"PoolID": str(pool_id), "Pool": str(pool_id.pool), "Data": {}}


def address_reply(pool_id: PoolId, address: IPAddress) -> dict[str, Any]:
    return {"Address": f"{address}/{pool_id.pool.prefixlen}", "Data": {}}
