"""The Docker plugin protocol, case by case, against the running product.

Cases are named T (transport), N (networks), E (endpoints) and I (IPAM); each says in its first line what an engine
sends and what must come of it. Engines differ: numbers in brackets are the versions that behave like this.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest

from tests.netns.docker_api import DockerApi
from tests.netns.plugin import GATEWAY, Endpoint, Network, Plugin, encode, fresh_pool, wait_until
from weft.api import MAX_BODY
from weft.ipam import GLOBAL_SPACE, LOCAL_SPACE
from weft.model import ADDRESSES, NETWORKS, POOLS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

PORTS = {
    "com.docker.network.portmap": [
        {"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 8080, "HostPortEnd": 8080}
    ],
    "com.docker.network.endpoint.exposedports": [{"Proto": 6, "Port": 80}],
}


@dataclass(frozen=True, slots=True)
class Scene:
    """What a case may act on: one plugin, a second one on another host with the same store, the first one's Docker."""

    plugin: Plugin
    peer: Plugin
    docker: DockerApi
    folder: Path


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("conformance")
    docker = DockerApi(folder / "docker.sock")
    pools = "10.64.0.0/22:24 fd77::/62:64"
    plugin = Plugin(folder / "h1", docker=docker.url, gc_grace="0.2", pools=pools)
    peer = Plugin(folder / "h2", "192.168.78.2", plugin.store_path, pools=pools)
    try:
        plugin.start()
        peer.start()
        yield Scene(plugin, peer, docker, folder)
    finally:
        plugin.close()
        peer.close()
        docker.close()
    for log in (plugin.log, peer.log):
        assert "Traceback" not in log.read_text()
        assert "a bug" not in log.read_text()


Case = Callable[[Scene], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__.upper()] = function
    return function


# Transport and activation


@case
def t1(s: Scene) -> None:
    """Plugin.Activate without body, Content-Type and Host is answered with JSON and a length."""
    reply = s.plugin.call("Plugin.Activate")
    assert (reply.status, reply.body) == (200, {"Implements": ["NetworkDriver", "IpamDriver"]})
    assert int(reply.headers["content-length"]) > 0


@case
def t2(s: Scene) -> None:
    """With `Host: plugin.moby.localhost` and keep-alive, the next call uses the same connection."""
    with s.plugin.connect() as connection:
        for name in ("Plugin.Activate", "NetworkDriver.GetCapabilities", "IpamDriver.GetCapabilities"):
            assert connection.call(name, b"", host="plugin.moby.localhost").status == 200
        assert not connection.ends(4)  # what the engine sends meanwhile would be lost


@case
def t3(s: Scene) -> None:
    """GetCapabilities comes many times and says the same each time, without side effects."""
    before = s.plugin.stored(), s.plugin.links(), s.plugin.overlay_links().keys()
    said = [
        (s.plugin.call("NetworkDriver.GetCapabilities").body, s.plugin.call("IpamDriver.GetCapabilities").body)
        for _ in range(3)
    ]
    assert said == [said[0]] * 3
    assert said[0][0]["Scope"] == "local"
    assert not said[0][0].get("GwAllocChecker")
    assert said[0][1] == {"RequiresMACAddress": False, "RequiresRequestReplay": False}
    assert (s.plugin.stored(), s.plugin.links(), s.plugin.overlay_links().keys()) == before


@case
def t4(s: Scene) -> None:
    """An unknown method gets 404 with `Err`."""
    reply = s.plugin.call("NetworkDriver.Foo", {})
    assert reply.status == 404
    assert "NetworkDriver.Foo" in reply.body["Err"]


@case
def t5(s: Scene) -> None:
    """CreateEndpoint without a body, as a retry after a cut connection comes, is an error and makes nothing."""
    before = s.plugin.stored()
    reply = s.plugin.call("NetworkDriver.CreateEndpoint")
    assert 400 <= reply.status < 500
    assert "missing" in reply.refusal
    assert s.plugin.stored() == before


@case
def t6(s: Scene) -> None:
    """A malformed, cut or huge body gets 4xx, and the process survives."""
    process = s.plugin.process
    for body in (b"{", b"\xff\xfe", b"[]", b'"x"', b"{}}", b"[" * 50_000, b" " * (MAX_BODY + 1)):
        with s.plugin.connect() as connection:
            reply = connection.call("NetworkDriver.CreateEndpoint", body)
            assert 400 <= reply.status < 500, body[:20]
            assert reply.refusal
    assert s.plugin.answers()
    assert s.plugin.process is process


@case
def t7(s: Scene) -> None:
    """CreateEndpoint is cut off and repeated without body: an error; the half-made endpoint is collected."""
    network = s.plugin.network()
    endpoint = s.plugin.addressed(network)
    with s.plugin.connect() as connection:
        connection.send("NetworkDriver.CreateEndpoint", encode(endpoint.request()))
    assert s.plugin.call("NetworkDriver.CreateEndpoint").refusal
    wait_until(lambda: len(s.plugin.veth(endpoint)) == 2, "the half-made endpoint's veth")
    with s.docker.has(network):
        wait_until(lambda: not s.plugin.mentions(endpoint.address), "its collection")
    assert not s.plugin.mentions(endpoint.id)
    assert not s.plugin.veth(endpoint)


@case
def t8(s: Scene) -> None:
    """50 parallel calls for different endpoints of one network, and one that is sent slowly, do not wait long."""
    network = s.plugin.network()
    endpoints = [Endpoint(network, token_hex(32), network.address(100 + number)) for number in range(50)]

    def create(endpoint: Endpoint) -> float:
        began = time.monotonic()
        s.plugin.request_address(network.pool_id, endpoint.address)
        s.plugin.ok("CreateEndpoint", **endpoint.request())
        return time.monotonic() - began

    with s.plugin.connect() as slow:
        request = encode(Endpoint(network, token_hex(32), network.address(99)).request())
        slow.send("NetworkDriver.CreateEndpoint", request, cut=200)
        with ThreadPoolExecutor(50) as pool:
            took = sorted(pool.map(create, endpoints))
    assert took[-1] < 20
    assert {endpoint.veth[1] for endpoint in endpoints} <= s.plugin.links().keys()


