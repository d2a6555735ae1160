"""Beside the firewalls that hosts have: what passes, what the doctor says of it, and that nothing leaks.

One lab for all. The tests are in an order that starts engines anew as rarely as can be.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from lab.capture import tcpdump
from lab.firewalls import (
    disable_ufw,
    enable_ufw,
    replace_docker_rules,
    start_firewalld,
    stop_firewalld,
    use_legacy_iptables,
)
from lab.host import PLUGIN_SOCKET
from lab.process import all_at_once
from tests.engine.conftest import Cluster, eventually, reaches
from tests.engine.traffic import pings
from weft import cli

pytestmark = pytest.mark.skipif(
    not (shutil.which("ufw", path="/usr/sbin") and shutil.which("firewalld", path="/usr/sbin")),
    reason="ufw or firewalld is not installed: run lab/setup.sh",
)

VXLAN, WIREGUARD = 4789, 51820
SUBNETS = {"plain": "10.77.0.0/24", "secret": "10.78.0.0/24"}

_SUBNET = "{{(index .IPAM.Config 0).Subnet}}"
_INJECT = """
import socket, sys
address, (port, vni) = sys.argv[1], map(int, sys.argv[2:])
frame = b"\\xff" * 6 + bytes.fromhex("024200000001") + b"\\x88\\xb5" + bytes(60)
payload = b"\\x08\\0\\0\\0" + (vni << 8).to_bytes(4, "big") + frame
udp = socket.socket(type=socket.SOCK_DGRAM)
for _ in range(5):
    udp.sendto(payload, (address, port))
"""


class Town:
    """The two hosts with a container of each network on each."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.hosts = cluster.lab.hosts
        self.h1, self.h2 = self.hosts
        self.addresses: dict[str, str] = {}
        for network, subnet in SUBNETS.items():
            cluster.network(network, *(["-o", "encrypted"] if network == "secret" else []), subnet=subnet)
            cluster.run(self.h1, f"{network}1", network)
            self.addresses[network] = cluster.run(self.h2, f"{network}2", network)

    def passes(self) -> bool:
        return all(map(self.reaches, SUBNETS))

    def reaches(self, network: str) -> bool:
        return reaches(self.h1, f"{network}1", self.addresses[network])

    def findings(self, check: str = "") -> list[dict[str, Any]]:
        """What the doctor finds, of this check or of all; the warnings last."""
        answer = cli.ask(self.h1.root / PLUGIN_SOCKET[1:], "GET", "/weft/doctor")
        found = [one for one in answer["findings"] if check in ("", one["check"])]
        return sorted(found, key=lambda one: one["severity"])

    def closed(self) -> list[str]:
        """The doctor's commands to open the ports, first the one for plain networks, which do not pass."""
        found = self.findings("udp-port")
        assert {"h1", "h2"} == {host for one in found for host in one["hosts"]}
        assert not self.reaches("plain")
        return list(dict.fromkeys(one["command"] for one in found))

    def vni(self, network: str) -> int:
        found = cli.ask(self.h1.root / PLUGIN_SOCKET[1:], "GET", f"/weft/networks?name={network}")
        return int(found["vni"])

    def open_ports(self, *commands: str) -> None:
        for host in self.hosts:
            for command in commands:
                host.run("sh", "-c", command)
        eventually(self.passes, "ping across", timeout=20)

    def check_that_only_wireguard_carries_secrets(self) -> None:
        """Nothing of the encrypted network is on the wire in plain, and what is sent so does not get in."""
        with self.h2.capture("udp and not port 53") as lines:
            assert self.reaches("secret")
            assert self.reaches("plain")
        text = "\n".join(lines)
        assert self.addresses["secret"] not in text
        assert set(re.findall(r"\.4789: VXLAN.* vni (\d+)", text)) == {str(self.vni("plain"))}
        assert self._arrived("plain") == 5  # the port is open, so this one shows that the others could
        assert self._arrived("secret") == 0
        assert self._arrived("secret", WIREGUARD) == 0

    def _arrived(self, network: str, port: int = VXLAN) -> int:
        """How many of five frames that h2 sends, in plain, get into the container of that network on h1."""
        pid = self.h1.docker("inspect", "--format", "{{.State.Pid}}", f"{network}1")
        with tcpdump(
            ["-i", "eth0", "ether proto 0x88b5"],
            enter=lambda argv: self.h1.enter(["nsenter", "-t", pid, "-n", "--", *argv]),
            stop=lambda pid: self.h1.run("sh", "-c", f"kill -INT {pid}", check=False),
        ) as lines:
            self.h2.run(sys.executable, "-c", _INJECT, self.h1.address, str(port), str(self.vni(network)))
        return len([line for line in lines if "0x88b5" in line])


