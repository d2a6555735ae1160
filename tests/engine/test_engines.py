"""Docker Engines of several releases: two hosts have a newer one than the machine's, and a third has the machine's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lab import Host, Lab
from lab.engine import NoEngine, search_path
from lab.plan import Plan
from tests.engine.asking import Inside
from tests.engine.conftest import IMAGE, Cluster, eventually, reaches, refusal
from tests.engine.sides import Side
from tests.engine.test_equality import compare, furnished
from tests.engine.test_limits import rates

NEWER = Plan.engine or "forky"
"""A name that stays while Debian's suites move on: Docker Engine 28 or newer."""
SUBNET, SUBNET6 = "10.77.0.0/24", "fd00:77::/64"
IPV6_ONLY = ["network", "create", "-d", "weft", "--ipam-driver", "weft", "--ipv4=false", "--ipv6", "--subnet", SUBNET6]


@pytest.fixture(scope="module")
def engines(worker_id: str) -> Iterator[Cluster]:
    try:
        search_path(NEWER)
    except NoEngine as error:
        pytest.skip(str(error))
    settings = {"WEFT_GC_GRACE": "1", "WEFT_PROBE_INTERVAL": "0"}
    lab = Lab(3, f"newer-{worker_id}", engine=NEWER, settings=settings)
    lab.hosts[2].programs = ""
    with lab:
        cluster = Cluster(lab)
        eventually(lambda: len(cluster.keys("engines/")) == len(lab.hosts), "weft has seen the engines")
        yield cluster


def version(host: Host) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", host.docker("version", "-f", "{{.Server.Version}}"))[:2])


@pytest.fixture
def newer(cluster: Cluster) -> Cluster:
    """For what came with Docker Engine 28."""
    if version(cluster.h1) < (28, 0):
        pytest.skip(f"the engine of {NEWER} is older than Docker Engine 28")
    return cluster


def start(cluster: Cluster, network: str, *options: str) -> dict[str, str]:
    """web1 on h1, web2 on h2 and so on; their IPv4 addresses by name."""
    hosts = {f"web{number}": host for number, host in enumerate(cluster.lab.hosts, start=1)}
    with ThreadPoolExecutor(len(hosts)) as pool:
        ran = pool.map(lambda name: cluster.run(hosts[name], name, network, *options), hosts)
        return dict(zip(hosts, ran, strict=True))


def found(host: Host, container: str, name: str, *options: str) -> None:
    eventually(lambda: reaches(host, container, name, *options), f"{name} is found by {container}")


@pytest.mark.parametrize("creator", ["h1", "h3"], ids=["on the newer", "on the older"])
def test_one_network_for_engines_of_several_releases(cluster: Cluster, creator: str) -> None:
    """Created once, used on all, by name; removed, and nothing is left."""
    old, new = cluster.lab.hosts[2], cluster.h1
    assert version(old) < version(new)
    before = cluster.keys()
    cluster.network("app", "--label", "colour=red", subnet=SUBNET, on=cluster.lab.host(creator))
    addresses = start(cluster, "app", "--network-alias", "shop")
    for host, name in zip(cluster.lab.hosts, addresses, strict=True):
        for other in addresses.keys() - {name}:
            found(host, name, other)
        shown = json.loads(host.docker("network", "inspect", "app"))[0]
        assert shown["Labels"] == {"colour": "red"}
        assert [one["Subnet"] for one in shown["IPAM"]["Config"]] == [SUBNET]
        assert [one["IPv4Address"] for one in shown["Containers"].values()] == [f"{addresses[name]}/24"]
    new.docker("restart", "-t", "0", "web1")
    found(old, "web3", "web1")
    assert "has active endpoints" in refusal(old, "network", "rm", "app")
    for host, name in zip(cluster.lab.hosts, addresses, strict=True):
        host.docker("rm", "-f", name)
    new.docker("network", "rm", "app")
    eventually(lambda: not any(cluster.networks(host) for host in cluster.lab.hosts), "it is gone on all")
    eventually(lambda: cluster.keys() == before, "the store is as it was")
    for host in cluster.lab.hosts:
        eventually(lambda host=host: not cluster.links(host), f"the data plane of {host.name} is empty")  # type: ignore[misc]


