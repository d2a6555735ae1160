"""What the `weft` command asks of the running daemon: JSON over the driver's own socket, which only root may open.

    GET  /weft/version          of the daemon, and the number of the store's schema
    GET  /weft/hosts            the hosts of the cluster
    POST /weft/hosts/forget     {"host": NAME, "force": false}: collect what a host that is gone has
    GET  /weft/gc               what is to be collected, why, and in how many seconds
    POST /weft/gc               collect what is due; the answer is what was; or, with {"entry": KEY}, delete this
                                entry of the store, which must be none of weft's (see `foreign`)
    GET  /weft/networks         the networks of the cluster; with ?name=NAME-or-VNI the one that is meant
    GET  /weft/peers            the other hosts as WireGuard sees them
    GET  /weft/links            the ways between the hosts, each direction, as `links.ProbeLink` says
    POST /weft/rotate-key       replace this host's WireGuard key
    GET  /weft/doctor           what is wrong (`doctor.Examination`); with ?peer=HOST what concerns that one
    GET  /weft/settings         those in force, by name, as texts
    GET  /weft/status           how this host's weft is (`status.Status.view`)
    POST /weft/networks         {"network": a `model.Network`'s JSON}: let this host's Docker make it
    DELETE /weft/networks?name=NAME-or-VNI  let this host's Docker remove it
    GET  /weft/addresses        the pools and their addresses; with ?name=NAME-or-VNI those of one network
    GET  /weft/endpoints        the endpoints of the cluster (`status.endpoint_views`)
    GET  /weft/plan             what would be changed in the kernel now: [{"kind", "change"}]
    GET  /weft/events           the last events; with ?after=ID those after it, with &wait=SECONDS (10 at most) waiting
                                for the next if there is none yet

A refusal is status 409 with the message under `Err`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Semaphore
from typing import Any

from flask import Blueprint, Response, jsonify, request

from weft import __version__
from weft.agent import Agent
from weft.cluster import Cluster
from weft.config import Place
from weft.doctor.examination import Doctor
from weft.encryption import Encryption
from weft.engine.inventory import Engine
from weft.engine.sweeper import Due
from weft.errors import ConfigError, Conflict, InvalidRequest, StoreError
from weft.foreign import Foreign
from weft.garbage import Garbage
from weft.hosts import Hosts, find_host
from weft.identity import LocalHost
from weft.journal import Journal
from weft.model import SCHEMA, Host, Network
from weft.networks import Networks
from weft.probes.measurements import Probes
from weft.reconcile import Contact, ObservedTunnel
from weft.status import Status, address_view, endpoint_views, host_view, network_view
from weft.store import Store
from weft.wire import Body

PREFIX = "/weft"
_PLAN_SECONDS = 20.0
_WAIT_SECONDS = 10.0
_WAITERS = 8
"""Who wait for events at once; the others are answered at once: most of the 32 threads are for the engine's calls."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Of the daemon, as far as people ask for them."""

    hosts: Hosts
    cluster: Cluster
    garbage: Garbage
    foreign: Foreign
    networks: Networks
    me: LocalHost
    encryption: Encryption
    agent: Agent
    status: Status
    journal: Journal
    probes: Probes
    doctor: Doctor
    store: Store
    engine: Engine | None
    mirrors: bool
    settings: Mapping[str, str]

    def docker(self) -> Engine:
        if self.engine is None:
            raise ConfigError(
                "weft does not use Docker's API on this host (WEFT_DOCKER=off): type docker network create -d DRIVER "
                "--ipam-driver DRIVER, or docker network rm"
            )
        return self.engine


