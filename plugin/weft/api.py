"""The plugin protocol over HTTP: a table of calls; decode, one call, encode; and the single error handler.

Every answer is JSON. A refusal is status 200 with the message under `Err` (network driver) and `Error` (IPAM driver):
the engine then shows it to the user as it is. Only a request that no engine would send gets a 4xx.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException

from weft import wire
from weft.driver import Driver
from weft.errors import InvalidRequest, WeftError
from weft.ipam import GLOBAL_SPACE, LOCAL_SPACE, Ipam, PoolId
from weft.networks import NOT_IN_SWARM
from weft.options import parse_options
from weft.wire import Body, Malformed

log = logging.getLogger(__name__)

MAX_BODY = 1 << 20
"""Bytes; an engine's requests are a few kilobytes."""

_ADDING = {
    "NetworkDriver.AllocateNetwork",
    "NetworkDriver.CreateNetwork",
    "NetworkDriver.CreateEndpoint",
    "IpamDriver.RequestPool",
    "IpamDriver.RequestAddress",
}
"""Calls that wait for the gate. The engine never repeats those that take away, so the gate finishes these later; but
not ReleasePool, which counts and so cannot be repeated: the collector makes up for it."""

_ON_LINK = 1
"""Type of a static route without a next hop (moby drivers/remote/api)."""

Reply = dict[str, Any]
Call = Callable[[Body], Reply]
NoteCall = Callable[[str, float, str], None]


class Gate(Protocol):
    """Orders calls while the store is away, and after; see `presence.Presence`."""

    def admit(self) -> None:
        """Raise `StoreError` if nothing can be added now."""
        ...

    def finish(self, what: str, work: Callable[[], object]) -> None:
        """Do it now, or as soon as the store is back."""
        ...


class Routes(Protocol):
    """Ways to the resolver for containers that have no other; see `sandboxes.ResolverRoutes`."""

    def take(self, network_id: str, endpoint_id: str, sandbox: str) -> str | None:
        """Destination of the static route that the endpoint shall bring into its sandbox."""
        ...

    def release(self, endpoint_id: str) -> None:
        """The endpoint has left."""
        ...


