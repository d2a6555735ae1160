"""A network is created once and used on every host; removing it once removes it everywhere, when nobody uses it.

The hosts share three members of etcd, as they would.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lab import Host
from tests.engine.absence import without_weft
from tests.engine.asking import Inside
from tests.engine.conftest import IMAGE, Cluster, eventually, reaches

pytestmark = pytest.mark.skipif(not shutil.which("etcd"), reason="etcd is not installed: run lab/setup.sh")

STORE = "etcd"
CREATE = ("network", "create", "-d", "weft", "--ipam-driver", "weft")
SUBNET = "10.77.0.0/24"
FULL = [
    *("--subnet", SUBNET, "--gateway", "10.77.0.9", "--ip-range", "10.77.0.64/26", "--aux-address", "r=10.77.0.65"),
    *("--ipv6", "--subnet", "fd00:77::/64", "--label", "team=blue", "--label", "empty=", "--attachable"),
    *("-o", "mtu=1400", "-o", "weft.vni=4243", "--ipam-opt", "weft.vni=4243"),
]
COMPOSE = """
services:
  web:
    image: weft-lab
    networks: [app]
networks:
  app:
    driver: weft
    ipam:
      driver: weft
"""
EXTERNAL = """
services:
  web:
    image: weft-lab
    networks: [app]
networks:
  app:
    external: true
    name: app
"""


def shown(host: Host, name: str) -> dict[str, Any]:
    """What an engine shows of a network, but for what is each engine's own."""
    found = json.loads(host.docker("network", "inspect", name))[0]
    found["IPAM"]["Options"] = found["IPAM"]["Options"] or {}
    return {key: value for key, value in found.items() if key not in ("Id", "Created", "Containers")}


def vnis(cluster: Cluster) -> list[str]:
    return [key.rsplit("/", 1)[1] for key in cluster.keys("topology/networks/")]


def is_gone(cluster: Cluster, name: str = "app") -> bool:
    return not any(name in cluster.networks(host) for host in cluster.lab.hosts)


def nothing_is_left(cluster: Cluster) -> bool:
    lasting = ("schema", "engines/", "topology/hosts/", "topology/alive/", "probes/results/")
    return all(key.startswith(lasting) for key in cluster.keys(""))


@pytest.mark.parametrize(
    "options",
    [[], ["--subnet", SUBNET], ["--internal", "--ipv6", "--subnet", SUBNET, "--subnet", "fd00:77::/64"], FULL],
    ids=["chosen", "subnet", "internal", "full"],
)
def test_created_once_it_is_the_same_on_the_other_host(
    cluster: Cluster, options: list[str], record_property: Any
) -> None:
    cluster.h1.docker(*CREATE, *options, "app")
    began = time.monotonic()
    eventually(lambda: "app" in cluster.networks(cluster.h2), "app is on h2", timeout=5)
    record_property("seconds", time.monotonic() - began)
    print(f"on the other host after {time.monotonic() - began:.3f} s")
    assert shown(cluster.h2, "app") == shown(cluster.h1, "app")
    address = cluster.run(cluster.h1, "web1", "app")
    cluster.run(cluster.h2, "web2", "app")
    assert reaches(cluster.h2, "web2", address)