@case
def t9(s: Scene) -> None:
    """Other methods than POST are refused."""
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        with s.plugin.connect() as connection:
            assert connection.call("Plugin.Activate", b"", method=method).status in (404, 405)


@case
def t10(s: Scene) -> None:
    """While the plugin starts there is no socket, or the right answer; never an error from GetCapabilities."""
    s.plugin.stop()
    s.plugin.spawn()
    answers = 0
    deadline = time.monotonic() + 15
    while answers < 20:
        assert time.monotonic() < deadline
        try:
            connection = s.plugin.connect()
        except OSError:
            time.sleep(0.005)
            continue
        with connection:
            reply = connection.call("NetworkDriver.GetCapabilities", b"")
        assert (reply.status, reply.body["Scope"]) == (200, "local")
        answers += 1


@case
def t11(s: Scene) -> None:
    """Fields in another case and fields of newer engines are no difference."""
    network, plain = s.plugin.network(), s.plugin.network()
    odd = {**{name.upper(): value for name, value in network.request().items()}, "FromTheFuture": [{"a": None}]}
    assert s.plugin.ok("CreateNetwork", **odd) == {}
    address = s.plugin.ok("RequestAddress", poolid=plain.pool_id, ADDRESS="", Extra={})["Address"].split("/")[0]
    request = Endpoint(plain, token_hex(32), address).request()
    interface = {name.lower(): value for name, value in request.pop("Interface").items()}
    answer = s.plugin.ok("CreateEndpoint", **request, interface={**interface, "New": 1}, Newer=None)
    assert answer["Interface"]["MacAddress"]


# Networks


@case
def n1(s: Scene) -> None:
    """CreateNetwork with one subnet and a gateway is stored before the answer."""
    network = s.plugin.network()
    vni = s.plugin.vni(network)
    record = s.plugin.record(f"{NETWORKS}{vni}")
    assert [(pool["cidr"], pool["gateway"]) for pool in record["pools"]] == [(network.cidr, network.gateway)]
    assert s.plugin.record(f"{POOLS}{network.cidr}")["vni"] == vni
    assert s.plugin.record(f"{ADDRESSES}{network.cidr}/{network.gateway}")["kind"] == "gateway"


@case
def n2(s: Scene) -> None:
    """The same CreateNetwork twice changes nothing, nor does one with other data; there is one data plane."""
    network = s.plugin.network()
    s.plugin.endpoint(network)
    before, devices = s.plugin.stored(), s.plugin.overlay_links().keys()
    assert s.plugin.ok("CreateNetwork", **network.request()) == {}
    other = replace(network, gateway=network.address(77))
    assert other.gateway in s.plugin.refused("CreateNetwork", **other.request())
    assert (s.plugin.stored(), s.plugin.overlay_links().keys()) == (before, devices)


@case
def n3(s: Scene) -> None:
    """CreateNetwork without Gateway [28+]; without AuxAddresses, with none of them, and with one."""
    for auxiliary, kinds in ((None, []), ({}, []), ({"router": 9}, ["auxiliary"])):
        cidr = fresh_pool()
        data: dict[str, Any] = {"AddressSpace": LOCAL_SPACE, "Pool": cidr}
        if auxiliary is not None:
            data["AuxAddresses"] = {name: f"{ip_network(cidr)[number]}/24" for name, number in auxiliary.items()}
        request = Network(token_hex(32), cidr, s.plugin.request_pool(cidr), "").request()
        assert s.plugin.ok("CreateNetwork", **{**request, "IPv4Data": [data]}) == {}
        assert [json.loads(held)["kind"] for held in s.plugin.stored(f"{ADDRESSES}{cidr}/").values()] == kinds


@case
def n4(s: Scene) -> None:
    """A network of IPv6 alone [28+]: containers of two hosts reach each other, whatever addresses they have."""
    cidr = fresh_pool(v6=True)
    network, same = s.plugin.network(cidr), s.peer.network(cidr)
    here = s.plugin.endpoint(network)
    there = [s.peer.endpoint(same), s.peer.endpoint(same, str(ip_network(cidr)[(1 << 40) + 5]))]
    alike = s.peer.endpoint(same, str(ip_network(cidr)[5]))  # of which one has the last four bytes
    assert len({endpoint.mac for endpoint in (here, alike, *there)}) == 4
    with cable(s), ExitStack() as settled:
        inside = settled.enter_context(settle(s.plugin, here))
        for endpoint in there:
            settled.enter_context(settle(s.peer, endpoint))
            ping = ("ip", "netns", "exec", inside, "busybox", "ping", "-6", "-c1", "-W1", endpoint.address)
            wait_until(lambda p=ping: "1 packets received" in s.plugin.host.run(*p, check=False), "an answer")  # type: ignore[misc]


@case
def n5(s: Scene) -> None:
    """An unknown option is refused by name and leaves nothing; two subnets are one network, unless they overlap."""
    pools = [fresh_pool(), fresh_pool()]
    network, _ = (Network(token_hex(32), pool, s.plugin.request_pool(pool), "") for pool in pools)
    data = [{"AddressSpace": LOCAL_SPACE, "Pool": pool} for pool in pools]
    before = s.plugin.stored()
    request = network.request()
    odd = {"com.docker.network.generic": {"colour": "blue"}}
    assert "colour" in s.plugin.refused("CreateNetwork", **{**request, "IPv4Data": data[:1], "Options": odd})
    assert "overlap" in s.plugin.refused("CreateNetwork", **{**request, "IPv4Data": [data[0], data[0]]})
    assert s.plugin.stored() == before
    assert s.plugin.ok("CreateNetwork", **{**request, "IPv4Data": data}) == {}
    vni = s.plugin.vni(network)
    assert [s.plugin.record(f"{POOLS}{pool}")["vni"] for pool in pools] == [vni, vni]


