"""What a user does with `docker` on two hosts, and sees."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.engine.conftest import Cluster, arp_questions, eventually, reaches, refusal

SUBNET = "10.77.0.0/24"

LISTEN = """
import socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 7777))
membership = struct.pack("4s4s", socket.inet_aton("239.1.2.3"), socket.inet_aton(sys.argv[1]))
s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
s.settimeout(10)
print("listening", flush=True)
print(s.recvfrom(100)[0].decode())
"""
SAY = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))
s.bind((sys.argv[1], 0))
s.sendto(b"hello", (sys.argv[2], 7777))
"""


def two_containers(cluster: Cluster, *options: str, subnet: str = SUBNET) -> tuple[str, str]:
    cluster.network("app", *options, subnet=subnet)
    return cluster.run(cluster.h1, "web1", "app"), cluster.run(cluster.h2, "web2", "app")


def test_containers_on_two_hosts_ping_each_other(cluster: Cluster) -> None:
    first, second = two_containers(cluster)
    assert reaches(cluster.h1, "web1", second)
    assert reaches(cluster.h2, "web2", first)
    assert cluster.h1.docker("network", "inspect", "--format", "{{.Driver}}", "app") == "weft"


def test_a_packet_on_the_underlay_has_the_networks_vni(cluster: Cluster) -> None:
    first, second = two_containers(cluster, "-o", "weft.vni=4242")
    with cluster.h2.capture("udp port 4789") as lines:
        assert reaches(cluster.h1, "web1", second)
    text = " ".join(lines)
    assert re.search(rf"{cluster.h1.address}\.\d+ > {cluster.h2.address}\.4789: VXLAN.* vni 4242", text)
    assert f"{first} > {second}: ICMP echo request" in text


def test_arp_for_known_containers_never_crosses_the_underlay(cluster: Cluster) -> None:
    first, second = two_containers(cluster)
    assert reaches(cluster.h1, "web1", second)
    cluster.h1.exec_in_container_netns("web1", "ip", "neigh", "flush", "dev", "eth0")
    with cluster.h2.capture("udp port 4789") as lines:
        assert reaches(cluster.h1, "web1", second)
        assert reaches(cluster.h2, "web2", first)
    assert not arp_questions(lines)


def test_tcp_of_full_size_crosses(cluster: Cluster) -> None:
    first, _ = two_containers(cluster)
    cluster.h1.docker("exec", "-d", "web1", "iperf3", "-s", "-1")
    eventually(lambda: "5201" in cluster.h1.docker("exec", "web1", "netstat", "-ltn"), "iperf3 listens")
    report = json.loads(cluster.h2.docker("exec", "web2", "iperf3", "-J", "-n", "20M", "-c", first))
    assert report["end"]["sum_received"]["bytes"] > 5e6  # the receiver stops counting when the sender has sent all
    assert reaches(cluster.h2, "web2", first, "-s", "1422")


def test_multicast_and_broadcast_reach_the_other_host(cluster: Cluster) -> None:
    first, second = two_containers(cluster)
    pid = cluster.h2.docker("inspect", "--format", "{{.State.Pid}}", "web2")
    for group in ("239.1.2.3", "10.77.0.255"):
        argv = cluster.h2.enter(["nsenter", "-t", pid, "-n", "--", sys.executable, "-c", LISTEN, second])
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as listener:
            assert listener.stdout
            assert listener.stdout.readline() == "listening\n"
            cluster.h1.exec_in_container_netns("web1", sys.executable, "-c", SAY, first, group)
            assert listener.stdout.readline() == "hello\n", group


def test_ports_are_published_and_the_outside_is_reached(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    cluster.run(cluster.h1, "web1", "app", "-p", "8080:80")
    cluster.h1.docker("exec", "web1", "sh", "-c", "echo here is web1 > /tmp/index.html; httpd -h /tmp")
    fetch = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=10).read().decode().strip())"
    assert cluster.h2.run(sys.executable, "-c", fetch, f"http://{cluster.h1.address}:8080/") == "here is web1"
    assert reaches(cluster.h1, "web1", cluster.h2.address)
    assert cluster.h1.docker("port", "web1")


