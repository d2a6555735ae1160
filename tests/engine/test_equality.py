"""Each Docker feature on weft and on Docker's own bridge network, with the same commands: what a user sees is the same.

A feature is a function that is run on both sides at once and tells what it saw there. What is true or false has to be
true, all else equal; where weft differs on purpose, the feature's `differs` says what is seen on bridge and on weft. Of
errors, both say how they begin or what they contain.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import pytest

from lab import Host
from lab.plan import PROJECT
from tests.engine.conftest import Cluster, eventually, reaches
from tests.engine.sides import OTHERS, Seen, Side

OUTSIDE, OUTSIDE6 = "192.168.78.2", "fd78::2"
HERE = ("192.168.78.1", "[fd78::1]")
WAY_OUT = "fd00:30::/64"
"""Of docker_gwbridge on the second host, where an administrator gave it IPv6."""

PRUNING = Lock()
"""An engine does that for one at a time."""

ECHO = """
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
    udp.bind(("::", 81))
    while True:
        udp.sendto(*udp.recvfrom(100))
"""


@dataclass(frozen=True)
class Feature:
    observe: Callable[[Side], Seen]
    differs: Mapping[str, tuple[object, object]]


FEATURES: dict[str, Feature] = {}
"""By their lines in docs/features.md."""


def feature(title: str, differs: Mapping[str, tuple[object, object]] | None = None) -> Callable[..., None]:
    def add(observe: Callable[[Side], Seen]) -> None:
        FEATURES[title] = Feature(observe, differs or {})

    return add


@pytest.fixture(scope="module")
def sides(engines: Cluster) -> Iterator[tuple[Side, Side]]:
    yield from furnished(engines)


def furnished(engines: Cluster) -> Iterator[tuple[Side, Side]]:
    """bridge and weft, each with its networks and the others on them: for weft on the second host."""
    h1, h2 = engines.h1, engines.h2
    for host, address in ((h1, "fd78::1"), (h2, OUTSIDE6)):
        host.run("ip", "addr", "add", f"{address}/64", "dev", "eth0", "nodad")
    gwbridge = "com.docker.network.bridge.name=docker_gwbridge"
    subnets = ["--ipv6", "--subnet", "172.30.0.0/16", "--subnet", WAY_OUT]
    h2.docker("network", "create", *subnets, "-o", gwbridge, "docker_gwbridge")
    both = Side("bridge", 91, h1, h2, "-d bridge"), Side("weft", 81, h1, h2, "-d weft --ipam-driver weft")

    def furnish(side: Side, index: int, network: str, other: str) -> None:
        subnets = f"--ipv6 --subnet 10.N.{index}.0/24 --subnet fd00:N:{index}::/64"
        side.docker(f"network create DRIVER {subnets} {'--internal' * (network == 'inner')} @{network}")
        there = ("network", "inspect", side.text(f"@{network}"))
        eventually(lambda: side.far.docker(*there, check=False) != "[]", f"{network} is there")
        side.run(other, network, f"--ip 10.N.{index}.9 --ip6 fd00:N:{index}::9", host=side.far)

    furniture = [(side, index, *pair) for side in both for index, pair in enumerate(OTHERS.items(), start=1)]
    with ThreadPoolExecutor(len(furniture)) as pool:
        list(pool.map(lambda piece: furnish(*piece), furniture))
    yield both
    engines.clean()
    for host in (h1, h2):
        host.docker("network", "prune", "-f")


def at_both(sides: tuple[Side, Side], action: Callable[[Side], Seen | None]) -> list[Seen]:
    with ThreadPoolExecutor(2) as pool:
        return [seen or {} for seen in pool.map(action, sides)]


def matches(value: object, expected: object) -> bool:
    """Texts, as errors are, may say more. `...` is what bridge does otherwise from one release to the next."""
    if expected is ...:
        return True
    if isinstance(value, str) and isinstance(expected, str) and expected:
        return expected in value
    return value == expected


# Networks of a container


@feature("several networks per container")
def _(s: Side) -> Seen:
    s.run("web", "app", "--ip 10.N.1.50 --ip6 fd00:N:1::50")
    s.docker("network connect --ip 10.N.2.50 --ip6 fd00:N:2::50 @back @web")
    return {
        "interfaces": s.interfaces("web"),
        "networks": sorted(s.inspect("web", ".NetworkSettings.Networks")),
        "it reaches the first": s.reaches("web", "10.N.1.9"),
        "it reaches the second": s.reaches("web", "10.N.2.9"),
        "it is found on the first": s.is_reached("@web", by="other"),
        "it is found on the second": s.is_reached("@web", by="behind"),
        "the two do not reach each other": s.is_unreached("10.N.2.9", by="other"),
    }


@feature("connect and disconnect while it runs; `--alias`, `--ip`")
def _(s: Side) -> Seen:
    s.run("web", "app", "--ip 10.N.1.51 --ip6 fd00:N:1::51")
    before = s.interfaces("web")
    s.docker("network connect --alias shop --ip 10.N.2.51 --ip6 fd00:N:2::51 @back @web")
    connected = s.interfaces("web")
    found = s.is_reached("shop", by="behind") and s.reaches("web", "fd00:N:2::9", "-6")
    again = s.attempt("network connect @back @web")
    s.docker("network disconnect @back @web")
    gone = s.is_unreached("shop", by="behind")
    last = s.attempt("network disconnect @back @web")
    s.docker("network disconnect @app @web")
    return {
        "before": before,
        "connected": connected,
        "found by its alias": found,
        "twice": again,
        "its alias ends": gone,
        "disconnected twice": last,
        "with none": s.interfaces("web"),
    }


@feature("connect and disconnect while it is stopped")
def _(s: Side) -> Seen:
    s.docker("create --name @web --network @app --ip 10.N.1.52 weft-lab")
    s.docker("network connect --ip 10.N.2.52 @back @web")
    s.docker("start @web")
    both = sorted(one["addresses"][0] for one in s.interfaces("web"))
    s.docker("stop -t 1 @web")
    s.docker("network disconnect @app @web")
    s.docker("start @web")
    return {"both": both, "one": len(s.interfaces("web")), "it is found": s.is_reached("@web", by="behind")}


@feature("`--network container:`")
def _(s: Side) -> Seen:
    s.run("web", "app", "--ip 10.N.1.53")
    s.docker("run -d --name @beside --network container:@web weft-lab")
    return {
        "one interface for both": s.interfaces("web") == s.interfaces("beside"),
        "it reaches others": s.reaches("beside", "10.N.1.9"),
        "ports": s.attempt("run --network container:@web -p 80 weft-lab"),
        "connected": s.attempt("network connect @back @beside"),
    }


@feature("`--network none`, `--network host`")
def _(s: Side) -> Seen:
    s.docker("run -d --name @bare --network none weft-lab")
    none = s.attempt("network connect @app @bare")
    s.docker("network disconnect none @bare")
    s.docker("network connect --ip 10.N.1.54 @app @bare")
    s.docker("run -d --name @open --network host weft-lab")
    return {
        "none": none,
        "after none": s.interfaces("bare")[0]["addresses"][0],
        "it reaches others": s.reaches("bare", "10.N.1.9"),
        "host": s.attempt("network connect @app @open"),
    }


# Addresses and names


@feature(
    "`--ip`, `--ip6`",
    {
        "taken": ("Address already in use", "taken, container @other on host h2 has it"),
        "taken by IPv6": ("Address already in use", "taken, container @other on host h2 has it"),
        "the gateway's": ("Address already in use", "it is the network's gateway address"),
    },
)
def _(s: Side) -> Seen:
    s.run("web", "app", "--ip 10.N.1.55 --ip6 fd00:N:1::55")
    refused = "run --rm --network @app {} weft-lab true"
    return {
        "interfaces": s.interfaces("web"),
        "is reached": s.is_reached("10.N.1.55") and s.is_reached("fd00:N:1::55", "-6"),
        "taken": s.attempt(refused.format("--ip 10.N.1.9")),
        "taken by IPv6": s.attempt(refused.format("--ip6 fd00:N:1::9")),
        "the gateway's": s.attempt(refused.format("--ip 10.N.1.1")),
        "elsewhere": s.attempt(refused.format("--ip 10.1.1.1")),
        "nonsense": s.attempt(refused.format("--ip 10.N.1.300")),
    }


@feature("`--mac-address`", {"twice on one network": ("", "MAC address 02:11:22:33:44:55 of network @app")})
def _(s: Side) -> Seen:
    chosen = "--mac-address 02:11:22:33:44:55"
    s.run("web", "app", f"{chosen} --ip 10.N.1.56 --ip6 fd00:N:1::56")
    s.docker("network connect --ip 10.N.2.56 --ip6 fd00:N:2::56 @back @web")
    return {
        "interfaces": s.interfaces("web"),
        "is reached": s.is_reached("10.N.1.56") and s.is_reached("10.N.2.56", by="behind"),
        "nonsense": s.attempt("run --rm --mac-address 02:11 --network @app weft-lab true"),
        "twice on one network": s.attempt(f"run --rm --network @app {chosen} weft-lab true"),
    }


@feature("`--link-local-ip`", {"it finds others by name": (True, False)})
def _(s: Side) -> Seen:
    s.run("web", "app", "--ip 10.N.1.57 --link-local-ip 169.254.1.57 --link-local-ip fe80::5:7")
    s.run("friend", "app", "--link-local-ip 169.254.1.58", host=s.far)
    addresses = json.loads(s.enter("web", "ip", "-j", "addr", "show", "eth0"))[0]["addr_info"]
    return {
        "addresses": sorted(a["local"] for a in addresses if "5:7" in a["local"] or ".57" in a["local"]),
        "listed": s.inspect("web", ".NetworkSettings.Networks")["@app"]["IPAMConfig"],
        "is reached": s.is_reached("169.254.1.57", by="friend"),
        "is reached by IPv6": s.is_reached("fe80::5:7%eth0", "-6"),
        "it finds others by name": s.reaches("web", "@other"),
    }


@feature("`--hostname`, `--domainname`, `--add-host`, `--dns`, `--sysctl`")
def _(s: Side) -> Seen:
    names = "--hostname front --domainname shop.example --add-host extra:192.0.2.7"
    servers = "--dns 192.0.2.8 --dns-search shop.example --dns-option timeout:1"
    s.run("web", "app", f"--ip 10.N.1.58 --ip6 fd00:N:1::58 {names} {servers} --sysctl net.ipv4.ip_default_ttl=9")
    return {
        # Docker Engine 28 and 29 write ::ffff:10.81.1.58 for all IPAM drivers but their own (libnetwork/endpoint.go).
        "hosts": s.docker("exec @web cat /etc/hosts").replace("::ffff:", ""),
        "resolv.conf": s.docker("exec @web cat /etc/resolv.conf"),
        "name": s.docker("exec @web hostname -f"),
        "sysctl": s.docker("exec @web cat /proc/sys/net/ipv4/ip_default_ttl"),
        "found by its host name": s.is_reached("front"),
    }


@feature("`--network-alias`, `--link`, `docker rename`")
def _(s: Side) -> Seen:
    s.run("web", "app", "--network-alias shop --network-alias till")
    aliases = s.is_reached("shop") and s.is_reached("till") and s.is_reached("till.@app")
    s.docker("rename @web @shop")
    s.run("client", "app", "--link @shop:till2")
    return {
        "aliases": aliases,
        "by the new name": s.is_reached("@shop"),
        "by its link": s.reaches("client", "till2"),
    }


# The way in and out


@contextmanager
def serving(s: Side, container: str) -> Iterator[None]:
    """HTTP on port 80, an echo on UDP port 81."""
    s.docker(f"exec @{container} sh -c 'mkdir /www; echo hello > /www/index.html; httpd -h /www'")
    pid = s.host.docker("inspect", "-f", "{{.State.Pid}}", s.text(f"@{container}"))
    with subprocess.Popen(s.host.enter(["nsenter", "-t", pid, "-n", "--", sys.executable, "-c", ECHO])) as echo:
        listening = lambda: ":81 " in s.docker(f"exec @{container} netstat -lnu")  # noqa: E731
        try:
            eventually(listening, "the echo listens")
            yield
        finally:
            echo.kill()


def fetch(host: Host, address: str, port: str) -> str:
    return host.run("busybox", "wget", "-T", "3", "-qO-", f"http://{address}:{port}/", check=False)


def echoes(host: Host, address: str, port: str) -> bool:
    family = "6" if ":" in address else "4"
    ask = f"echo hello | socat -t 1 - UDP{family}:{address}:{port}"
    eventually(lambda: host.run("sh", "-c", ask, check=False) == "hello", f"{address} answers at UDP port {port}")
    return True


@feature("`-p`, over TCP and UDP, IPv4 and IPv6", {"port in use": ("port is already allocated",) * 2})
def _(s: Side) -> Seen:
    s.run("web", "app", "-p 50N1:80 -p 50N2:81/udp -p 127.0.0.1:50N3:80")
    with serving(s, "web"):
        return {
            "listed": sorted(s.docker("port @web").splitlines()),
            "tcp": [fetch(s.outside, address, s.text("50N1")) for address in HERE],
            "udp": all(echoes(s.outside, address, s.text("50N2")) for address in HERE),
            "on the host itself": fetch(s.host, "127.0.0.1", s.text("50N3")),
            "from elsewhere": fetch(s.outside, HERE[0], s.text("50N3")),
            "port in use": s.attempt("run --rm --network @app -p 50N1:80 weft-lab true"),
        }


@feature("`-P`, `--expose`")
def _(s: Side) -> Seen:
    s.run("web", "app", "-P --expose 80 --expose 99/udp")
    s.run("shy", "app", "--expose 80")
    ports = s.inspect("web", ".NetworkSettings.Ports")
    with serving(s, "web"):
        return {
            "listed": sorted(ports),
            "on both families": [len(places) for places in ports.values()],
            "answer": fetch(s.outside, HERE[0], ports["80/tcp"][0]["HostPort"]),
            "exposed only": s.inspect("shy", ".NetworkSettings.Ports"),
        }


@feature("published ports follow connect and disconnect")
def _(s: Side) -> Seen:
    s.run("web", "app", "-p 50N4:80")
    with serving(s, "web"):
        s.docker("network connect @back @web")
        both = fetch(s.outside, HERE[0], s.text("50N4"))
        s.docker("network disconnect @app @web")
        return {"with both": both, "with the second alone": fetch(s.outside, HERE[0], s.text("50N4"))}


@feature("`--internal`", {"default route": (..., "")})
def _(s: Side) -> Seen:
    s.run("web", "inner", "--ip 10.N.3.59 --ip6 fd00:N:3::59 -p 50N5:80")
    return {
        "interfaces": s.interfaces("web"),
        "default route": s.default_route("web"),
        "ports": s.docker("port @web"),
        "its own are reached": s.is_reached("@web", by="within") and s.reaches("web", "fd00:N:3::9", "-6"),
        "nobody else is": not s.reaches("web", OUTSIDE),
    }


@feature(
    "the way out",
    {
        "by way of": ("10.N.1.1", "172."),
        "IPv6 by way of": ("fd00:N:1::1", ""),
        "MTU": (1500, 1450),
        "the gateway's address answers": (True, False),
        "the host reaches the container": (True, False),
    },
)
def _(s: Side) -> Seen:
    s.run("web", "app", "--ip 10.N.1.60")
    ping = ["busybox", "ping", "-c", "1", "-W", "1", s.text("10.N.1.60")]
    with s.outside.capture("icmp") as lines:
        out = s.reaches("web", OUTSIDE)
    return {
        "the outside is reached": out,
        "with the host's address": any(f"{HERE[0]} > {OUTSIDE}: ICMP echo request" in line for line in lines),
        "by way of": s.default_route("web"),
        "IPv6 by way of": s.default_route("web", "-6"),
        "MTU": json.loads(s.enter("web", "ip", "-j", "link", "show", "eth0"))[0]["mtu"],
        "the gateway's address answers": s.reaches("web", "10.N.1.1"),
        "the host reaches the container": "1 packets received" in s.host.run(*ping, check=False),
    }


# What a container keeps


@feature("`restart`, `stop` and `start`, `kill`, `pause`")
def _(s: Side) -> Seen:
    kept = "--ip 10.N.1.61 --ip6 fd00:N:1::61 --mac-address 02:11:22:33:44:61 --network-alias shop"
    s.run("web", "app", f"{kept} -p 50N6:80")
    states = []
    for commands in (["restart -t 1 @web"], ["stop -t 1 @web", "start @web"], ["kill @web", "start @web"]):
        for command in commands:
            s.docker(command)
        states.append(s.interfaces("web"))
    s.docker("pause @web")
    paused = s.is_reached("10.N.1.61")
    s.docker("unpause @web")
    return {
        "interfaces": states,
        "each time the same": states == [states[0]] * 3,
        "ports": s.docker("port @web"),
        "is reached": s.is_reached("shop"),
        "while it is paused": paused,
    }


@feature("`--restart always`")
def _(s: Side) -> Seen:
    s.run("web", "app", "--restart always --ip 10.N.1.62 --ip6 fd00:N:1::62")
    before = s.inspect("web", ".State.Pid")
    s.host.run("kill", "-KILL", str(before))
    eventually(lambda: s.inspect("web", ".State.Pid") not in (0, before), "it runs again")
    return {"interfaces": s.interfaces("web"), "is reached": s.is_reached("10.N.1.62")}


@feature("`docker inspect` of a container", {"gateway": ("10.N.1.1", ""), "IPv6 gateway": ("fd00:N:1::1", "")})
def _(s: Side) -> Seen:
    s.run("web", "app", "--ip 10.N.1.63 --ip6 fd00:N:1::63")
    s.docker("network connect --ip 10.N.2.63 --ip6 fd00:N:2::63 @back @web")
    networks = s.inspect("web", ".NetworkSettings.Networks")
    gateways = [[one.pop(name) for one in networks.values()] for name in ("Gateway", "IPv6Gateway")]
    for one in networks.values():
        one.pop("EndpointID"), one.pop("NetworkID")
    return {"networks": networks, "gateway": gateways[0][0], "IPv6 gateway": gateways[1][0]}


# docker network


@feature("`network create` with its options, `network inspect`", {"IPAM driver": ("default", "weft")})
def _(s: Side) -> Seen:
    addresses = "--subnet 10.N.11.0/24 --ip-range 10.N.11.64/30 --gateway 10.N.11.9 --aux-address router=10.N.11.65"
    six, prefix = "--ipv6 --subnet fd00:N:11::/64", "-o com.docker.network.container_iface_prefix=app"
    s.docker(f"network create DRIVER {addresses} {six} --label colour=red --attachable {prefix} @made")
    s.run("web", "made", "--ip 10.N.11.200 --ip6 fd00:N:11::65")
    found = json.loads(s.docker("network inspect @made"))[0]
    for name in ("Id", "Created", "Driver"):
        del found[name]
    (container,) = found.pop("Containers").values()
    del container["EndpointID"]
    driver = found["IPAM"].pop("Driver")
    s.run("any", "made", "--ip6 fd00:N:11::64")
    return {
        "IPAM driver": driver,
        "network": found,
        "container": container,
        "its interface": json.loads(s.enter("web", "ip", "-j", "link", "show", "app0"))[0]["operstate"],
        "in the range": s.interfaces("any")[0]["addresses"][0] in {f"10.N.11.{n}/24" for n in (64, 66, 67)},
        "the auxiliary address": s.attempt("run --rm --network @made --ip 10.N.11.65 weft-lab true") != "",
        "listed": s.docker("network ls --filter label=colour=red --filter name=@ --format '{{.Name}}'"),
    }


@feature(
    "`network create`: several `--subnet`", {"two of IPv4": ("bridge driver doesn't support multiple subnets", "")}
)
def _(s: Side) -> Seen:
    create = "network create DRIVER --subnet 10.N.12.0/24 --subnet 10.N.13.0/24 @two"
    if s.driver == "bridge":
        return {"two of IPv4": s.attempt(create)}
    s.docker(create)
    s.run("web", "two", "--ip 10.N.13.64")
    s.run("friend", "two", "--ip 10.N.12.64", host=s.far)
    return {"two of IPv4": ""}


@feature("`--config-only`, `--config-from`")
def _(s: Side) -> Seen:
    ipam = "" if s.driver == "bridge" else "--ipam-driver weft"
    s.docker(f"network create {ipam} --config-only --subnet 10.N.14.0/24 --label colour=red @config")
    s.docker(f"network create -d {s.driver} --config-from @config @made")
    s.run("web", "made", "--ip 10.N.14.64")
    return {"interfaces": s.interfaces("web"), "from": s.inspect("made", ".ConfigFrom")}


@feature(
    "`network rm`, `network prune`; names and subnets that are taken",
    {
        "a subnet that is taken": ("Pool overlaps with other one on this address space", "network @app (VNI "),
        "that overlaps": ("Pool overlaps with other one on this address space", "overlaps 10.N.1.0/24 of network @app"),
    },
)
def _(s: Side) -> Seen:
    s.docker("network create DRIVER --subnet 10.N.15.0/24 --label prune=@ @unused")
    s.docker("network create DRIVER --subnet 10.N.16.0/24 --label prune=@ @used")
    s.run("web", "used")
    seen: Seen = {
        "a name that is taken": s.attempt("network create DRIVER --subnet 10.N.17.0/24 @app"),
        "a subnet that is taken": s.attempt("network create DRIVER --subnet 10.N.1.0/24 @again"),
        "that overlaps": s.attempt("network create DRIVER --subnet 10.N.1.128/25 @again"),
        "in use": s.attempt("network rm @used"),
        "unknown": s.attempt("network rm @nobody"),
    }
    with PRUNING:
        seen["pruned"] = s.docker("network prune -f --filter label=prune=@")
    eventually(lambda: s.text("@unused") not in s.far.docker("network", "ls"), "it is gone on all hosts")
    s.docker("rm -f @web")
    seen["removed"] = s.docker("network rm @used")
    return seen


@feature(
    "what `network create` refuses",
    {
        "unknown option": ("", "unknown option 'colour'"),
        "an option of bridge": ("", "is for Docker's bridge driver"),
        "too small": (..., "too small: give at least a /30"),
    },
)
def _(s: Side) -> Seen:
    def created(options: str) -> str:
        said = s.attempt(f"network create DRIVER {options} @odd")
        if not said:
            s.docker("network rm @odd")
        return said

    return {
        "no subnet": created("--subnet 10.N.17.0/33"),
        "gateway elsewhere": created("--subnet 10.N.17.0/24 --gateway 10.1.1.1"),
        "range elsewhere": created("--subnet 10.N.17.0/24 --ip-range 10.1.1.0/24"),
        "auxiliary elsewhere": created("--subnet 10.N.17.0/24 --aux-address one=10.1.1.1"),
        "gateway alone": created("--gateway 10.N.17.1"),
        "ingress": created("--ingress"),
        "host bits, on weft and on Docker 28": created("--subnet 10.N.17.5/24") != "" or s.driver == "bridge",
        "too small": created("--subnet 10.N.17.0/31"),
        "unknown option": created("--subnet 10.N.18.0/24 -o colour=red"),
        "an option of bridge": created("--subnet 10.N.19.0/24 -o com.docker.network.bridge.enable_icc=false"),
    }


@pytest.mark.parametrize("title", FEATURES)
def test_as_on_dockers_own_bridge(sides: tuple[Side, Side], title: str) -> None:
    compare(sides, title)


def compare(sides: tuple[Side, Side], title: str) -> None:
    one = FEATURES[title]
    try:
        seen = at_both(sides, one.observe)
    finally:
        at_both(sides, Side.clean)
    for what, pair in one.differs.items():
        for side, has, wanted in zip(sides, seen, pair, strict=True):
            assert matches(has.pop(what), wanted), (side.driver, what, has)
    bridge, weft = seen
    assert weft == bridge
    assert [what for what, value in weft.items() if value is False] == []


def test_ipv6_out_of_a_network_whose_gateway_bridge_has_it(sides: tuple[Side, Side]) -> None:
    """As docs/features.md says: an administrator makes docker_gwbridge before the first container."""
    _, weft = sides
    h1, h2 = weft.host, weft.outside
    assert h2.docker("exec", "weft-other", "ip", "-6", "route", "show", "default").startswith("default via fd00:30::1")
    h1.run("ip", "route", "add", WAY_OUT, "via", OUTSIDE6)
    assert reaches(h2, "weft-other", "fd78::1", "-6")


def test_the_documentation_has_each_feature() -> None:
    rows = (PROJECT / "docs/features.md").read_text().splitlines()
    documented = {row.split(" | ")[0].removeprefix("| ") for row in rows if row.startswith("| ")}
    assert FEATURES.keys() <= documented
