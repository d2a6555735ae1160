"""Many networks and containers on one host, made at once and removed at once: all work, and nothing is left."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from lab import Host, LabError
from tests.engine.agreement import Records, differences, kernel_facts
from tests.engine.conftest import IMAGE, Cluster, eventually, reaches
from weft.model import VNI_USER_MAX

T = TypeVar("T")

MANY = 40
AT_ONCE = 6
SHARED = 6
"""Of them, those with a container on the other host as well."""
PATIENCE = 180.0
"""On a machine that has much else to do."""
CREATE = ("network", "create", "-d", "weft", "--ipam-driver", "weft")
KEPT = ("topology/hosts/", "topology/alive/", "probes/", "engines/", "schema")
"""What the store has whether there are networks or not."""


def at_once(work: Callable[[T], None], targets: Sequence[T]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, targets))


def leftovers(cluster: Cluster) -> set[str]:
    return {key for key in cluster.entries() if not key.startswith(KEPT)}


def traces(host: Host) -> set[str]:
    """Whatever a container leaves or a network: in Docker, in the data plane, and in the host's own namespace, where
    weft has just the ends of veths that no container has taken."""
    links = re.findall(r"^\d+: ([^:@]+)", host.run("ip", "-o", "link"), re.MULTILINE)
    docker = host.docker("network", "ls", "--format", "network {{.Name}}").splitlines()
    spaces = host.run("ls", "/run/docker/netns").splitlines()
    return {*kernel_facts(host), *docker, *spaces, *(name for name in links if name.startswith("wc"))}


def remains(host: Host, before: set[str]) -> set[str]:
    return traces(host) - before


def is_reached(host: Host, container: str, address: str) -> None:
    eventually(lambda: reaches(host, container, address), f"{container} reaches {address}")


def none(found: Callable[[], set[str]], what: str) -> None:
    """Wait until nothing is found any more; else say what was."""
    last: set[str] = set()

    def is_none() -> bool:
        last.clear()
        last.update(found())
        return not last

    try:
        eventually(is_none, what, timeout=PATIENCE)
    except LabError as error:
        raise AssertionError("\n".join([str(error), *sorted(last)])) from None


def test_forty_networks_and_containers_come_and_go_at_once(cluster: Cluster) -> None:
    h1, h2 = cluster.h1, cluster.h2
    ids = {known: cluster.lab.host(one["name"]) for known, one in Records(cluster.entries()).hosts.items()}
    for host in (h1, h2):  # the first container makes docker_gwbridge, which stays
        host.docker(*CREATE, f"first-on-{host.name}")
        host.docker("run", "--rm", "--network", f"first-on-{host.name}", IMAGE, "true")
    cluster.clean()
    before = {host.name: traces(host) for host in (h1, h2)}
    names = [f"many-{number}" for number in range(MANY)]

    def start(host: Host, name: str) -> None:
        host.docker("run", "-d", "--network", name, "--name", name, IMAGE, timeout=PATIENCE)

    def make(name: str) -> None:
        h1.docker(*CREATE, name, timeout=PATIENCE)
        start(h1, name)

    at_once(make, names)
    eventually(lambda: set(names) <= set(cluster.networks(h2)), "the other host has all of them", timeout=PATIENCE)
    at_once(lambda name: start(h2, name), names[:SHARED])
    vnis = {key.rsplit("/", 1)[1] for key in cluster.keys("topology/networks/")}
    ports = [name for name in cluster.links(h1) if name.startswith("wp")]
    assert len(vnis) == len(ports) == MANY
    assert set(cluster.links(h1)) == {*ports, *(f"{kind}{vni}" for kind in ("br", "vx") for vni in vnis)}
    for name in names[:SHARED]:
        is_reached(h1, name, cluster.address(h2, name, name))
    none(lambda: differences(ids, cluster.entries()), "kernel, store and Docker agree")

    def remove(what: tuple[Host, str]) -> None:
        host, name = what
        host.docker("rm", "-f", name, timeout=PATIENCE)
        if host is h1:
            host.docker("network", "rm", name, timeout=PATIENCE)

    containers = [*((h1, name) for name in names), *((h2, name) for name in names[:SHARED])]
    random.Random(8).shuffle(containers)
    at_once(remove, containers)
    none(lambda: leftovers(cluster), "the store has nothing of them")
    for host in (h1, h2):
        none(partial(remains, host, before[host.name]), f"nothing of them is left on {host.name}")


def test_networks_that_name_interfaces_alike_are_numbered_in_their_container(cluster: Cluster) -> None:
    """And one of them has the longest number, so its devices have the longest names."""
    cluster.network("one", "-o", "weft.ifname=lan", "-o", f"weft.vni={VNI_USER_MAX}")
    cluster.network("two", "-o", "weft.ifname=lan")
    addresses = [cluster.run(cluster.h2, f"peer-{name}", name) for name in ("one", "two")]
    cluster.run(cluster.h1, "web", "one")
    cluster.h1.docker("network", "connect", "two", "web")
    assert {f"br{VNI_USER_MAX}", f"vx{VNI_USER_MAX}"} <= set(cluster.links(cluster.h1))
    for again in (False, True):
        if again:
            cluster.h1.docker("restart", "--time", "0", "web")
        shown = cluster.h1.docker("exec", "web", "ip", "-o", "link")
        assert {"lan0", "lan1"} <= set(re.findall(r"^\d+: ([^:@]+)", shown, re.MULTILINE))
        for address in addresses:
            is_reached(cluster.h1, "web", address)
