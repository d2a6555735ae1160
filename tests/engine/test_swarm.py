"""The managed plugin with WEFT_SCOPE=global on a Swarm of two engines, whose are its networks and its addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import pytest

from lab import Host, Lab
from tests.engine.conftest import Cluster, eventually, reaches
from tests.engine.managed import Built, settings

SUBNET = "10.88.0.0/24"
CREATE = ("network", "create", "-d", "weft:latest", "--ipam-driver", "weft:latest", "--attachable")
REPLICAS = 4


@pytest.fixture(scope="module")
def cluster(built: Built, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Lab(hosts=2, name="swarm", weft=False) as lab:
        cluster = Cluster(lab)
        for host in lab.hosts:
            host.docker("plugin", "create", "weft:latest", str(built.folder), timeout=120)
            host.docker("plugin", "set", "weft", *settings(host, lab, WEFT_SCOPE="global"))
            host.docker("plugin", "enable", "weft")
        cluster.h1.docker("swarm", "init", "--advertise-addr", cluster.h1.address)
        token = cluster.h1.docker("swarm", "join-token", "-q", "manager")
        cluster.h2.docker("swarm", "join", "--token", token, f"{cluster.h1.address}:2377")
        cluster.h1.docker(*CREATE, "--subnet", SUBNET, "-o", "mtu=1400", "app")
        yield cluster
        if request.session.testsfailed:
            for host in lab.hosts:
                print(f"--- dockerd on {host.name}\n{host.log('dockerd')[-8000:]}")


def addresses(cluster: Cluster) -> set[str]:
    """Taken in the pool, but for the gateway."""
    prefix = f"ipam/addresses/{SUBNET}/"
    return {key.removeprefix(prefix) for key in cluster.keys(prefix)} - {"10.88.0.1"}


def test_attached_containers_reach_each_other_by_name(cluster: Cluster) -> None:
    first = cluster.run(cluster.h1, "web1", "app")
    second = cluster.run(cluster.h2, "web2", "app")
    assert addresses(cluster) == {first, second}
    eventually(lambda: reaches(cluster.h2, "web2", "web1"), "web1 from h2, by name")
    eventually(lambda: reaches(cluster.h1, "web1", "web2"), "web2 from h1, by name")
    assert "mtu 1400" in cluster.h2.docker("exec", "web2", "ip", "link", "show", "eth0")
    for host, name in ((cluster.h1, "web1"), (cluster.h2, "web2")):
        host.docker("rm", "-f", name)
    eventually(lambda: not addresses(cluster), "the leader gives the addresses of both nodes back", timeout=60)


def test_replicas_of_a_service_reach_each_other_by_name(cluster: Cluster) -> None:
    options = ["--network", "app", "--endpoint-mode", "dnsrr", "--replicas", str(REPLICAS), "--detach"]
    cluster.h1.docker("service", "create", "--name", "web", *options, "weft-lab", timeout=120)
    eventually(lambda: all(len(tasks(host)) == REPLICAS / 2 for host in cluster.lab.hosts), "tasks", timeout=60)
    assert len(addresses(cluster)) == REPLICAS
    for host in cluster.lab.hosts:  # a node that has just come to the network waits for the engines' gossip
        eventually(partial(finds_all, cluster, host), "all replicas by the service's name", timeout=60)
        eventually(partial(reaches, host, tasks(host)[0], "web"), "one of them")
    for address in addresses(cluster):
        assert reaches(cluster.h1, tasks(cluster.h1)[0], address)
    cluster.h1.docker("service", "rm", "web")
    eventually(lambda: not addresses(cluster), "the leader gives their addresses back", timeout=60)


def tasks(host: Host) -> list[str]:
    return host.docker("ps", "-q", "--filter", "label=com.docker.swarm.service.name=web").split()


def finds_all(cluster: Cluster, host: Host) -> bool:
    said = host.docker("exec", tasks(host)[0], "nslookup", "web", "127.0.0.11", check=False)
    return set(re.findall(r"10\.88\.0\.\d+", said)) == addresses(cluster)


def test_another_leader_goes_on(cluster: Cluster) -> None:
    """It asks weft for all that Swarm has again."""
    first = cluster.run(cluster.h2, "web2", "app")
    cluster.h1.docker("node", "demote", "h1")
    leads = ("info", "--format", "{{.Swarm.ControlAvailable}}")
    eventually(lambda: "true" in cluster.h2.docker(*leads), "a leader", timeout=60)
    eventually(lambda: bool(cluster.h2.docker("node", "ls", "-q", check=False)), "that answers", timeout=60)
    second = cluster.run(cluster.h2, "web3", "app")
    assert addresses(cluster) == {first, second}
    assert reaches(cluster.h2, "web3", "web2")
    cluster.h2.docker("rm", "-f", "web2", "web3")
    eventually(lambda: not addresses(cluster), "and takes back what the other gave", timeout=60)


def test_a_removed_network_leaves_nothing(cluster: Cluster) -> None:
    cluster.h2.docker("network", "rm", "app")
    eventually(lambda: not cluster.keys("ipam/") and not cluster.keys("topology/networks/"), "all is free", timeout=60)
