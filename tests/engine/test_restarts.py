"""Engines without live-restore: containers go down with them, and nothing of theirs stays behind."""

from __future__ import annotations

from threading import Thread

from tests.engine.conftest import Cluster, eventually, reaches

SUBNET = "10.77.0.0/24"


def endpoints(cluster: Cluster) -> int:
    return len(cluster.keys("topology/endpoints/"))


def test_leftovers_of_a_killed_engine_are_collected(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    for name in ("web1", "web3"):
        cluster.run(cluster.h1, name, "app")
    second = cluster.run(cluster.h2, "web2", "app")
    assert endpoints(cluster) == 3
    cluster.h1.kill_engine()
    cluster.h1.start_engine()
    eventually(lambda: endpoints(cluster) == 1, "the endpoints of the dead containers go", timeout=20)
    eventually(lambda: not _ports(cluster), "and their veths")
    eventually(lambda: len(cluster.keys(f"ipam/addresses/{SUBNET}/")) == 2, "and their addresses")
    cluster.h1.docker("start", "web1")
    assert reaches(cluster.h1, "web1", second)


def _ports(cluster: Cluster) -> list[str]:
    return [name for name in cluster.links(cluster.h1) if name.startswith("wp")]


def test_a_restarted_engine_brings_its_containers_back(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    cluster.run(cluster.h1, "web1", "app", "--restart", "always")
    cluster.run(cluster.h2, "web2", "app")
    cluster.h1.stop_engine()
    cluster.h1.start_engine()
    eventually(lambda: bool(cluster.address(cluster.h1, "web1", "app")), "web1 is back")
    address = cluster.address(cluster.h1, "web1", "app")
    eventually(lambda: reaches(cluster.h2, "web2", address), "and reached")
    eventually(lambda: endpoints(cluster) == 2, "and nothing else is left")


def test_an_engine_that_started_without_weft_uses_it_when_it_comes(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    cluster.run(cluster.h2, "web2", "app")
    cluster.h1.stop_engine()
    cluster.h1.stop_weft()
    cluster.h1.start_engine(timeout=120)
    cluster.h1.start_weft()
    address = cluster.run(cluster.h1, "web1", "app")
    assert reaches(cluster.h2, "web2", address)


def test_weft_killed_while_a_container_starts_leaves_nothing_half_made(cluster: Cluster) -> None:
    """The engine repeats the call that was cut off, with an empty body: whatever comes of it, a retry works."""
    cluster.network("app", subnet=SUBNET)
    cluster.run(cluster.h2, "web2", "app")
    cluster.h1.docker("create", "--name", "web1", "--network", "app", "weft-lab")
    before = _requests(cluster)
    start = Thread(target=lambda: cluster.h1.docker("start", "web1", check=False))
    start.start()
    eventually(lambda: _requests(cluster) > before, "the engine asks for an address")
    cluster.h1.kill_weft()
    cluster.h1.start_weft()
    start.join()
    cluster.h1.docker("start", "web1")
    assert reaches(cluster.h2, "web2", cluster.address(cluster.h1, "web1", "app"))
    eventually(lambda: endpoints(cluster) == 2, "nothing half-made is left", timeout=20)
    eventually(lambda: len(_ports(cluster)) == 1, "in the kernel neither")


def _requests(cluster: Cluster) -> int:
    return cluster.h1.log("weft").count("IpamDriver.RequestAddress")
