"""Hosts that have nothing but IPv6 between them, and containers that have it too."""

from __future__ import annotations

import json
import re

import pytest

from lab.process import LabError
from tests.engine.asking import Inside
from tests.engine.conftest import Cluster, arp_questions, eventually, reaches, refusal
from tests.engine.traffic import send

UNDERLAY = "fd78::/64"
OVERLAY = ("--ipv6", "--subnet", "fd00:77::/64")
MINE = "fd00:77::99"


def pair(cluster: Cluster, *options: str) -> tuple[str, str]:
    """web1 on h1, web2 with an IPv6 address of the user's on h2; their IPv4 addresses."""
    cluster.network("app", *OVERLAY, *options, subnet="10.77.0.0/24")
    return cluster.run(cluster.h1, "web1", "app"), cluster.run(cluster.h2, "web2", "app", "--ip6", MINE)


def test_both_families_cross_an_underlay_of_ipv6_alone(cluster: Cluster) -> None:
    first, second = pair(cluster)
    assert not cluster.h1.run("ip", "-4", "addr", "show", "dev", "eth0")
    with cluster.h2.capture("udp port 4789") as lines:
        assert reaches(cluster.h1, "web1", second, "-s", "1402")
        eventually(lambda: reaches(cluster.h1, "web1", MINE, "-6", "-s", "1382"), "IPv6 across hosts")
    text = "\n".join(lines)
    assert re.search(rf"{cluster.h1.address}\.\d+ > {cluster.h2.address}\.4789: VXLAN", text)
    assert f"> {MINE}: ICMP6, echo request" in text
    assert "frag" not in text  # 1430 is what fits
    assert not arp_questions(lines)  # both are answered on h1
    assert f"who has {MINE}" not in text
    assert cluster.h1.docker("exec", "web1", "cat", "/sys/class/net/eth0/mtu") == "1430"

    cluster.h1.docker("exec", "-d", "web1", "iperf3", "-s", "-1")
    eventually(lambda: "5201" in cluster.h1.docker("exec", "web1", "netstat", "-ltn"), "iperf3 listens")
    report = json.loads(cluster.h2.docker("exec", "web2", "iperf3", "-J", "-n", "20M", "-c", first))
    assert report["end"]["sum_received"]["bytes"] > 5e6


def test_tcp_gets_through_a_narrow_path(cluster: Cluster) -> None:
    """An IPv6 router cuts nothing up: it tells the tunnel's host, whose kernel tells the container."""
    first, _ = pair(cluster)
    h1, h2 = cluster.h1, cluster.h2
    h1.route_over_switch(h2, mtu=1400)
    h2.route_over_switch(h1, mtu=1400)
    try:
        for address in (first, cluster.address(h1, "web1", "app", field="GlobalIPv6Address")):
            send(h2, "web2", h1, "web1", address)
    finally:
        h1.route_directly(h2)
        h2.route_directly(h1)


def test_an_ipv6_address_is_the_users_and_names_lead_to_it(cluster: Cluster, inside: Inside) -> None:
    _, second = pair(cluster)
    assert cluster.address(cluster.h2, "web2", "app", field="GlobalIPv6Address") == MINE
    ask = inside(cluster.h1, "web1")
    assert ask("web2", "AAAA", until="answered").answers == [MINE]
    assert ask("web2", "A").answers == [second]
    assert f"address {MINE} of network app" in refusal(
        cluster.h2, "run", "-d", "--network", "app", "--ip6", MINE, "weft-lab"
    )


def test_an_encrypted_network_over_ipv6(cluster: Cluster) -> None:
    first, second = pair(cluster, "-o", "encrypted")
    eventually(lambda: reaches(cluster.h1, "web1", second), "ping across")
    with cluster.h2.capture("ip6 and udp and not port 53") as lines:
        assert reaches(cluster.h1, "web1", second, "-s", "1342")
    text = "\n".join(lines)
    assert re.search(rf"{cluster.h1.address}\.51820 > {cluster.h2.address}\.51820: UDP", text)
    assert "VXLAN" not in text
    assert "frag" not in text
    assert first not in text
    assert cluster.h1.docker("exec", "web1", "cat", "/sys/class/net/eth0/mtu") == "1370"  # 1500 - 50 - 80


def test_one_family_for_all_hosts(cluster: Cluster) -> None:
    """h2 gets IPv4 as well, and stays with what the others have; made to use it, it is refused; then all change."""
    _, second = pair(cluster)
    h1, h2 = cluster.h1, cluster.h2
    for number, host in enumerate((h1, h2), start=1):
        host.run("ip", "addr", "add", f"192.168.78.{number}/24", "dev", "eth0")
    h2.restart_weft()
    assert h2.address in h2.ask_weft("host", "ls")
    assert reaches(h1, "web1", second)

    h2.stop_weft()
    with pytest.raises(LabError) as refused:
        h2.start_weft({"WEFT_UNDERLAY_FAMILY": "ipv4"})
    assert "192.168.78.2 of this host is IPv4, but that of host h1 (" in str(refused.value)
    assert f"{h1.address}) is IPv6" in str(refused.value)
    assert reaches(h1, "web1", second)  # nothing was changed by that

    h1.stop_weft()
    for host in (h1, h2):
        host.start_weft({"WEFT_UNDERLAY_FAMILY": "ipv4"})
    with h2.capture("udp port 4789") as lines:
        eventually(lambda: reaches(h1, "web1", second), "ping across by IPv4")
    assert re.search(r"192\.168\.78\.1\.\d+ > 192\.168\.78\.2\.4789: VXLAN", "\n".join(lines))
