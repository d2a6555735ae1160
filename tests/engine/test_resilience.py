"""Nothing that happens to weft, to Docker or to the kernel's tables costs a running container its network."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from lab import Host
from tests.engine.absence import without_weft
from tests.engine.conftest import IMAGE, Cluster, eventually, reaches
from tests.engine.traffic import pings

ENGINE_OPTIONS = {"live-restore": True}
SUBNET = "10.77.0.0/24"


@pytest.fixture
def pair(cluster: Cluster) -> tuple[str, str]:
    """Addresses of web1 on h1 and web2 on h2, which reach each other."""
    cluster.network("app", "-o", "weft.vni=4242", subnet=SUBNET)
    first, second = cluster.run(cluster.h1, "web1", "app"), cluster.run(cluster.h2, "web2", "app")
    eventually(lambda: reaches(cluster.h1, "web1", second), "ping across")
    return first, second


def kill_and_start_weft(host: Host) -> None:
    host.kill_weft()
    host.start_weft()


def kill_and_start_engine(host: Host) -> None:
    host.kill_engine()
    host.start_engine()


def stop_and_start_engine(host: Host) -> None:
    host.stop_engine()
    host.start_engine()


@pytest.mark.parametrize(
    "happens", [Host.restart_weft, kill_and_start_weft, kill_and_start_engine, stop_and_start_engine]
)
def test_no_packet_is_lost(cluster: Cluster, pair: tuple[str, str], happens: Callable[[Host], None]) -> None:
    with pings(cluster.h2, "web2", pair[0]) as count:
        happens(cluster.h1)
        # Whatever weft does after a start (adopt, compare, collect) is over when it has served a container.
        cluster.h1.docker("run", "--rm", "--network", "app", IMAGE, "true")
    assert count.lost == 0
    assert count.sent > 10
    cluster.h1.docker("rm", "-f", "web1")


DRIFT = {
    "a row deleted": "bridge fdb del {mac} dev vx4242 dst {vtep} self",
    "a static row deleted": "bridge fdb del {mac} dev vx4242 master",
    "a neighbour deleted": "ip neigh del {address} dev br4242",
    "a flood entry deleted": "bridge fdb del 00:00:00:00:00:00 dev vx4242 dst {vtep} self",
    "the VTEP changed": "bridge fdb replace {mac} dev vx4242 dst 192.168.78.99 self permanent",
    "the VXLAN device deleted": "ip link del vx4242",
    "the bridge deleted": "ip link del br4242",
    "the bridge down": "ip link set br4242 down",
    "the tunnel out of the bridge": "ip link set vx4242 nomaster",
    "the MTU changed": "ip link set vx4242 mtu 1280",
    "learning on": "bridge link set dev vx4242 learning on",
}


@pytest.mark.parametrize("what", DRIFT)
def test_drift_is_repaired_as_the_kernel_tells_of_it(cluster: Cluster, pair: tuple[str, str], what: str) -> None:
    mac = cluster.address(cluster.h1, "web1", "app", field="MacAddress")
    before = data_plane(cluster.h2)
    command = DRIFT[what].format(mac=mac, vtep=cluster.h1.address, address=pair[0])
    cluster.h2.dataplane(*command.split())
    eventually(lambda: data_plane(cluster.h2) == before, f"{what}: repaired long before the timer", timeout=5)
    assert reaches(cluster.h2, "web2", pair[0])


def test_foreign_rows_are_removed(cluster: Cluster, pair: tuple[str, str]) -> None:
    before = data_plane(cluster.h2)
    for command in (
        "bridge fdb add 02:00:00:00:00:99 dev vx4242 dst 192.168.78.99 self permanent",
        "bridge fdb add 02:00:00:00:00:98 dev vx4242 master static",
        "ip neigh add 10.99.0.99 lladdr 02:00:00:00:00:99 dev br4242 nud permanent",
        "ip link add stray type veth peer name yarts",
    ):
        cluster.h2.dataplane(*command.split())
    eventually(lambda: data_plane(cluster.h2) == before, "foreign rows removed", timeout=3)


def data_plane(host: Host) -> set[str]:
    """Everything that weft is responsible for, as iproute2 shows it: not what the kernel counts or learns."""
    links = host.dataplane("ip", "-o", "-d", "link")
    links = re.sub(
        r"(timer|\bid|root|bridge_id|designated_\w+)\s+\S+|^\d+: |@if\d+|link/ether \S+", "", links, flags=re.M
    )
    rows = host.dataplane("bridge", "fdb").splitlines() + host.dataplane("ip", "neigh").splitlines()
    lasting = {
        row for row in rows if ("permanent" in row.lower() or "static" in row) and not re.match("33:33|01:00", row)
    }
    own = set(re.findall(r"link/ether (\S+)", host.dataplane("ip", "-o", "link")))
    return set(links.splitlines()) | {row for row in lasting if row.split()[0] not in own}


def test_leftovers_of_a_stopped_weft_are_collected(cluster: Cluster, pair: tuple[str, str]) -> None:
    """The engine never repeats what it could not say. `weft gc --dry-run` tells what is to be collected, and why."""
    usual = cluster.h1.settings
    cluster.h1.settings = {**usual, "WEFT_GC_GRACE": "300"}
    try:
        with without_weft(cluster.h1):
            cluster.h1.docker("rm", "-f", "web1")
            assert len(cluster.keys("topology/endpoints/")) == 2
        known = {key.rpartition("/")[2] for key in cluster.keys("topology/endpoints/")}
        (endpoint,) = known - {cluster.address(cluster.h2, "web2", "app", field="EndpointID")}
        told = cluster.h1.ask_weft("gc", "--dry-run")
        assert re.search(rf"endpoint {endpoint[:12]} \(VNI 4242\) +this host's Docker does not have it +in \d+ s", told)
        assert len(told.splitlines()) == 2
    finally:
        cluster.h1.settings = usual
        cluster.h1.restart_weft()
    eventually(lambda: len(cluster.keys("topology/endpoints/")) == 1, "web1's endpoint is collected")
    eventually(lambda: f"ipam/addresses/{SUBNET}/{pair[0]}" not in cluster.keys("ipam/"), "its address as well")
    eventually(lambda: not any(name.startswith("wp") for name in cluster.links(cluster.h1)), "and its veth")
    eventually(lambda: pair[0] not in cluster.h2.dataplane("ip", "neigh"), "and h2's rows for it")
    assert cluster.h1.ask_weft("gc", "--dry-run") == "nothing to collect"


def test_a_network_removed_while_weft_was_down_is_collected(cluster: Cluster) -> None:
    cluster.network("app", subnet=SUBNET)
    with without_weft(cluster.h1):
        cluster.h1.docker("network", "rm", "app")
    eventually(lambda: not cluster.keys("topology/networks/"), "the network is collected")
    eventually(lambda: not cluster.keys("ipam/"), "its pool and gateway as well")


def test_nothing_is_collected_while_the_engine_does_not_answer(cluster: Cluster, pair: tuple[str, str]) -> None:
    cluster.h1.stop_engine()
    cluster.h1.restart_weft()
    with pings(cluster.h2, "web2", pair[0]) as count:
        # Longer than the grace period: a sweep that mistook silence for emptiness would have come by now.
        time.sleep(3)
    assert count.lost == 0
    assert len(cluster.keys("topology/endpoints/")) == 2
    cluster.h1.start_engine()
    assert reaches(cluster.h2, "web2", pair[0])


def test_a_run_begun_while_weft_is_away_succeeds_when_it_is_back(cluster: Cluster, pair: tuple[str, str]) -> None:
    from threading import Thread

    cluster.h1.stop_weft()
    outcome: list[str] = []
    run = Thread(target=lambda: outcome.append(cluster.run(cluster.h1, "late", "app")))
    run.start()
    cluster.h1.start_weft()
    run.join(30)
    assert outcome
    assert reaches(cluster.h2, "web2", outcome[0])


def test_a_host_that_lost_power_comes_back_with_its_containers(cluster: Cluster, pair: tuple[str, str]) -> None:
    cluster.run(cluster.h1, "again", "app", "--restart", "always", "--ip", "10.77.0.200")
    cluster.h1.crash()
    cluster.h1.boot()
    eventually(lambda: reaches(cluster.h2, "web2", "10.77.0.200"), "the container is back", timeout=30)
    eventually(lambda: len(cluster.keys("topology/endpoints/")) == 2, "nothing stale is left", timeout=30)