def test_removed_once_it_is_gone_when_its_last_container_is(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    cluster.run(cluster.h2, "web2", "app")
    cluster.run(cluster.h2, "web3", "app")
    cluster.h1.docker("network", "rm", "app")
    cluster.h2.docker("rm", "-f", "web2")
    time.sleep(1)  # nothing may happen, so there is nothing to wait for
    assert cluster.networks(cluster.h1) == []
    assert cluster.networks(cluster.h2) == ["app"]
    cluster.h2.docker("rm", "-f", "web3")
    eventually(lambda: is_gone(cluster), "app is gone", timeout=5)
    eventually(lambda: nothing_is_left(cluster), "nothing is left")


def test_pruned_it_stays_as_long_as_a_host_uses_it(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    cluster.network("idle", subnet="10.78.0.0/24")
    cluster.run(cluster.h2, "web2", "app")
    cluster.h1.docker("network", "prune", "-f")
    said = "was pruned here, but is in use on h2"
    eventually(lambda: said in cluster.h1.log("weft"), "app stays", timeout=5)
    eventually(lambda: cluster.networks(cluster.h1) == cluster.networks(cluster.h2) == ["app"], "app, and idle no more")
    cluster.h2.docker("restart", "-t", "0", "web2")
    address = cluster.run(cluster.h1, "web1", "app")
    assert reaches(cluster.h2, "web2", address)
    cluster.h1.docker("rm", "-f", "web1")
    cluster.h2.docker("rm", "-f", "web2")
    cluster.h2.docker("system", "prune", "-f")
    eventually(lambda: is_gone(cluster), "app is gone", timeout=5)
    eventually(lambda: nothing_is_left(cluster), "nothing is left")


@pytest.mark.parametrize("options", [["--subnet", SUBNET], []], ids=["subnet", "chosen"])
def test_created_again_while_the_other_host_still_uses_it(cluster: Cluster, options: list[str]) -> None:
    cluster.network("app", *options)
    address = cluster.run(cluster.h2, "web2", "app")
    before = vnis(cluster)
    cluster.h1.docker("network", "rm", "app")
    cluster.h1.docker(*CREATE, *options, "app")
    eventually(lambda: vnis(cluster) == before and len(cluster.keys("topology/members/")) == 2, "app is one again")
    eventually(lambda: "app" in cluster.networks(cluster.h1), "on h1 too")
    cluster.run(cluster.h1, "web1", "app")
    assert reaches(cluster.h1, "web1", address)
    cluster.h2.docker("rm", "-f", "web2")
    time.sleep(1)
    assert cluster.networks(cluster.h2) == ["app"]


def at_once(cluster: Cluster, *commands: tuple[str, ...]) -> None:
    """Each of the commands on each host, all hosts at the same moment."""

    def work(host: Host) -> None:
        barrier.wait()
        for command in commands:
            host.docker(*command, check=False)

    barrier = threading.Barrier(len(cluster.lab.hosts))
    threads = [threading.Thread(target=work, args=(host,)) for host in cluster.lab.hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def is_one(cluster: Cluster) -> bool:
    """Both hosts have one `app`, and it is the same."""
    members = cluster.keys("topology/members/")
    return (
        len(vnis(cluster)) == 1 and len(members) == 2 and all(cluster.networks(h) == ["app"] for h in cluster.lab.hosts)
    )


def test_created_on_both_hosts_at_once_it_becomes_one(cluster: Cluster) -> None:
    replaced = 0
    for _ in range(50):
        at_once(cluster, (*CREATE, "app"))
        replaced += len(vnis(cluster)) > 1
        eventually(lambda: is_one(cluster), "one network", timeout=15)
        assert shown(cluster.h2, "app") == shown(cluster.h1, "app")
        cluster.h1.docker("network", "rm", "app")
        eventually(lambda: is_gone(cluster) and not vnis(cluster), "app is gone")
    print(f"{replaced} of 50 were two networks at first")
    assert nothing_is_left(cluster)


def test_created_and_used_on_both_hosts_at_once_it_is_one_or_a_conflict_that_ends(cluster: Cluster) -> None:
    run = ("run", "-d", "--name", "web", "--network", "app", IMAGE)
    for _ in range(5):
        at_once(cluster, (*CREATE, "app"), run)
        eventually(lambda: is_one(cluster) or conflicts(cluster) > 0, "one network, or a conflict", timeout=15)
        for host in cluster.lab.hosts:
            host.docker("rm", "-f", "web", check=False)
        eventually(lambda: is_one(cluster), "the conflict ends", timeout=15)
        cluster.clean()


def conflicts(cluster: Cluster) -> int:
    """Conflicts that were reported and are not over."""
    logs = [host.log("weft") for host in cluster.lab.hosts]
    return sum(log.count("two networks are called app") - log.count("the conflict about VNI") for log in logs)


def test_an_engine_that_was_down_catches_up(cluster: Cluster) -> None:
    cluster.network("old", subnet="10.78.0.0/24")
    cluster.h2.stop_engine()
    cluster.h1.docker("network", "rm", "old")
    cluster.h1.docker(*CREATE, "app")
    cluster.h2.start_engine()
    eventually(lambda: cluster.networks(cluster.h2) == ["app"], "h2 has app, and old no more", timeout=20)
    eventually(lambda: len(vnis(cluster)) == 1, "old is gone")


def test_a_host_that_joins_late_has_all_networks(cluster: Cluster) -> None:
    cluster.h2.stop_weft()
    for number in range(3):
        cluster.h1.docker(*CREATE, f"app{number}")
    cluster.h2.start_weft()
    eventually(lambda: len(cluster.networks(cluster.h2)) == 3, "h2 has all networks")
    assert [shown(cluster.h2, f"app{n}") for n in range(3)] == [shown(cluster.h1, f"app{n}") for n in range(3)]


def test_removed_while_weft_is_down_it_goes_everywhere(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    with without_weft(cluster.h1):
        cluster.h1.docker("network", "rm", "app")
    eventually(lambda: is_gone(cluster), "app is gone", timeout=20)
    eventually(lambda: nothing_is_left(cluster), "nothing is left")


@pytest.mark.parametrize("hosts", [1, 2])
def test_wiped_engines_have_the_network_again(cluster: Cluster, hosts: int) -> None:
    cluster.network("app", "--label", "a=b", subnet=SUBNET)
    before = shown(cluster.h1, "app")
    for host in cluster.lab.hosts[:hosts]:
        host.stop_engine()
        shutil.rmtree(host.data / "docker")
        host.start_engine()
        host._import_image()
    eventually(
        lambda: all(cluster.networks(host) == ["app"] for host in cluster.lab.hosts), "app is on all hosts", timeout=30
    )
    assert all(shown(host, "app") == before for host in cluster.lab.hosts)
    assert len(vnis(cluster)) == 1


def test_a_bridge_network_of_that_name_is_reported_and_gives_way_when_it_is_removed(cluster: Cluster) -> None:
    cluster.h2.docker("network", "create", "app")
    cluster.h1.docker(*CREATE, "app")
    eventually(lambda: "another network of that name, of driver bridge" in cluster.h2.log("weft"), "a conflict")
    cluster.h2.docker("network", "rm", "app")
    eventually(lambda: cluster.networks(cluster.h2) == ["app"], "app is on h2")


def test_a_lost_store_is_found_again_in_docker(cluster: Cluster) -> None:
    cluster.network("app", "--label", "a=b", subnet=SUBNET)
    first, second = cluster.run(cluster.h1, "web1", "app"), cluster.run(cluster.h2, "web2", "app")
    for host in cluster.lab.hosts:
        host.stop_weft()
    cluster.lab.etcd.delete("")
    for host in cluster.lab.hosts:
        host.start_weft()
    eventually(lambda: len(cluster.keys("topology/endpoints/")) == 2, "the endpoints are recorded", timeout=30)
    assert len(vnis(cluster)) == 1
    eventually(lambda: reaches(cluster.h1, "web1", second), "ping")
    eventually(lambda: len(cluster.keys("names/")) == 1, "app is published")
    assert {f"ipam/addresses/{SUBNET}/{address}" for address in (first, second)} <= set(cluster.keys("ipam/"))
    assert "wp" in " ".join(cluster.links(cluster.h1))


def test_a_container_whose_address_was_given_away_while_the_store_was_lost_is_cut_off(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    address = cluster.run(cluster.h1, "web1", "app")
    for host in cluster.lab.hosts:
        host.stop_weft()
    cluster.lab.etcd.delete("")
    cluster.h2.start_weft()
    eventually(lambda: len(cluster.keys("names/")) == 1, "h2 has found app again")
    cluster.run(cluster.h2, "web2", "app", "--ip", address)
    cluster.h1.start_weft()
    said = f"container web1 is cut off from network app: address {address} of network app"
    eventually(lambda: said in cluster.h1.log("weft"), "web1 is cut off", timeout=40)
    assert not [name for name in cluster.links(cluster.h1) if name.startswith("wp")]
    cluster.h1.docker("restart", "-t", "1", "web1")
    assert reaches(cluster.h1, "web1", address)
    assert cluster.address(cluster.h1, "web1", "app") != address


def compose(host: Host, folder: Path, text: str, *arguments: str) -> None:
    file = folder / "compose.yml"
    file.write_text(text)
    command = ["docker-compose", "-f", str(file), "-p", "shop", *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "DOCKER_HOST": host.docker_host}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def addresses(cluster: Cluster, host: Host, network: str) -> dict[str, str]:
    """By the ids of the host's containers."""
    return {name: cluster.address(host, name, network) for name in host.docker("ps", "-q").split()}


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is missing: run lab/setup.sh")
def test_compose_makes_the_network_on_one_host_and_uses_it_on_the_other(
    cluster: Cluster, tmp_path: Path, inside: Inside
) -> None:
    compose(cluster.h1, tmp_path, COMPOSE, "up", "-d", "--scale", "web=2")
    eventually(lambda: "shop_app" in cluster.networks(cluster.h2), "the network is on h2")
    assert shown(cluster.h2, "shop_app") == shown(cluster.h1, "shop_app")
    assert shown(cluster.h2, "shop_app")["Labels"]["com.docker.compose.project"] == "shop"
    there = addresses(cluster, cluster.h1, "shop_app").values()
    assert len(there) == 2
    cluster.run(cluster.h2, "client", "shop_app")
    ask = inside(cluster.h2, "client")
    eventually(lambda: sorted(ask("web").answers) == sorted(there), "the service's name is both replicas")
    assert {*ask("shop_web_1").answers, *ask("shop_web_2").answers} == set(there)
    cluster.h2.docker("rm", "-f", "client")
    compose(cluster.h2, tmp_path, COMPOSE, "up", "-d")
    (web,) = addresses(cluster, cluster.h2, "shop_app")
    assert all(reaches(cluster.h2, web, address) for address in there)
    compose(cluster.h1, tmp_path, COMPOSE, "down")
    assert cluster.networks(cluster.h2) == ["shop_app"]
    compose(cluster.h2, tmp_path, COMPOSE, "down")
    eventually(lambda: nothing_is_left(cluster), "nothing is left")


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is missing: run lab/setup.sh")
def test_compose_uses_an_external_network_of_another_host(cluster: Cluster, tmp_path: Path) -> None:
    cluster.network("app")
    address = cluster.run(cluster.h1, "web1", "app")
    compose(cluster.h2, tmp_path, EXTERNAL, "up", "-d", "--scale", "web=3")
    assert len(webs := addresses(cluster, cluster.h2, "app")) == 3
    assert all(reaches(cluster.h2, web, address) for web in webs)
    compose(cluster.h2, tmp_path, EXTERNAL, "down")
    assert cluster.networks(cluster.h2) == ["app"]
