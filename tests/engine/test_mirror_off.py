"""With WEFT_MIRROR=off every host's networks are its own affair: joined by subnet or by name."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing

from tests.engine.conftest import Cluster, eventually, reaches

SETTINGS = {"WEFT_MIRROR": "off"}
CREATE = ("network", "create", "-d", "weft", "--ipam-driver", "weft")


def test_nothing_is_made_or_removed_elsewhere(cluster: Cluster) -> None:
    for host in cluster.lab.hosts:
        host.docker(*CREATE, "--subnet", "10.77.0.0/24", "app")
    cluster.h1.docker(*CREATE, "--subnet", "10.78.0.0/24", "other")
    eventually(lambda: names(cluster) == ["app", "other"], "weft learns the names")
    cluster.h1.docker("network", "rm", "app")
    time.sleep(1)  # nothing may happen, so there is nothing to wait for
    assert cluster.networks(cluster.h1) == ["other"]
    assert cluster.networks(cluster.h2) == ["app"]
    assert not cluster.keys("names/")


def test_a_network_is_joined_by_name(cluster: Cluster) -> None:
    cluster.h1.docker(*CREATE, "app")
    eventually(lambda: names(cluster) == ["app"], "weft learns the network's name")
    cluster.h2.docker(*CREATE, "--ipam-opt", "weft.network=app", "-o", "weft.network=app", "app")
    first = cluster.run(cluster.h1, "web1", "app")
    cluster.run(cluster.h2, "web2", "app")
    assert reaches(cluster.h2, "web2", first)


def names(cluster: Cluster) -> list[str]:
    """Of the networks in the store."""
    with closing(sqlite3.connect(f"file:{cluster.lab.plan.data}/store.db?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT value FROM entries WHERE key LIKE 'topology/networks/%'")
        return sorted(json.loads(value)["name"] for (value,) in rows)