def test_an_encrypted_network_for_engines_of_several_releases(cluster: Cluster) -> None:
    cluster.network("secret", "-o", "encrypted", subnet=SUBNET, on=cluster.lab.hosts[2])
    addresses = start(cluster, "secret")
    found(cluster.h1, "web1", "web2")
    with cluster.h1.capture("udp and not port 53") as lines:
        found(cluster.h1, "web1", "web3")
        assert reaches(cluster.h1, "web1", addresses["web2"], "-s", "1362")
    text = "\n".join(lines)
    for other in cluster.lab.hosts[1:]:
        assert f"{cluster.h1.address}.51820 > {other.address}.51820: UDP" in text
    assert "VXLAN" not in text
    assert addresses["web2"] not in text


def test_a_network_of_ipv6_alone(newer: Cluster, inside: Inside) -> None:
    """On the engines that can have one; the log of the other says why it is not there."""
    h1, h2, old = newer.lab.hosts
    before = newer.keys()
    h1.docker(*IPV6_ONLY, "six")
    eventually(lambda: "six" in newer.networks(h2), "the network is on the other host")
    shown = json.loads(h2.docker("network", "inspect", "six"))[0]
    assert (shown["EnableIPv4"], shown["EnableIPv6"]) == (False, True)
    assert [one["Subnet"] for one in shown["IPAM"]["Config"]] == [SUBNET6]
    for host, name in ((h1, "web1"), (h2, "web2")):
        host.docker("run", "-d", "--name", name, "--network", "six", "--ip6", f"fd00:77::{name[-1]}1", IMAGE)
        assert newer.address(host, name, "six") == ""
        assert newer.address(host, name, "six", field="GlobalIPv6Address") == f"fd00:77::{name[-1]}1"
    with h2.capture("udp port 4789") as lines:
        found(h1, "web1", "web2", "-6")
        assert reaches(h2, "web2", "fd00:77::11", "-6", "-s", "1402")
    assert any("> fd00:77::21: ICMP6, echo request" in line for line in lines)
    assert not [line for line in lines if "who has fd00:77::" in line and "frag" not in line]
    ask = inside(h1, "web1")
    assert ask("web2", "AAAA", until="answered").answers == ["fd00:77::21"]
    assert ask("web2", "A").answers == []
    assert "gateway" in refusal(h2, "run", "--rm", "--network", "six", "--ip6", "fd00:77::1", IMAGE)
    eventually(lambda: "network six has no IPv4: it takes Docker Engine 28.0 or newer" in old.log("weft"), "a reason")
    for host, name in ((h1, "web1"), (h2, "web2")):
        host.docker("rm", "-f", name)
    h1.docker("network", "rm", "six")
    eventually(lambda: not newer.networks(h2), "it is gone on the other host")
    eventually(lambda: newer.keys() == before, "the store is as it was")


def way_out(host: Host, container: str) -> str:
    """The gateway of the default route."""
    route: str = json.loads(host.exec_in_container_netns(container, "ip", "-j", "route", "show", "default"))[0][
        "gateway"
    ]
    return route


def test_the_way_out_is_chosen_by_priority(newer: Cluster) -> None:
    """Among Docker's own networks. That of weft's is docker_gwbridge, which Docker takes if there is no other."""
    h1 = newer.h1
    newer.network("app", subnet=SUBNET)
    plain = {"plain1": "10.91.1.1", "plain2": "10.91.2.1"}
    for name, gateway in plain.items():
        h1.docker("network", "create", "--subnet", f"{gateway[:-1]}0/24", "--gateway", gateway, name)
    try:
        for preferred in ("app", *plain):
            networks = [f"--network=name={n},gw-priority={int(n == preferred)}" for n in ("app", *plain)]
            h1.docker("run", "-d", "--name", f"by-{preferred}", *networks, IMAGE)
            assert way_out(h1, f"by-{preferred}") == plain.get(preferred, "10.91.1.1")
        for name in plain:
            h1.docker("network", "disconnect", name, "by-app")
        assert way_out(h1, "by-app").startswith("172.")
        assert reaches(h1, "by-app", newer.h2.address)
    finally:
        h1.docker("rm", "-f", *h1.docker("ps", "-aq").split())
        h1.docker("network", "rm", *plain)