def test_address_and_mac_are_the_users(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    cluster.run(cluster.h1, "web1", "app", "--ip", "10.77.0.50", "--mac-address", "02:11:22:33:44:55")
    cluster.run(cluster.h2, "web2", "app")
    assert cluster.address(cluster.h1, "web1", "app") == "10.77.0.50"
    assert cluster.address(cluster.h1, "web1", "app", field="MacAddress") == "02:11:22:33:44:55"
    assert reaches(cluster.h2, "web2", "10.77.0.50")


def test_an_internal_network_has_no_way_out_but_to_its_own(cluster: Cluster) -> None:
    first, _ = two_containers(cluster, "--internal")
    assert reaches(cluster.h2, "web2", first)
    assert not reaches(cluster.h2, "web2", cluster.h1.address)
    assert "default" not in cluster.h1.docker("exec", "web1", "ip", "route")


def test_a_dual_stack_network_and_nd_suppression(cluster: Cluster) -> None:
    cluster.network("app", "--ipv6", "--subnet", "fd00:77::/64", subnet=SUBNET)
    cluster.run(cluster.h1, "web1", "app")
    cluster.run(cluster.h2, "web2", "app")
    there = cluster.address(cluster.h2, "web2", "app", field="GlobalIPv6Address")
    assert there.startswith("fd00:77::")
    with cluster.h2.capture("udp port 4789") as lines:
        eventually(lambda: reaches(cluster.h1, "web1", there, "-6"), "IPv6 across hosts")
    assert any("echo request" in line for line in lines)
    assert not [line for line in lines if f"who has {there}" in line]


def test_several_networks_and_connect_and_disconnect_while_running(cluster: Cluster) -> None:
    two_containers(cluster)
    cluster.network("back", subnet="10.78.0.0/24")
    there = cluster.run(cluster.h2, "db", "back")
    assert not reaches(cluster.h1, "web1", there)
    cluster.h1.docker("network", "connect", "back", "web1")
    assert reaches(cluster.h1, "web1", there)
    cluster.h1.docker("restart", "-t", "1", "web1")
    assert reaches(cluster.h1, "web1", there)
    cluster.h1.docker("network", "disconnect", "back", "web1")
    assert not reaches(cluster.h1, "web1", there)


def test_a_restarted_container_is_reached_at_once(cluster: Cluster) -> None:
    two_containers(cluster)
    for _ in range(3):
        cluster.h1.docker("restart", "-t", "1", "web1")
        assert reaches(cluster.h2, "web2", cluster.address(cluster.h1, "web1", "app"))


def test_a_subnet_is_chosen_when_none_is_given(cluster: Cluster) -> None:
    cluster.network("app")
    first, second = cluster.run(cluster.h1, "web1", "app"), cluster.run(cluster.h2, "web2", "app")
    assert first.startswith("10.64.")
    assert second.rsplit(".", 1)[0] == first.rsplit(".", 1)[0]
    assert reaches(cluster.h2, "web2", first)


def test_ip_range_gateway_and_auxiliary_addresses(cluster: Cluster) -> None:
    options = ["--ip-range", "10.77.0.64/30", "--gateway", "10.77.0.9", "--aux-address", "router=10.77.0.65"]
    cluster.network("app", *options, subnet=SUBNET)
    addresses = {cluster.run(cluster.h1, f"web{n}", "app") for n in range(3)}
    assert addresses == {"10.77.0.64", "10.77.0.66", "10.77.0.67"}
    assert refusal(cluster.h2, "run", "-d", "--network", "app", "weft-lab").count("3 of 3 addresses in use")


def test_nothing_is_left_when_all_is_removed(cluster: Cluster) -> None:
    before = cluster.keys()
    first, _ = two_containers(cluster)
    assert reaches(cluster.h2, "web2", first)
    cluster.h1.docker("rm", "-f", "web1")
    eventually(lambda: not cluster.h2.dataplane("ip", "neigh", "show", "nud", "permanent"), "web1 is forgotten on h2")
    cluster.clean()
    assert cluster.keys() == before
    for host in cluster.lab.hosts:
        eventually(lambda host=host: not cluster.links(host), f"the data plane of {host.name} is empty")  # type: ignore[misc]
        assert "wc" not in host.run("ip", "-o", "link")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-d", "weft"], "type docker network create -d weft --ipam-driver weft --subnet"),
        (["-d", "weft", "--ipam-driver", "weft", "-o", "colour=red"], "weft knows weft.vni, weft.mtu, weft.network"),
        (
            ["-d", "weft", "--ipam-driver", "weft", "-o", "weft.mtu=9000"],
            "1450 is the most that the underlay of",
        ),
        (["-d", "weft", "--ipam-driver", "weft", "-o", "mtu=999", "--ipv6", "--subnet", "fd00:7::/64"], "needs 1280"),
        (["-d", "weft", "--ipam-driver", "weft", "-o", "weft.vni=0"], "must be a number from 1 to 16777215"),
        (["-d", "weft", "--ipam-driver", "weft", "-o", "weft.network=nil"], "there is no weft network 'nil'"),
        (["-d", "weft", "--ipam-driver", "weft", "--subnet", "10.77.0.0/25"], "overlaps 10.77.0.0/24 of network"),
        (["-d", "weft", "--ipam-driver", "weft", "--subnet", SUBNET, "--internal"], "it is not internal"),
        (["-d", "weft", "--ipam-driver", "weft", "--subnet", SUBNET, "--gateway", "10.77.0.7"], "--gateway 10.77.0.1"),
    ],
)
def test_a_refusal_says_what_to_do_and_leaves_nothing(cluster: Cluster, options: list[str], words: str) -> None:
    cluster.network("app", subnet=SUBNET)
    before = cluster.keys()
    assert words in refusal(cluster.h2, "network", "create", *options, "other")
    assert cluster.keys() == before


def test_an_address_that_another_host_has_is_refused_with_its_holder(cluster: Cluster) -> None:
    first, _ = two_containers(cluster)
    words = refusal(cluster.h2, "run", "-d", "--network", "app", "--ip", first, "weft-lab")
    assert "on host h1 has it" in words
    words = refusal(cluster.h1, "run", "-d", "--network", "app", "--ip", first, "weft-lab")
    assert f"address {first}" in words
    assert reaches(cluster.h2, "web2", first)
