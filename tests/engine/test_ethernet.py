"""What networks carry, and how: MTU, and the options of `docker network create`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from lab import Host
from lab.host import PLUGIN_SOCKET
from tests.engine.conftest import Cluster, eventually, reaches, refusal
from weft import cli

SUBNET = "10.77.0.0/24"
JUMBO = 9000


def mtu_of(host: Host, container: str) -> int:
    return int(host.docker("exec", container, "cat", "/sys/class/net/eth0/mtu"))


def inspect(host: Host, network: str) -> dict[str, Any]:
    """What `weft network inspect` asks for, without a process for it."""
    found: dict[str, Any] = cli.ask(host.root / PLUGIN_SOCKET[1:], "GET", f"/weft/networks?name={network}")
    return found


def await_mtu(cluster: Cluster, mtu: int) -> None:
    """Until new containers get this one on all hosts."""
    for host in cluster.lab.hosts:
        eventually(lambda host=host: inspect(host, "app")["fitting_mtu"] == mtu, f"MTU {mtu} on {host.name}")  # type: ignore[misc]


def sends(sender: Host, container: str, receiver: Host, other: str, address: str) -> float:
    """Bits per second that TCP takes from one container to another."""
    receiver.docker("exec", "-d", other, "iperf3", "-s", "-1")
    eventually(lambda: "5201" in receiver.docker("exec", other, "netstat", "-ltn"), "iperf3 listens")
    command = ["exec", container, "iperf3", "-J", "-n", "4M", "-c", address]
    report = json.loads(sender.docker(*command, timeout=30))
    assert report["end"]["sum_received"]["bytes"] > 2e6
    return float(report["end"]["sum_received"]["bits_per_second"])


@pytest.fixture
def mended(cluster: Cluster) -> Iterator[Cluster]:
    yield cluster
    for host in cluster.lab.hosts:
        host.set_mtu(1500)


def test_the_mtu_follows_the_underlay_of_all_hosts(mended: Cluster) -> None:
    cluster, h1, h2 = mended, mended.h1, mended.h2
    cluster.network("app", subnet=SUBNET)
    cluster.run(h1, "small1", "app")
    small = cluster.run(h2, "small2", "app")
    assert mtu_of(h1, "small1") == 1450

    h1.set_mtu(JUMBO)  # alone, it changes nothing
    eventually(lambda: "underlay's MTU changed from 1500 to 9000" in h1.log("weft"), "h1 has seen it")
    assert inspect(h1, "app")["fitting_mtu"] == 1450
    h2.set_mtu(JUMBO)
    await_mtu(cluster, 8950)
    cluster.run(h1, "big1", "app")
    big = cluster.run(h2, "big2", "app")
    assert (mtu_of(h1, "big1"), mtu_of(h1, "small1")) == (8950, 1450)
    eventually(lambda: reaches(h1, "big1", big, "-s", "8922"), "a large packet")
    assert inspect(h2, "app")["other_mtu"] == {"small1": 1450, "small2": 1450}
    words = "these containers keep another: small1 (1450)"
    eventually(lambda: words in h1.log("weft"), "it is said")
    words = "9000 does not fit: 8950 is the most that the underlay of host h"
    create = ["network", "create", "-d", "weft", "--ipam-driver", "weft"]
    assert words in refusal(h1, *create, "-o", "mtu=9000", "other")

    for host in (h1, h2):  # smaller again: those with the large one are told what fits
        host.set_mtu(1400)
    await_mtu(cluster, 1350)
    assert mtu_of(h1, "big1") == 8950
    assert sends(h1, "big1", h2, "big2", big) > 1e6
    assert sends(h1, "small1", h2, "small2", small) > 1e6
    h1.docker("restart", "-t", "1", "big1")
    assert mtu_of(h1, "big1") == 1350
    assert inspect(h1, "app")["other_mtu"] == {"small1": 1450, "small2": 1450, "big2": 8950}


def test_the_mtu_of_a_route_counts(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    cluster.h1.run("ip", "route", "add", cluster.h2.address, "dev", "eth0", "mtu", "1420")
    await_mtu(cluster, 1370)
    assert "h1 carries" in refusal(
        cluster.h2, "network", "create", "-d", "weft", "--ipam-driver", "weft", "-o", "mtu=1400", "other"
    )
    cluster.h1.run("ip", "route", "del", cluster.h2.address)
    await_mtu(cluster, 1450)


def test_tcp_gets_through_a_narrow_path(cluster: Cluster) -> None:
    """No host can see that a router in the middle carries 1400 bytes only. It cuts up what the tunnels send."""
    cluster.network("app", subnet=SUBNET)
    first, second = cluster.run(cluster.h1, "web1", "app"), cluster.run(cluster.h2, "web2", "app")
    cluster.h1.route_over_switch(cluster.h2, mtu=1400)
    cluster.h2.route_over_switch(cluster.h1, mtu=1400)
    try:
        with cluster.h2.capture("ip[6:2] & 0x1fff != 0") as fragments:
            assert sends(cluster.h1, "web1", cluster.h2, "web2", second) > 1e6
        assert fragments
        assert sends(cluster.h2, "web2", cluster.h1, "web1", first) > 1e6
    finally:
        cluster.h1.route_directly(cluster.h2)
        cluster.h2.route_directly(cluster.h1)