def create_app(
    driver: Driver,
    ipam: Ipam,
    gate: Gate,
    routes: Routes,
    *,
    scope: str = "local",
    note_call: NoteCall = lambda *_: None,
) -> Flask:
    """The WSGI application; it holds no state of its own.

    :param scope: who keeps the networks: each engine its own (`local`), or Docker Swarm (`global`).
    :param note_call: told of each call how long it took, and `refused`, `bug` or "".
    """
    app = Flask("weft", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.url_map.merge_slashes = False
    calls = {**_plugin_calls(), **_network_calls(driver, gate, routes, scope), **_ipam_calls(driver, ipam, gate)}

    @app.before_request
    def begin() -> None:
        g.began = perf_counter()

    @app.post("/<name>", provide_automatic_options=False)
    def call(name: str) -> Response | tuple[Response, int]:
        if name not in calls:
            return _refuse(f"weft does not know the call {name}", 404)
        g.call = name
        body = Body.parse(request.get_data())
        g.objects = _objects(body)
        if name in _ADDING:
            gate.admit()
        return jsonify(calls[name](body))

    @app.errorhandler(Exception)
    def refuse(error: Exception) -> tuple[Response, int]:
        if isinstance(error, HTTPException):
            return _refuse(f"{error.name}: {request.method} {request.path}", error.code or 500)
        if isinstance(error, WeftError):
            return _refuse(str(error), 400 if isinstance(error, Malformed) else 409 if request.blueprint else 200)
        log.exception("a bug in weft: %s", request.path)
        return _refuse(f"weft met a bug in {request.path[1:]} ({type(error).__name__}): its log has the details", 500)

    @app.after_request
    def note(response: Response) -> Response:
        seconds = perf_counter() - g.began
        if "call" in g:
            failure = "bug" if response.status_code == 500 else "refused" if "refusal" in g else ""
            note_call(g.call, seconds, failure)
        outcome = g.get("refusal") or "ok"
        level = logging.WARNING if outcome != "ok" else logging.DEBUG if request.method == "GET" else logging.INFO
        log.log(level, "%s %s%s, %.2f ms", request.path[1:], g.get("objects", ""), outcome, seconds * 1000)
        return response

    return app


def _refuse(message: str, status: int) -> tuple[Response, int]:
    g.refusal = f"refused: {message}"
    return jsonify({"Err": message, "Error": message}), status


def _objects(body: Body) -> str:
    """The short ids in a request, for the log."""
    names = {"NetworkID": "network", "EndpointID": "endpoint", "PoolID": "pool", "Address": "address"}
    return "".join(f"{word} {_short(body.text(field))} " for field, word in names.items() if body.text(field))


def _short(text: str) -> str:
    return text if "/" in text or "." in text or ":" in text else text[:12]


def _plugin_calls() -> dict[str, Call]:
    return {"Plugin.Activate": lambda _: {"Implements": ["NetworkDriver", "IpamDriver"]}}


def _network_calls(driver: Driver, gate: Gate, routes: Routes, scope: str) -> dict[str, Call]:
    def create_network(body: Body) -> Reply:
        driver.networks.create(wire.network_request(body))
        return {}

    def delete_network(body: Body) -> Reply:
        network_id = body.identifier("NetworkID")
        gate.finish(f"removal of network {network_id[:12]}", driver.networks.deletion(network_id))
        return {}

    def create_endpoint(body: Body) -> Reply:
        asked = wire.endpoint_request(body)
        endpoint = driver.create_endpoint(asked)
        # The engine rejects any field that it had set itself, even unchanged.
        return {"Interface": {} if asked.mac else {"MacAddress": endpoint.mac}}

    def join(body: Body) -> Reply:
        network_id, endpoint_id = body.identifier("NetworkID"), body.identifier("EndpointID")
        interface = driver.join(network_id, endpoint_id)
        # No gateway: so the engine attaches docker_gwbridge, which does the default route and published ports.
        reply: Reply = {
            "InterfaceName": {"SrcName": interface, "DstPrefix": driver.networks.interface_prefix(network_id)}
        }
        if route := routes.take(network_id, endpoint_id, body.text("SandboxKey")):
            reply["StaticRoutes"] = [{"Destination": route, "RouteType": _ON_LINK}]
        return reply

    def leave(body: Body) -> Reply:
        routes.release(body.identifier("EndpointID"))
        return {}

    def delete_endpoint(body: Body) -> Reply:
        network_id, endpoint_id = body.identifier("NetworkID"), body.identifier("EndpointID")
        routes.release(endpoint_id)
        driver.detach(endpoint_id)
        gate.finish(f"removal of endpoint {endpoint_id[:12]}", lambda: driver.forget_endpoint(network_id, endpoint_id))
        return {}

    def allocate_network(body: Body) -> Reply:
        pools = [one.network("Pool") for field in ("IPv4Data", "IPv6Data") for one in body.objects(field)]
        return {"Options": driver.networks.allocate(body.mapping("Options"), [pool for pool in pools if pool])}

    return {
        # Endpoints on different hosts can talk, whoever keeps the networks.
        "NetworkDriver.GetCapabilities": lambda _: {"Scope": scope, "ConnectivityScope": "global"},
        # Every engine version shall reserve the gateway alike; so this is not announced, only answered.
        "NetworkDriver.GwAllocCheck": lambda _: {"SkipIPv4": False, "SkipIPv6": False},
        "NetworkDriver.AllocateNetwork": allocate_network,
        "NetworkDriver.FreeNetwork": _nothing,
        "NetworkDriver.CreateNetwork": create_network,
        "NetworkDriver.DeleteNetwork": delete_network,
        "NetworkDriver.CreateEndpoint": create_endpoint,
        "NetworkDriver.DeleteEndpoint": delete_endpoint,
        "NetworkDriver.EndpointOperInfo": lambda _: {"Value": {}},
        "NetworkDriver.Join": join,
        "NetworkDriver.Leave": leave,
        "NetworkDriver.DiscoverNew": _nothing,
        "NetworkDriver.DiscoverDelete": _nothing,
        "NetworkDriver.ProgramExternalConnectivity": _nothing,
        "NetworkDriver.RevokeExternalConnectivity": _nothing,
    }


def _ipam_calls(driver: Driver, ipam: Ipam, gate: Gate) -> dict[str, Call]:
    def request_pool(body: Body) -> Reply:
        space, v6 = body.required("AddressSpace"), body.flag("V6")
        pool = body.network("Pool")
        sub = wire.sub_pool(body, pool)
        if pool is not None and (pool.version == 6) != v6:
            raise InvalidRequest(f"subnet {pool} is not IPv{6 if v6 else 4}")
        named = parse_options(body.mapping("Options")).network
        if named is not None and space == GLOBAL_SPACE:
            raise InvalidRequest(NOT_IN_SWARM)
        if named is not None and pool is None:
            return wire.pool_reply(ipam.network_pool(space, driver.networks.find(named), sub, v6=v6))
        return wire.pool_reply(ipam.request_pool(space, pool, sub, v6=v6))

    def release_pool(body: Body) -> Reply:
        pool_id = PoolId.find(body.required("PoolID"))
        if pool_id:
            ipam.release_pool(pool_id.pool, space=pool_id.space)
        return {}

    def request_address(body: Body) -> Reply:
        pool_id, wanted = PoolId.parse(body.required("PoolID")), body.address("Address")
        request = ipam.request_gateway if wire.wants_gateway(body) else ipam.request_address
        return wire.address_reply(pool_id, request(pool_id, wanted))

    def release_address(body: Body) -> Reply:
        pool_id, address = PoolId.find(body.required("PoolID")), body.address("Address")
        if pool_id and address:
            gate.finish(f"release of address {address}", lambda: ipam.release_address(pool_id, address))
        return {}

    return {
        # The store remembers what it gave; a replay of it at each engine start would say nothing new.
        "IpamDriver.GetCapabilities": lambda _: {"RequiresMACAddress": False, "RequiresRequestReplay": False},
        "IpamDriver.GetDefaultAddressSpaces": lambda _: {
            "LocalDefaultAddressSpace": LOCAL_SPACE,
            "GlobalDefaultAddressSpace": GLOBAL_SPACE,
        },
        "IpamDriver.RequestPool": request_pool,
        "IpamDriver.ReleasePool": release_pool,
        "IpamDriver.RequestAddress": request_address,
        "IpamDriver.ReleaseAddress": release_address,
    }


def _nothing(_: Body) -> Reply:
    return {}
