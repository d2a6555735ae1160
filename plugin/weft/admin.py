"""What the `weft` command asks of the running daemon: JSON over the driver's own socket, which only root may open.

    GET  /weft/version          of the daemon, and the number of the store's schema
    GET  /weft/hosts            the hosts of the cluster
    POST /weft/hosts/forget     {"host": NAME, "force": false}: collect what a host that is gone has
    GET  /weft/gc               what is to be collected, why, and in how many seconds
    POST /weft/gc               collect what is due; the answer is what was

A refusal is status 409 with the message under `Err`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flask import Blueprint, Response, jsonify, request

from weft import __version__
from weft.cluster import Cluster
from weft.garbage import Garbage
from weft.hosts import Hosts
from weft.model import SCHEMA, Host
from weft.wire import Body

PREFIX = "/weft"


def create_admin(hosts: Hosts, cluster: Cluster, garbage: Garbage) -> Blueprint:
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

    return admin


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