def test_options_of_an_attachment(newer: Cluster) -> None:
    """weft's, and those that the engine takes for itself."""
    h1, h2 = newer.h1, newer.h2
    newer.network("app", subnet=SUBNET)
    sysctls = "driver-opt=com.docker.network.endpoint.sysctls=net.ipv4.conf.IFNAME.arp_notify=1"
    mac = "mac-address=02:11:22:33:44:55"
    h1.docker("run", "-d", "--name", "web1", "--network", f"name=app,driver-opt=weft.rate=4mbit,{sysctls},{mac}", IMAGE)
    assert h1.docker("exec", "web1", "cat", "/proc/sys/net/ipv4/conf/eth0/arp_notify") == "1"
    assert newer.address(h1, "web1", "app", field="MacAddress") == "02:11:22:33:44:55"
    assert h1.docker("exec", "web1", "cat", "/sys/class/net/eth0/address") == "02:11:22:33:44:55"
    h2.docker("run", "-d", "--name", "web2", "--network", "none", IMAGE)
    h2.docker("network", "disconnect", "none", "web2")
    h2.docker("network", "connect", "--driver-opt", "weft.rate=1gbit", "--driver-opt", "a.b=c", "app", "web2")
    eventually(lambda: rates(h2) == {"web1": "4mbit", "web2": "1gbit"}, "rates are told")
    found(h2, "web2", "web1")
    derived = newer.address(h2, "web2", "app").split(".")
    assert newer.address(h2, "web2", "app", field="MacAddress") == "02:42:" + ":".join(f"{int(b):02x}" for b in derived)
    named = "name=app,driver-opt=com.docker.network.endpoint.ifname=net7"
    assert "create the network with -o weft.ifname=app" in refusal(h2, "run", "--rm", "--network", named, IMAGE)
    assert "weft knows weft.rate" in refusal(h2, "run", "--rm", "--network", "name=app,driver-opt=rat=1", IMAGE)


def test_an_engine_is_upgraded(cluster: Cluster) -> None:
    """After all that need the older engine. Its networks and containers stay what they were."""
    old = cluster.lab.hosts[2]
    cluster.network("app", subnet=SUBNET, on=old)
    start(cluster, "app", "--restart", "always")
    network = "network", "inspect", "--format", "{{.Id}}", "app"
    before = old.docker(*network)
    old.stop_engine()
    old.programs = NEWER
    old.start_engine()
    assert version(old) == version(cluster.h1)
    assert old.docker(*network) == before
    found(cluster.h1, "web1", "web3")
    found(old, "web3", "web2")
    cluster.run(old, "later", "app")
    found(cluster.h2, "web2", "later")


@pytest.fixture(scope="module")
def sides(engines: Cluster) -> Iterator[tuple[Side, Side]]:
    """After all that clean up the hosts."""
    engines.h2.docker("network", "rm", "docker_gwbridge")  # it is made anew, with IPv6
    yield from furnished(engines)


@pytest.mark.parametrize(
    "title",
    [
        "connect and disconnect while it runs; `--alias`, `--ip`",
        "`-p`, over TCP and UDP, IPv4 and IPv6",
        "`docker inspect` of a container",
        "`network create` with its options, `network inspect`",
    ],
)
def test_as_on_dockers_own_bridge(sides: tuple[Side, Side], title: str) -> None:
    """Of what test_equality compares, that which newer engines do otherwise than older ones."""
    compare(sides, title)
