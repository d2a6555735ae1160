"""What networks carry, and how: MTU, and the options of `docker network create`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from lab import Host
from lab.host import PLUGIN_SOCKET
from tests.engine.conftest import Cluster, eventually, reaches, refusal
from tests.engine.traffic import send
from weft import cli

SUBNET = "10.77.0.0/24"
HOLD = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.bind(("", 53053))
    print("bound", flush=True)
    sys.stdin.read()
"""
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
        eventually(partial(fits, host, mtu), f"MTU {mtu} on {host.name}", timeout=30)


def fits(host: Host, mtu: int) -> bool:
    return bool(inspect(host, "app")["fitting_mtu"] == mtu)


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
    send(h1, "big1", h2, "big2", big)
    send(h1, "small1", h2, "small2", small)
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
            send(cluster.h1, "web1", cluster.h2, "web2", second)
        assert fragments
        send(cluster.h2, "web2", cluster.h1, "web1", first)
    finally:
        cluster.h1.route_directly(cluster.h2)
        cluster.h2.route_directly(cluster.h1)


@pytest.fixture
def probing(mended: Cluster) -> Iterator[Cluster]:
    hosts = mended.lab.hosts
    for host in hosts:
        host.stop_weft()
        host.start_weft({"WEFT_PROBE_INTERVAL": "1"})
    yield mended
    for host in hosts:
        host.run("ip", "link", "set", "eth0", "gso_max_segs", "65535")
        host.restart_weft()


def test_new_containers_fit_through_a_switch_that_drops_what_is_large(probing: Cluster) -> None:
    cluster, h1, h2 = probing, probing.h1, probing.h2
    cluster.network("app", subnet=SUBNET)
    cluster.network("chosen", "-o", "mtu=1450", subnet="10.78.0.0/24")
    cluster.run(h1, "old1", "app")
    old = cluster.run(h2, "old2", "app")
    cluster.run(h1, "chosen1", "chosen")
    for host in (h1, h2):  # no bundles of TCP packets: the lab's switch would let them pass
        host.run("ip", "link", "set", "eth0", "gso_max_segs", "1")
    h1.narrow_path(1400)
    assert not reaches(h1, "old1", old, "-s", "1422")

    fits = 1354  # a bridge grants a VLAN tag's four bytes more
    for host in (h1, h2):
        eventually(lambda host=host: inspect(host, "app")["fitting_mtu"] == fits, host.name, timeout=60)  # type: ignore[misc]
    words = "these containers keep another: old1 (1450)"
    eventually(lambda: words in h1.log("weft"), "running ones are named")
    assert inspect(h1, "app")["other_mtu"] == {"old1": 1450, "old2": 1450}
    eventually(lambda: "was made with mtu=1450, but only 1354 gets through" in h1.log("weft"), "the user's choice")
    first, second = cluster.run(h1, "new1", "app"), cluster.run(h2, "new2", "app")
    assert mtu_of(h1, "new1") == mtu_of(h2, "new2") == fits
    assert reaches(h1, "new1", second, "-s", str(fits - 28))
    send(h1, "new1", h2, "new2", second)
    send(h2, "new2", h1, "new1", first)

    h1.narrow_path(1500)
    for host in (h1, h2):
        eventually(lambda host=host: inspect(host, "app")["fitting_mtu"] == 1450, host.name, timeout=60)  # type: ignore[misc]


CHOSEN = {
    "port": "14789",
    "source-ports": "40000-40999",
    "ttl": "9",
    "dscp": "46",
    "udp-checksum": "off",
    "multicast": "off",
    "ifname": "app",
}


def options(chosen: dict[str, str]) -> list[str]:
    return [word for name, value in chosen.items() for word in ("-o", f"weft.{name}={value}")]


def test_what_a_network_is_carried_by_is_the_users(cluster: Cluster) -> None:
    """Other ports, TTL and DSCP are on the wire; the container's interface has the name; multicast stays here."""
    cluster.network("app", *options(CHOSEN), subnet=SUBNET)
    h1, h2 = cluster.h1, cluster.h2
    cluster.run(h1, "web1", "app", "--mac-address", "02:11:22:33:44:55")
    second = cluster.run(h2, "web2", "app")
    assert inspect(h2, "app")["options"] == CHOSEN
    assert "multicast=off port=14789 source-ports=40000-40999 ttl=9" in h1.ask_weft("network", "inspect", "app")
    shown = h1.docker("exec", "web1", "ip", "link", "show", "app0")
    assert "02:11:22:33:44:55" in shown

    with h2.capture("udp port 14789 and udp[6:2] == 0", "-v", "-T", "vxlan") as lines:  # without a checksum
        assert reaches(h1, "web1", second)
        h1.docker("exec", "web1", "ping", "-c", "1", "-W", "1", "-I", "app0", "224.0.0.1", check=False)
    text = " ".join(" ".join(lines).split())
    outer = re.search(rf"tos 0xb8, ttl 9, .*?\) {h1.address}\.(\d+) > {h2.address}\.14789: VXLAN", text)
    assert outer, text
    assert 40000 <= int(outer[1]) <= 40999
    assert "224.0.0.1" not in text

    vxlan = f"vx{inspect(h1, 'app')['vni']}"
    h1.dataplane("ip", "link", "set", vxlan, "type", "vxlan", "ttl", "5")  # somebody meddles
    eventually(lambda: "ttl 9" in h1.dataplane("ip", "-d", "link", "show", vxlan), "it is put right")
    assert "(ttl is 5)" in h1.log("weft")


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"port": "51820"}, "option port=51820: that is WireGuard's on host h1 (WEFT_WG_PORT)"),
        ({"port": "53053"}, "another program has that UDP port on host h1"),
        ({"source-ports": "1"}, "must be LOW-HIGH"),
        ({"ttl": "256"}, "must be a number from 1 to 255"),
        ({"ifname": "e/h"}, "must be a letter and up to 11"),
    ],
)
def test_what_cannot_be_is_refused(cluster: Cluster, chosen: dict[str, str], words: str) -> None:
    create = ["network", "create", "-d", "weft", "--ipam-driver", "weft", "--subnet", SUBNET, *options(chosen), "app"]
    with_server = [sys.executable, "-c", HOLD]
    with subprocess.Popen(cluster.h1.enter(with_server), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stdout.readline()
        assert words in refusal(cluster.h1, *create)
        holder.stdin.close()
    assert not cluster.keys("topology/networks/")


def test_a_network_that_is_there_has_its_options(cluster: Cluster) -> None:
    cluster.network("app", *options({"ttl": "9"}), subnet=SUBNET)
    create = ["network", "create", "-d", "weft", "--ipam-driver", "weft", "--subnet", SUBNET]
    words = refusal(cluster.h2, *create, *options({"ttl": "8", "multicast": "off"}), "other")
    assert "its ttl is 9, not 8; its multicast is on, not off" in words