@case
def n6(s: Scene) -> None:
    """An internal network is remembered as such; Join gives no gateway (it never does)."""
    network = s.plugin.network(internal=True)
    assert s.plugin.record(f"{NETWORKS}{s.plugin.vni(network)}")["internal"] is True
    # No way out but to the resolver, and that once for each sandbox: two would be refused by the kernel.
    first, second = s.plugin.endpoint(network), s.plugin.endpoint(network)
    s.plugin.join(first, route="169.254.77.53/32")
    s.plugin.join(second)
    s.plugin.join(s.plugin.endpoint(network), "/run/docker/netns/other", route="169.254.77.53/32")
    s.plugin.ok("Leave", **first.ids)
    s.plugin.join(second, route="169.254.77.53/32")


@case
def n7(s: Scene) -> None:
    """CreateNetwork on a host that cannot make devices is refused and leaves nothing: no DeleteNetwork follows."""
    s.plugin.restart(("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"))
    try:
        cidr = fresh_pool()
        pool_id = s.plugin.request_pool(cidr)
        network = Network(token_hex(32), cidr, pool_id, s.plugin.request_gateway(pool_id))
        before = s.plugin.stored()
        assert "CAP_NET_ADMIN" in s.plugin.refused("CreateNetwork", **network.request())
        assert s.plugin.stored() == before
        s.plugin.ok("ReleaseAddress", PoolID=pool_id, Address=network.gateway)
        s.plugin.ok("ReleasePool", PoolID=pool_id)
        assert not s.plugin.mentions(cidr)
    finally:
        s.plugin.restart()


@case
def n8(s: Scene) -> None:
    """DeleteNetwork, again, and of an unknown one: done each time; the devices are gone."""
    network = s.plugin.network()
    vni = s.plugin.vni(network)
    s.plugin.remove(s.plugin.endpoint(network))
    assert len(s.plugin.devices(vni)) == 2
    s.plugin.remove_network(network)
    for network_id in (network.id, token_hex(32)):
        assert s.plugin.ok("DeleteNetwork", NetworkID=network_id) == {}
    wait_until(lambda: not s.plugin.devices(vni), "the devices' end")
    assert not s.plugin.mentions(network.cidr)


@case
def n9(s: Scene) -> None:
    """DeleteNetwork while endpoints are known takes them along."""
    network = s.plugin.network()
    endpoint = s.plugin.endpoint(network)
    s.plugin.join(endpoint)
    s.plugin.remove_network(network)
    assert not s.plugin.mentions(endpoint.id)
    assert not s.plugin.mentions(endpoint.address)
    assert not s.plugin.veth(endpoint)


@case
def n10(s: Scene) -> None:
    """A Swarm network's id has 25 characters of base 36; names made of ids are valid and no longer than 15."""
    network = s.plugin.network(network_id="vbxlcnlvxqyb2xlshsetwdnsd")
    endpoint = s.plugin.endpoint(network)
    assert s.plugin.join(endpoint) in s.plugin.links()
    assert all(len(name) <= 15 for name in [*s.plugin.links(), *s.plugin.overlay_links()])
    s.plugin.remove(endpoint)
    s.plugin.remove_network(network)


@case
def n11(s: Scene) -> None:
    """After a restart of the plugin an endpoint needs no CreateNetwork."""
    network = s.plugin.network()
    s.plugin.restart()
    assert s.plugin.join(s.plugin.endpoint(network)) in s.plugin.links()
    assert len(s.plugin.devices(s.plugin.vni(network))) == 2


@case
def n12(s: Scene) -> None:
    """After a reboot (all devices gone) an endpoint rebuilds the data plane, peers' rows included."""
    network = s.plugin.network()
    vni = s.plugin.vni(network)
    s.plugin.endpoint(network)
    remote = s.peer.endpoint(s.peer.network(network.cidr))
    s.plugin.stop()
    s.plugin.host.run("umount", "/run/docker/weft/dp")
    s.plugin.host.run("rm", "/run/docker/weft/dp")
    s.plugin.start()
    endpoint = s.plugin.endpoint(network)
    assert s.plugin.join(endpoint) in s.plugin.links()
    assert len(s.plugin.devices(vni)) == 2
    wait_until(lambda: s.plugin.vteps(vni).get(remote.mac) == s.peer.host.address, "the peer's rows")
    assert s.plugin.neighbours(vni)[remote.address] == remote.mac


@case
def n13(s: Scene) -> None:
    """GwAllocCheck [28+] is not announced; asked, it answers the same always and changes nothing."""
    before = s.plugin.stored()
    options = {"com.docker.network.generic": {}, "com.docker.network.internal": True}
    for asked in ({}, options):
        assert s.plugin.ok("GwAllocCheck", Options=asked) == {"SkipIPv4": False, "SkipIPv6": False}
    assert s.plugin.stored() == before


@case
def n14(s: Scene) -> None:
    """The engine releases the gateway and the pool before DeleteNetwork: that needs no pool, and nothing is left."""
    network = s.plugin.network()
    assert s.plugin.ok("ReleaseAddress", PoolID=network.pool_id, Address=network.gateway) == {}
    assert s.plugin.ok("ReleasePool", PoolID=network.pool_id) == {}
    assert s.plugin.ok("DeleteNetwork", NetworkID=network.id) == {}
    assert not s.plugin.mentions(network.cidr)
    assert not s.plugin.mentions(network.id)


