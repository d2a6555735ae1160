"""Encrypted networks on real engines."""

from __future__ import annotations

from tests.engine.conftest import Cluster, eventually, reaches

SUBNET = "10.78.0.0/24"


def test_containers_of_an_encrypted_network_reach_each_other_by_wireguard_only(cluster: Cluster) -> None:
    cluster.network("secret", "-o", "encrypted", subnet=SUBNET)
    cluster.run(cluster.h1, "web1", "secret")
    second = cluster.run(cluster.h2, "web2", "secret")
    with cluster.h2.capture("ip") as lines:
        eventually(lambda: reaches(cluster.h1, "web1", second), "ping")
    print("\n".join(lines))
    assert 0
