"""What the `weft` command asks of the running daemon: JSON over the driver's own socket, which only root may open.

    GET  /weft/version          of the daemon, and the number of the store's schema
    GET  /weft/hosts            the hosts of the cluster
    POST /weft/hosts/forget     {"host": NAME, "force": false}: collect what a host that is gone has
    GET  /weft/gc               what is to be collected, why, and in how many seconds
    POST /weft/gc               collect what is due; the answer is what was
    GET  /weft/networks         the networks of the cluster; with ?name=NAME-or-VNI the one that is meant
    GET  /weft/peers            the other hosts as WireGuard sees them
    GET  /weft/links            the ways between the hosts, each direction, as `links.ProbeLink` says
    POST /weft/rotate-key       replace this host's WireGuard key

A refusal is status 409 with the message under `Err`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flask import Blueprint, Response, jsonify, request

from weft import __version__, topology
from weft.cluster import Cluster
from weft.driver import Driver
from weft.encryption import Encryption
from weft.garbage import Garbage
from weft.hosts import Hosts
from weft.identity import LocalHost
from weft.model import SCHEMA, Host, Network
from weft.probes import Probes
from weft.reconcile import Contact, ObservedTunnel
from weft.wire import Body

PREFIX = "/weft"


def create_admin(
    hosts: Hosts,
    cluster: Cluster,
    garbage: Garbage,
    driver: Driver,
    me: LocalHost,
    encryption: Encryption,
    probes: Probes,
) -> Blueprint:
    admin = Blueprint("admin", __name__, url_prefix=PREFIX)

    @admin.get("/version")
    def version() -> Response:
        return jsonify(version=__version__, schema=SCHEMA)

    @admin.get("/hosts")
    def list_hosts() -> Response:
        return jsonify([_host(host, cluster) for host in sorted(hosts.all(), key=lambda host: host.name)])

    @admin.post("/hosts/forget")
    def forget() -> Response:
        body = Body.parse(request.get_data())
        host = hosts.find(body.required("host"))
        forgotten = _host(host, cluster)
        hosts.forget(host, force=body.flag("force"))
        return jsonify(forgotten)

    @admin.get("/gc")
    def list_due() -> Response:
        return jsonify([asdict(one) for one in garbage.due()])

    @admin.post("/gc")
    def collect() -> Response:
        return jsonify([asdict(one) for one in garbage.collect()])

    @admin.get("/networks")
    def list_networks() -> Response:
        if name := request.args.get("name"):
            return jsonify(_network(driver.find_network(name), cluster, me, encryption))
        networks = sorted(cluster.networks.values(), key=lambda network: (network.name, network.vni))
        return jsonify([_network(network, cluster, me, encryption) for network in networks])

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

    return admin


def _network(network: Network, cluster: Cluster, me: LocalHost, encryption: Encryption) -> dict[str, Any]:
    endpoints = list(cluster.endpoints.get(network.vni, {}).values())
    return {
        "name": network.name,
        "vni": network.vni,
        "subnets": [pool.cidr for pool in network.pools],
        "mtu": network.mtu,
        "internal": network.internal,
        "creator": network.creator,
        "retired": network.retired,
        "encrypted": encryption.describe() if network.encrypted else "no",
        "endpoints": len(endpoints),
        "hosts": sorted({_name(cluster, endpoint.host) for endpoint in endpoints}),
        "unencryptable": sorted(_unencryptable(network, cluster, me)),
    }


def _unencryptable(network: Network, cluster: Cluster, me: LocalHost) -> Iterator[str]:
    """Hosts with endpoints of an encrypted network that nothing can be sent to."""
    if network.encrypted:
        keys = {peer.key for peer in topology.peers(cluster, me.host)}
        for one in cluster.hosts_of(network.vni) - {me.id}:
            host = cluster.hosts.get(one)
            if host is None or host.wg_key not in keys:
                yield _name(cluster, one)


def _name(cluster: Cluster, host_id: str) -> str:
    host = cluster.hosts.get(host_id)
    return host.name if host else host_id[:12]


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
        "endpoint": f"{_bracketed(peer.endpoint)}:{peer.port}" if peer else "",
        "state": state,
        **asdict(contact or Contact()),
        "backend": tunnel.backend if tunnel else "",
    }


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _host(host: Host, cluster: Cluster) -> dict[str, Any]:
    endpoints = (cluster.local_endpoints(vni, host.id) for vni in cluster.local_networks(host.id))
    return {
        "id": host.id,
        "name": host.name,
        "underlay": host.underlay,
        "version": host.version,
        "alive": host.id in cluster.alive,
        "endpoints": sum(map(len, endpoints)),
    }