# Endpoints


@contextmanager
def sandbox(plugin: Plugin) -> Iterator[str]:
    """The name of a container's network namespace."""
    name = f"sandbox-{token_hex(4)}"
    plugin.host.run("ip", "netns", "add", name)
    try:
        yield name
    finally:
        plugin.host.run("ip", "netns", "del", name, check=False)


def move_in(plugin: Plugin, interface: str, name: str) -> None:
    plugin.host.run("ip", "link", "set", interface, "netns", name, "name", "eth0")
    plugin.host.run("ip", "-n", name, "link", "set", "eth0", "up")


def move_out(plugin: Plugin, interface: str, name: str) -> None:
    """As the engine does between Leave and DeleteEndpoint."""
    plugin.host.run("ip", "-n", name, "link", "set", "eth0", "down")
    plugin.host.run("ip", "-n", name, "link", "set", "eth0", "netns", str(plugin.host.pid), "name", interface)


@contextmanager
def settle(plugin: Plugin, endpoint: Endpoint) -> Iterator[str]:
    """Do what an engine does with Join's answer; yields the name of the container's namespace."""
    with sandbox(plugin) as name:
        move_in(plugin, plugin.join(endpoint, f"/run/netns/{name}"), name)
        length = endpoint.network.cidr.split("/")[1]
        plugin.host.run("ip", "-n", name, "addr", "add", f"{endpoint.address}/{length}", "dev", "eth0", "nodad")
        yield name


@contextmanager
def cable(s: Scene) -> Iterator[None]:
    """Between the two hosts, which have none otherwise."""
    here, there = s.plugin.host, s.peer.host
    here.run("ip", "link", "add", "wire", "type", "veth", "peer", "wire", "netns", str(there.pid))
    for host, other in ((here, there), (there, here)):
        host.run("ip", "link", "set", "wire", "up")
        host.run("ip", "route", "add", f"{other.address}/32", "dev", "wire")
    try:
        yield
    finally:
        here.run("ip", "link", "del", "wire")


def check_joined(plugin: Plugin, endpoint: Endpoint, key: str) -> None:
    """Join answers an interface that is in the host's namespace and connected: its other end is up, on the bridge."""
    name = plugin.join(endpoint, key)
    interface, port = plugin.links()[name], plugin.overlay_links()[endpoint.veth[0]]
    assert (interface["address"], interface["mtu"]) == (endpoint.mac, 1450)
    assert (port["master"], port["mtu"]) == (f"br{plugin.vni(endpoint.network)}", 1450)
    assert "UP" in port["flags"]


@case
def e1(s: Scene) -> None:
    """CreateEndpoint with an address is answered with a MAC alone: locally administered, stable."""
    network = s.plugin.network()
    endpoint = s.plugin.addressed(network)
    answer = s.plugin.ok("CreateEndpoint", **endpoint.request())
    mac = answer["Interface"]["MacAddress"]
    assert answer == {"Interface": {"MacAddress": mac}}
    assert int(mac[:2], 16) & 3 == 2
    assert s.plugin.ok("CreateEndpoint", **endpoint.request()) == answer


@case
def e2(s: Scene) -> None:
    """CreateEndpoint with a MAC: nothing is echoed, and the interface has it."""
    network = s.plugin.network()
    endpoint = s.plugin.addressed(network, mac="02:11:22:33:44:55")
    assert s.plugin.ok("CreateEndpoint", **endpoint.request()) == {"Interface": {}}
    assert s.plugin.links()[s.plugin.join(endpoint)]["address"] == endpoint.mac


@case
def e3(s: Scene) -> None:
    """Ports, a MAC in base64, DNS servers and options of others are no obstacle to CreateEndpoint."""
    network = s.plugin.network()
    endpoint = s.plugin.addressed(network)
    options: dict[str, Any] = {
        **PORTS,
        "com.docker.network.endpoint.macaddress": "AhEiM0RV",
        "com.docker.network.endpoint.dnsservers": ["9.9.9.9"],
        "com.example.colour": "blue",
    }
    assert s.plugin.ok("CreateEndpoint", **{**endpoint.request(), "Options": options})["Interface"]["MacAddress"]


@case
def e4(s: Scene) -> None:
    """CreateEndpoint on an unknown network is refused."""
    network = replace(s.plugin.network(), id=token_hex(32))
    endpoint = s.plugin.addressed(network)
    assert network.id[:12] in s.plugin.refused("CreateEndpoint", **endpoint.request())
    assert not s.plugin.mentions(endpoint.id)


@case
def e5(s: Scene) -> None:
    """CreateEndpoint twice is the same; with another address it is refused, without damage."""
    network = s.plugin.network()
    endpoint = s.plugin.endpoint(network, network.address(76))
    before = s.plugin.stored()
    again = s.plugin.ok("CreateEndpoint", **replace(endpoint, mac="").request())
    assert again["Interface"]["MacAddress"] == endpoint.mac
    other = replace(endpoint, address=network.address(77), mac="")
    assert endpoint.id[:12] in s.plugin.refused("CreateEndpoint", **other.request())
    assert s.plugin.stored() == before
    assert s.plugin.join(endpoint) in s.plugin.links()


@case
def e6(s: Scene) -> None:
    """Join with a sandbox that does not exist yet [up to 27], or that nobody could open: it is not opened."""
    hangs = s.folder / "sandbox"
    os.mkfifo(hangs)
    for key in ("/var/run/docker/netns/0123456789ab", str(hangs)):
        check_joined(s.plugin, s.plugin.endpoint(s.plugin.network()), key)


@case
def e7(s: Scene) -> None:
    """Join with a sandbox that exists [28+]."""
    with sandbox(s.plugin) as name:
        check_joined(s.plugin, s.plugin.endpoint(s.plugin.network()), f"/run/netns/{name}")