def create_admin(parts: Parts) -> Blueprint:
    hosts, cluster, garbage, networks = parts.hosts, parts.cluster, parts.garbage, parts.networks
    me, encryption, probes = parts.me, parts.encryption, parts.probes
    waiters = Semaphore(_WAITERS)
    admin = Blueprint("admin", __name__, url_prefix=PREFIX)

    @admin.get("/version")
    def version() -> Response:
        return jsonify(version=__version__, schema=SCHEMA)

    @admin.get("/hosts")
    def list_hosts() -> Response:
        return jsonify([host_view(host, cluster) for host in sorted(hosts.all(), key=lambda host: host.name)])

    @admin.post("/hosts/forget")
    def forget() -> Response:
        body = Body.parse(request.get_data())
        host = hosts.find(body.required("host"))
        forgotten = host_view(host, cluster)
        hosts.forget(host, force=body.flag("force"))
        return jsonify(forgotten)

    @admin.get("/gc")
    def list_due() -> Response:
        return jsonify([asdict(one) for one in garbage.due()])

    @admin.post("/gc")
    def collect() -> Response:
        if entry := Body.parse(request.get_data()).text("entry"):
            return jsonify([asdict(Due(entry, parts.foreign.delete(entry), 0.0))])
        return jsonify([asdict(one) for one in garbage.collect()])

    @admin.get("/networks")
    def list_networks() -> Response:
        if name := request.args.get("name"):
            return jsonify(network_view(networks.find(name), cluster, me, encryption.describe()))
        known = sorted(cluster.networks.values(), key=lambda network: (network.name, network.vni))
        return jsonify([network_view(network, cluster, me, encryption.describe()) for network in known])

    @admin.post("/networks")
    def create_network() -> Response:
        asked = _asked(Body.parse(request.get_data()).required("network"))
        return jsonify(id=parts.docker().create(asked), mirrored=parts.mirrors)

    @admin.delete("/networks")
    def remove_network() -> Response:
        network = networks.find(request.args.get("name", ""))
        member = cluster.members.get(network.vni, {}).get(me.id)
        if member is None:
            raise Conflict(f"this host's Docker does not have {network.title}: remove it on one that has it")
        if not parts.docker().remove(member.network_id):
            users = ", ".join(sorted(map(cluster.title, cluster.local_endpoints(network.vni, me.id))))
            raise Conflict(f"{network.title} is in use on this host by {users or 'containers'}: remove them first")
        return jsonify(network_view(network, cluster, me, encryption.describe()))

    @admin.get("/addresses")
    def list_addresses() -> Response:
        name = request.args.get("name")
        cidrs = {pool.cidr for pool in networks.find(name).pools} if name else None
        return jsonify(address_view(parts.store, cluster, cidrs))

    @admin.get("/peers")
    def list_peers() -> Response:
        tunnel = encryption.observe()
        others = sorted(hosts.all(), key=lambda host: host.name)
        return jsonify([_peer(host, tunnel) for host in others if host.id != me.id])

    @admin.get("/links")
    def list_links() -> Response:
        return jsonify([link.to_json() for link in probes.links()])

    @admin.post("/rotate-key")
    def rotate_key() -> Response:
        return jsonify({"key": encryption.rotate()})

    @admin.get("/doctor")
    def examine() -> Response:
        peer = request.args.get("peer")
        about = find_host(list(cluster.hosts.values()), peer) if peer else None  # the store may be away
        found = parts.doctor.examine()
        return jsonify((found.about(about.name) if about else found).to_json())

    @admin.get("/settings")
    def settings() -> Response:
        return jsonify(parts.settings)

    @admin.get("/status")
    def status() -> Response:
        with suppress(StoreError):
            parts.foreign.check()
        return jsonify(parts.status.view())

    @admin.get("/endpoints")
    def list_endpoints() -> Response:
        return jsonify(endpoint_views(cluster))

    @admin.get("/plan")
    def plan() -> Response:
        found = parts.agent.preview(_PLAN_SECONDS)
        return jsonify([{"kind": kind, "change": change} for kind, change in found])

    @admin.get("/events")
    def events() -> Response:
        after = request.args.get("after", 0, type=int)
        wait = min(request.args.get("wait", 0.0, type=float), _WAIT_SECONDS)
        if not (wait and waiters.acquire(blocking=False)):
            return jsonify([asdict(one) for one in parts.journal.after(after)])
        try:
            return jsonify([asdict(one) for one in parts.journal.after(after, wait=wait)])
        finally:
            waiters.release()

    return admin


def _asked(text: str) -> Network:
    try:
        network = Network.decode(text)
        network.check()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequest(f"that is no network: {error}") from error
    return network


def _peer(host: Host, tunnel: ObservedTunnel | None) -> dict[str, Any]:
    """:return: `handshake` in Unix time, 0 if there was none; `state` says what is missing."""
    seen = {peer.key: peer for peer in tunnel.tunnel.peers} if tunnel else {}
    peer, contact = seen.get(host.wg_key), tunnel.contacts.get(host.wg_key) if tunnel else None
    state = "peer" if peer else "not a peer of this host" if host.can_encrypt else "has no encrypted network"
    return {
        "host": host.name,
        "id": host.id,
        "address": host.wg_address,
        "key": host.wg_key,
        "endpoint": str(Place(peer.endpoint, peer.port)) if peer else "",
        "state": state,
        **asdict(contact or Contact()),
        "backend": tunnel.backend if tunnel else "",
    }