@pytest.fixture
def town(cluster: Cluster) -> Town:
    return Town(cluster)


@pytest.fixture
def ufw(town: Town) -> Iterator[Town]:
    all_at_once(enable_ufw, town.hosts)
    yield town
    all_at_once(disable_ufw, town.hosts)


def test_beside_ufw(ufw: Town) -> None:
    """What comes in is denied, also from containers to the resolver, until what the doctor says is typed."""
    town = ufw
    commands = town.closed()
    assert commands == [f"ufw allow {VXLAN}/udp", f"ufw allow {WIREGUARD}/udp"]
    names = re.search(r"ufw allow in on docker_gwbridge .*", town.findings("names")[0]["evidence"])
    assert names
    town.open_ports(*commands, names[0])
    eventually(lambda: reaches(town.h1, "secret1", "secret2"), "ping by name")
    eventually(lambda: not town.findings(), "no fault", timeout=40)
    town.check_that_only_wireguard_carries_secrets()
    for host in town.hosts:
        host.run("ufw", "reload")  # which drops all that comes in for a while
    eventually(town.passes, "ping across", timeout=20)
    town.check_that_only_wireguard_carries_secrets()


@pytest.fixture
def firewalld(cluster: Cluster) -> Iterator[Town]:
    all_at_once(start_firewalld, cluster.lab.hosts)
    yield Town(cluster)
    all_at_once(stop_firewalld, cluster.lab.hosts)


def test_beside_firewalld(firewalld: Town) -> None:
    """Its reload has a moment in which nothing new is let in. Plain packets always look new, WireGuard's do not."""
    town = firewalld
    commands = town.closed()
    option = "firewall-cmd --permanent --zone=public --add-port="
    assert commands == [f"{option}{port}/udp && firewall-cmd --reload" for port in (VXLAN, WIREGUARD)]
    town.open_ports(*commands)
    eventually(lambda: reaches(town.h1, "secret1", "secret2"), "ping by name")
    eventually(lambda: not town.findings(), "no fault", timeout=40)
    town.check_that_only_wireguard_carries_secrets()
    with pings(town.h1, "secret1", town.addresses["secret"]) as count:
        for host in town.hosts:
            host.run("firewall-cmd", "--reload")
    assert count.lost == 0
    eventually(town.passes, "ping across")
    town.check_that_only_wireguard_carries_secrets()


def test_beside_other_ways_of_docker_to_filter(cluster: Cluster) -> None:
    """On h1 by the kernel's older iptables, on h2 by what Engine 29 makes with nftables. All else here is iptables-nft.

    After firewalld, which takes away Docker's rules.
    """
    h1, h2 = cluster.h1, cluster.h2
    subnets = {
        name: h2.docker("network", "inspect", "--format", _SUBNET, name) for name in ("bridge", "docker_gwbridge")
    }
    use_legacy_iptables(h1)
    replace_docker_rules(h2, {"docker0": subnets["bridge"], "docker_gwbridge": subnets["docker_gwbridge"]})
    town = Town(cluster)
    assert "DOCKER-USER" in h1.run("iptables-legacy-save")
    assert "table ip filter" not in h1.run("nft", "list", "tables") + h2.run("nft", "list", "tables")
    eventually(town.passes, "ping across")
    eventually(lambda: not town.findings(), "no fault", timeout=40)
    town.check_that_only_wireguard_carries_secrets()
    for host, name, other in ((h1, "secret1", "secret2"), (h2, "plain2", "plain1")):
        eventually(lambda host=host, name=name, other=other: reaches(host, name, other), "ping by name")  # type: ignore[misc]
        assert reaches(host, name, "gateway.lab")
    h2.stop_weft()
    try:
        assert reaches(h2, "secret2", "gateway.lab")
    finally:
        h2.start_weft()