@case
def e8(s: Scene) -> None:
    """Join of an unknown endpoint is refused; the Leave [29+] and DeleteEndpoint that follow are done."""
    endpoint = Endpoint(s.plugin.network(), token_hex(32), "")
    assert endpoint.id[:12] in s.plugin.refused("Join", **endpoint.ids, SandboxKey="/x", Options={})
    for call in ("Leave", "DeleteEndpoint"):
        assert s.plugin.ok(call, **endpoint.ids) == {}


@case
def e9(s: Scene) -> None:
    """Join twice is the same."""
    endpoint = s.plugin.endpoint(s.plugin.network())
    assert s.plugin.join(endpoint) == s.plugin.join(endpoint)
    assert len(s.plugin.veth(endpoint)) == 2


@case
def e10(s: Scene) -> None:
    """Join, Leave, DeleteEndpoint as in a container's life: the veth is in the sandbox, comes back, and is gone."""
    endpoint = s.plugin.endpoint(s.plugin.network())
    name = s.plugin.join(endpoint)
    with sandbox(s.plugin) as inside:
        move_in(s.plugin, name, inside)
        s.plugin.ok("Leave", **endpoint.ids)
        move_out(s.plugin, name, inside)
        assert len(s.plugin.veth(endpoint)) == 2
        s.plugin.ok("DeleteEndpoint", **endpoint.ids)
    assert not s.plugin.veth(endpoint)
    s.plugin.release(endpoint)
    assert not s.plugin.mentions(endpoint.id)


@case
def e11(s: Scene) -> None:
    """Leave twice [29+ when it undoes a Join], then DeleteEndpoint."""
    endpoint = s.plugin.endpoint(s.plugin.network())
    s.plugin.join(endpoint)
    for call in ("Leave", "Leave", "DeleteEndpoint"):
        assert s.plugin.ok(call, **endpoint.ids) == {}
    assert not s.plugin.veth(endpoint)


@case
def e12(s: Scene) -> None:
    """DeleteEndpoint without Join or Leave [up to 28]."""
    endpoint = s.plugin.endpoint(s.plugin.network())
    assert s.plugin.ok("DeleteEndpoint", **endpoint.ids) == {}
    assert not s.plugin.veth(endpoint)
    s.plugin.release(endpoint)
    assert not s.plugin.mentions(endpoint.id)


@case
def e13(s: Scene) -> None:
    """Leave and DeleteEndpoint of what is unknown are done, twice; on a known network and on an unknown one."""
    known = s.plugin.network()
    for network in (known, replace(known, id=token_hex(32))):
        for call in ("Leave", "Leave", "DeleteEndpoint", "DeleteEndpoint"):
            assert s.plugin.ok(call, **Endpoint(network, token_hex(32), "").ids) == {}


@case
def e14(s: Scene) -> None:
    """Leave and DeleteEndpoint after the interface went with the container's namespace."""
    endpoint = s.plugin.endpoint(s.plugin.network())
    with sandbox(s.plugin) as inside:
        move_in(s.plugin, s.plugin.join(endpoint), inside)
    wait_until(lambda: not s.plugin.veth(endpoint), "the namespace's end")
    s.plugin.remove(endpoint)
    assert not s.plugin.mentions(endpoint.id)


@case
def e15(s: Scene) -> None:
    """EndpointOperInfo of an endpoint that is known, left, deleted or was never there: at once, the same."""
    endpoint = s.plugin.endpoint(s.plugin.network())
    s.plugin.join(endpoint)
    began = time.monotonic()
    for call in ("EndpointOperInfo", "Leave", "EndpointOperInfo", "DeleteEndpoint", "EndpointOperInfo"):
        assert s.plugin.ok(call, **endpoint.ids) == ({"Value": {}} if call == "EndpointOperInfo" else {})
    assert s.plugin.ok("EndpointOperInfo", NetworkID=token_hex(32), EndpointID=token_hex(32)) == {"Value": {}}
    assert time.monotonic() - began < 5


def published(plugin: Plugin) -> list[str]:
    """Sockets that listen on the host, and what the packet filter and the routes would have of a published port."""
    sockets = plugin.host.run("cat", "/proc/thread-self/net/tcp", "/proc/thread-self/net/udp")
    tables = plugin.host.run("cat", "/proc/thread-self/net/ip_tables_names", check=False)
    return [*(line.split()[1] for line in sockets.splitlines()), tables, plugin.host.run("ip", "route")]


def check_nothing_is_published(s: Scene, network: Network, *calls: str) -> None:
    before = published(s.plugin)
    endpoint = s.plugin.endpoint(network)
    for call in calls:
        if call == "Join":
            s.plugin.join(endpoint)
        else:
            assert s.plugin.ok(call, **endpoint.ids, Options=PORTS) == {}
        assert published(s.plugin) == before
    assert not s.plugin.veth(endpoint)


PROGRAM, REVOKE = "ProgramExternalConnectivity", "RevokeExternalConnectivity"


@case
def e16(s: Scene) -> None:
    """Program and Revoke are not for a driver without gateways: done, for unknown endpoints too, and nothing is."""
    check_nothing_is_published(s, s.plugin.network(), PROGRAM, REVOKE, "DeleteEndpoint", REVOKE, PROGRAM)


@case
def e17(s: Scene) -> None:
    """The order for a gateway driver: Program after Join, Revoke and Program when the gateway moves, Leave without."""
    network = s.plugin.network()
    check_nothing_is_published(s, network, "Join", PROGRAM, REVOKE, "Leave", "DeleteEndpoint")
    check_nothing_is_published(s, network, "Join", PROGRAM, REVOKE, PROGRAM, "Leave", "DeleteEndpoint")


@case
def e18(s: Scene) -> None:
    """Program on an internal network [29+] publishes nothing."""
    check_nothing_is_published(s, s.plugin.network(internal=True), "Join", PROGRAM, REVOKE, "Leave", "DeleteEndpoint")


@case
def e19(s: Scene) -> None:
    """CreateEndpoint that the kernel refuses removes what it had made: no DeleteEndpoint follows."""
    network = s.plugin.network()
    endpoint = s.plugin.addressed(network)
    s.plugin.host.run("ip", "link", "add", endpoint.veth[1], "type", "bridge")
    assert endpoint.veth[0] in s.plugin.refused("CreateEndpoint", **endpoint.request())
    assert s.plugin.veth(endpoint) == {endpoint.veth[1]}
    assert f"topology/endpoints/{s.plugin.vni(network)}/{endpoint.id}" not in s.plugin.stored()
    s.plugin.release(endpoint)
    assert not s.plugin.mentions(endpoint.id)
    assert not s.plugin.mentions(endpoint.address)


@case
def e20(s: Scene) -> None:
    """The engine dies after CreateEndpoint: the endpoint is collected, and its address."""
    network = s.plugin.network()
    living, dead = s.plugin.endpoint(network), s.plugin.endpoint(network)
    with s.docker.has(network, endpoints=(living,)):
        wait_until(lambda: not s.plugin.mentions(dead.address), "the address's collection")
    assert not s.plugin.mentions(dead.id)
    assert not s.plugin.veth(dead)
    assert len(s.plugin.veth(living)) == 2


@case
def e21(s: Scene) -> None:
    """A sandbox on two networks, in both orders of CreateEndpoint and Join."""
    networks = [s.plugin.network(), s.plugin.network()]
    with sandbox(s.plugin) as inside:
        for network in networks:
            check_joined(s.plugin, s.plugin.endpoint(network), f"/run/netns/{inside}")
        for endpoint in [s.plugin.endpoint(network) for network in networks][::-1]:
            check_joined(s.plugin, endpoint, f"/run/netns/{inside}")


def rows(plugin: Plugin, vni: int, endpoint: Endpoint) -> tuple[str | None, str | None]:
    """What a host knows of an endpoint elsewhere: its VTEP by its MAC, its MAC by its address."""
    return plugin.vteps(vni).get(endpoint.mac), plugin.neighbours(vni).get(endpoint.address)


@case
def e22(s: Scene) -> None:
    """Stop and start with another address, then with the same: the other host's rows follow, none is left."""
    network = s.plugin.network()
    vni = s.plugin.vni(network)
    s.peer.endpoint(s.peer.network(network.cidr))
    address = ""
    for _ in range(3):
        endpoint = s.plugin.endpoint(network, address)
        known = (s.plugin.host.address, endpoint.mac)
        wait_until(lambda: rows(s.peer, vni, endpoint) == known, "the new rows")  # noqa: B023
        s.plugin.remove(endpoint)
        wait_until(lambda: rows(s.peer, vni, endpoint) == (None, None), "the old rows' end")  # noqa: B023
        address = address or endpoint.address


@case
def e23(s: Scene) -> None:
    """An address moves to the other host right after DeleteEndpoint here: no entry points to the old place."""
    network = s.plugin.network()
    there = s.peer.network(network.cidr)
    vni = s.plugin.vni(network)
    s.plugin.endpoint(network)
    s.peer.endpoint(there)
    endpoint = s.plugin.endpoint(network)
    wait_until(lambda: rows(s.peer, vni, endpoint)[0] == s.plugin.host.address, "the peer's rows")
    s.plugin.remove(endpoint)
    moved = s.peer.endpoint(there, endpoint.address)
    assert moved.mac == endpoint.mac
    wait_until(lambda: rows(s.plugin, vni, moved) == (s.peer.host.address, moved.mac), "our rows")
    wait_until(lambda: rows(s.peer, vni, moved) == (None, None), "the end of the peer's")


@case
def e24(s: Scene) -> None:
    """DiscoverNew and DiscoverDelete, with BindAddress and without."""
    for call in ("DiscoverNew", "DiscoverDelete"):
        for bind in ({}, {"BindAddress": "192.168.78.9"}):
            data = {"Address": "192.168.78.9", **bind, "Self": not bind}
            assert s.plugin.ok(call, DiscoveryType=1, DiscoveryData=data) == {}


# IPAM

_wide_numbers = count(1)


def wide_pool() -> tuple[str, str]:
    """A fresh /16 and a /24 in it."""
    number = next(_wide_numbers)
    return f"10.{number}.0.0/16", f"10.{number}.4.0/24"


def check_refused_without_trace(plugin: Plugin, name: str, **fields: Any) -> str:
    before = plugin.stored()
    message = plugin.refused(name, **fields)
    assert plugin.stored() == before
    return message


@case
def i1(s: Scene) -> None:
    """GetDefaultAddressSpaces: two names, different, always the same."""
    said = [s.plugin.call("IpamDriver.GetDefaultAddressSpaces").body for _ in range(3)]
    assert said == [{"LocalDefaultAddressSpace": LOCAL_SPACE, "GlobalDefaultAddressSpace": GLOBAL_SPACE}] * 3
    assert LOCAL_SPACE != GLOBAL_SPACE


@case
def i2(s: Scene) -> None:
    """RequestPool with a SubPool: automatic addresses are in it."""
    pool, sub = wide_pool()
    pool_id = s.plugin.request_pool(pool, sub)
    assert all(ip_address(s.plugin.request_address(pool_id)) in ip_network(sub) for _ in range(5))


@case
def i3(s: Scene) -> None:
    """The same RequestPool again has the same PoolID, before and after CreateNetwork, and changes nothing."""
    network = s.plugin.network()
    before = s.plugin.stored()
    assert s.plugin.request_pool(network.cidr) == network.pool_id
    pool, sub = wide_pool()
    assert s.plugin.request_pool(pool, sub) == s.plugin.request_pool(pool, sub)
    assert s.plugin.stored().keys() - before.keys() == {f"{POOLS}{pool}"}


def check_automatic_pools(s: Scene, v6: bool) -> None:
    pool_ids = [s.plugin.request_pool(v6=v6) for _ in range(4)]
    assert len(set(pool_ids)) == 4
    assert {ip_network(pool_id.partition("/")[2]).version for pool_id in pool_ids} == {6 if v6 else 4}
    asked = {"AddressSpace": LOCAL_SPACE, "Pool": "", "SubPool": "", "Options": {}, "V6": v6}
    for _ in range(2):
        assert "no free" in s.plugin.refused("RequestPool", **asked)
    for pool_id in pool_ids:
        assert s.plugin.ok("ReleasePool", PoolID=pool_id) == {}
    s.plugin.ok("ReleasePool", PoolID=s.plugin.request_pool(v6=v6))


@case
def i4(s: Scene) -> None:
    """RequestPool without a Pool: another one each time, an error when there is none left."""
    check_automatic_pools(s, v6=False)


@case
def i5(s: Scene) -> None:
    """The same for IPv6."""
    check_automatic_pools(s, v6=True)


@case
def i6(s: Scene) -> None:
    """RequestPool with a SubPool alone or outside, a bad CIDR, host bits, the wrong family or a strange space."""
    asked = {"AddressSpace": LOCAL_SPACE, "Pool": fresh_pool(), "SubPool": "", "Options": None, "V6": False}
    for wrong in (
        {"Pool": "", "SubPool": "10.1.4.0/24"},
        {"SubPool": "10.1.4.0/24"},
        {"Pool": "10.1.0.0/33"},
        {"Pool": "ten"},
        {"Pool": "10.1.0.1/24"},
        {"Pool": "fd00:ffff::/64"},
        {"AddressSpace": "LocalDefault"},
    ):
        check_refused_without_trace(s.plugin, "RequestPool", **{**asked, **wrong})


@case
def i7(s: Scene) -> None:
    """RequestAddress for the gateway: in the pool, with its prefix length; the same when it is asked for again."""
    pool_id = s.plugin.request_pool(fresh_pool())
    gateway = s.plugin.request_gateway(pool_id)
    assert [s.plugin.request_gateway(pool_id, again) for again in ("", gateway)] == [gateway, gateway]
    assert gateway not in {s.plugin.request_address(pool_id) for _ in range(3)}


@case
def i8(s: Scene) -> None:
    """RequestAddress for one that is free; then taken, the gateway's, outside, the network's, the broadcast."""
    network = s.plugin.network()
    free = network.address(77)
    assert s.plugin.request_address(network.pool_id, free) == free
    for address in (free, network.gateway, "10.255.255.1", network.address(0), network.address(255)):
        assert address in check_refused_without_trace(
            s.plugin, "RequestAddress", PoolID=network.pool_id, Address=address, Options=None
        )


@case
def i9(s: Scene) -> None:
    """An auxiliary address may be outside the SubPool, inside the Pool."""
    pool, sub = wide_pool()
    outside = str(ip_network(pool)[5])
    assert s.plugin.request_address(s.plugin.request_pool(pool, sub), outside) == outside


@case
def i10(s: Scene) -> None:
    """RequestAddress for an endpoint with options null, with a MAC, with a container's name [29+]."""
    pool_id = s.plugin.request_pool(fresh_pool())
    mac = {"com.docker.network.endpoint.macaddress": "02:42:0a:00:00:09"}
    options: tuple[Any, ...] = (None, {}, mac, {**mac, "com.docker.network.endpoint.name": "web"})
    assert len({s.plugin.request_address(pool_id, "", given) for given in options}) == 4


@case
def i11(s: Scene) -> None:
    """ReleaseAddress of a known address, again, of an unknown one, of an unknown pool: done each time."""
    network = s.plugin.network()
    address = s.plugin.request_address(network.pool_id)
    for pool_id, one in (
        (network.pool_id, address),
        (network.pool_id, address),
        (network.pool_id, network.address(99)),
        (f"{LOCAL_SPACE}/172.31.0.0/24", "172.31.0.2"),
        ("LocalDefault/10.0.0.0/8", "10.0.0.2"),
    ):
        assert s.plugin.ok("ReleaseAddress", PoolID=pool_id, Address=one) == {}
    assert s.plugin.request_address(network.pool_id, address) == address


@case
def i12(s: Scene) -> None:
    """ReleasePool with addresses still taken frees them."""
    pool = fresh_pool()
    pool_id = s.plugin.request_pool(pool)
    s.plugin.request_gateway(pool_id)
    s.plugin.request_address(pool_id)
    assert s.plugin.ok("ReleasePool", PoolID=pool_id) == {}
    assert not s.plugin.mentions(pool)


@case
def i13(s: Scene) -> None:
    """ReleasePool twice, and of an unknown pool: done."""
    pool_id = s.plugin.request_pool(fresh_pool())
    for one in (pool_id, pool_id, f"{LOCAL_SPACE}/172.31.0.0/24", "nonsense"):
        assert s.plugin.ok("ReleasePool", PoolID=one) == {}


def replay(plugin: Plugin, network: Network, *endpoints: Endpoint) -> None:
    """What an engine asks again when it starts, if the driver wants that (weft does not)."""
    assert plugin.request_pool(network.cidr) == network.pool_id
    assert plugin.request_gateway(network.pool_id, network.gateway) == network.gateway
    for endpoint in endpoints:
        assert plugin.request_address(network.pool_id, endpoint.address) == endpoint.address


@case
def i14(s: Scene) -> None:
    """Replay after a restart that kept the store: all is confirmed, nothing changes."""
    network = s.plugin.network()
    endpoints = [s.plugin.endpoint(network), s.plugin.endpoint(network)]
    before = s.plugin.stored()
    s.plugin.restart()
    replay(s.plugin, network, *endpoints)
    assert s.plugin.stored() == before


@case
def i15(s: Scene) -> None:
    """Replay with an empty store: all is given, and recorded."""
    network = s.plugin.network()
    endpoint = s.plugin.endpoint(network)
    empty = Plugin(s.folder / "h3", "192.168.78.3")
    try:
        empty.start()
        replay(empty, network, endpoint)
        assert f"{POOLS}{network.cidr}" in empty.stored()
        kinds = {key.rsplit("/")[-1]: json.loads(value)["kind"] for key, value in empty.stored(ADDRESSES).items()}
        assert kinds == {network.gateway: "gateway", endpoint.address: "endpoint"}
    finally:
        empty.close()


@case
def i16(s: Scene) -> None:
    """Replay, then the engine removes what was left of a crash."""
    network = s.plugin.network()
    stale = s.plugin.endpoint(network)
    replay(s.plugin, network, stale)
    s.plugin.remove(stale)
    assert not s.plugin.mentions(stale.id)
    assert not s.plugin.mentions(stale.address)


@case
def i17(s: Scene) -> None:
    """RequestPool proposes no gateway in `Data`, so the engine asks for one, and replay asks for that again."""
    pool = fresh_pool()
    asked = {"AddressSpace": LOCAL_SPACE, "Pool": pool, "SubPool": "", "Options": {}, "V6": False}
    answer = s.plugin.ok("RequestPool", **asked)
    assert not answer.get("Data")
    gateway = str(ip_network(pool)[254])
    assert [s.plugin.request_gateway(answer["PoolID"], gateway) for _ in range(2)] == [gateway, gateway]


@case
def i18(s: Scene) -> None:
    """A gateway is refused, and ReleasePool follows: nothing is taken."""
    before, pool = s.plugin.stored(), fresh_pool()
    pool_id = s.plugin.request_pool(pool)
    check_refused_without_trace(s.plugin, "RequestAddress", PoolID=pool_id, Address="10.255.255.1", Options=GATEWAY)
    s.plugin.ok("ReleasePool", PoolID=pool_id)
    assert s.plugin.stored() == before


@case
def i19(s: Scene) -> None:
    """An auxiliary address is refused, and only ReleasePool follows: the gateway is freed as well."""
    before, pool = s.plugin.stored(), fresh_pool()
    pool_id = s.plugin.request_pool(pool)
    gateway = s.plugin.request_gateway(pool_id)
    check_refused_without_trace(s.plugin, "RequestAddress", PoolID=pool_id, Address=gateway, Options=None)
    s.plugin.ok("ReleasePool", PoolID=pool_id)
    assert s.plugin.stored() == before


@case
def i20(s: Scene) -> None:
    """One address is asked for on two hosts at once: one of them gets it."""
    network = s.plugin.network()
    barrier = threading.Barrier(2)

    def ask(plugin: Plugin) -> list[bool]:
        won = []
        for number in range(100, 120):
            body = {"PoolID": network.pool_id, "Address": network.address(number), "Options": None}
            barrier.wait(10)
            won.append(not plugin.call("IpamDriver.RequestAddress", body).refusal)
        return won

    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(ask, (s.plugin, s.peer))
    assert all(one != other for one, other in zip(ours, theirs, strict=True))


@case
def i21(s: Scene) -> None:
    """Swarm: an address of the global space is confirmed in the local one; it is one allocation, the manager's."""
    network = s.plugin.network()
    manager = s.plugin.ok(
        "RequestPool", AddressSpace=GLOBAL_SPACE, Pool=network.cidr, SubPool="", Options=None, V6=False
    )["PoolID"]
    serial = {"com.docker.network.ipam.serial": "true"}
    address = s.plugin.request_address(manager, "", serial)
    assert s.peer.request_address(network.pool_id, address) == address
    held = f"{ADDRESSES}{network.cidr}/{address}"
    assert s.peer.ok("ReleaseAddress", PoolID=network.pool_id, Address=address) == {}
    assert held in s.plugin.stored()
    assert s.plugin.ok("ReleaseAddress", PoolID=manager, Address=address) == {}
    assert held not in s.plugin.stored()


@case
def i22(s: Scene) -> None:
    """CreateEndpoint is refused after RequestAddress: ReleaseAddress follows, and the address is free."""
    network = s.plugin.network()
    endpoint = s.plugin.addressed(network, mac="01:00:5e:00:00:01")
    assert endpoint.mac in s.plugin.refused("CreateEndpoint", **endpoint.request())
    s.plugin.release(endpoint)
    assert not s.plugin.mentions(endpoint.address)


@case
def i23(s: Scene) -> None:
    """IPv4 is given, IPv6 refused: nobody releases the IPv4 address, so it is collected."""
    network = s.plugin.network()
    address = s.plugin.request_address(network.pool_id)
    assert s.plugin.refused("RequestAddress", PoolID=f"{LOCAL_SPACE}/fd00:ffff::/64", Address="", Options=None)
    with s.docker.has(network):
        wait_until(lambda: not s.plugin.mentions(address), "the address's collection")
    assert s.plugin.mentions(network.id)


# All of them


def test_every_case_is_here() -> None:
    last = {"T": 11, "N": 14, "E": 24, "I": 23}
    assert list(CASES) == [f"{kind}{number}" for kind, end in last.items() for number in range(1, end + 1)]


@pytest.mark.parametrize("name", CASES)
def test_conformance(name: str, scene: Scene) -> None:
    CASES[name](scene)
