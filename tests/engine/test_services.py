"""Programs that need a whole Ethernet, as Debian has them, in containers on two hosts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from lab import Host
from tests.engine.conftest import Cluster, eventually, reaches
from tests.engine.traffic import pings

SUBNET = "10.77.0.0/24"
FLOATING = "10.77.0.100"
SEALED = "10.78.0.0/24"
OPTIONS = ["-v", "/usr:/usr:ro", "--tmpfs", "/run", "--cap-add", "NET_ADMIN"]
"""The machine's programs; the image's dynamic linker finds their libraries."""


@pytest.fixture(scope="module")
def shared(engines: Cluster) -> Iterator[Cluster]:
    """Two networks for all tests, and on both the containers see1 and see2, on h1 and h2."""
    engines.network("app", subnet=SUBNET)
    engines.run(engines.h1, "see1", "app", *OPTIONS)
    engines.run(engines.h2, "see2", "app", *OPTIONS)
    engines.network("sealed", "--internal", "--ipv6", "--subnet", "fd00:78::/64", "-o", "floating=on", subnet=SEALED)
    for host, name in ((engines.h1, "see1"), (engines.h2, "see2")):
        host.docker("network", "connect", "sealed", name)
    yield engines
    engines.clean()


@pytest.fixture
def app(shared: Cluster) -> Iterator[Cluster]:
    yield shared
    for host in shared.lab.hosts:
        if others := set(host.docker("ps", "-a", "--format", "{{.Names}}").split()) - {"see1", "see2"}:
            host.docker("rm", "-f", *others)


def write(host: Host, container: str, path: str, text: str) -> None:
    host.docker("exec", container, "sh", "-c", 'mkdir -p "${0%/*}"; printf %s "$1" > "$0"', path, text)


def begin(host: Host, container: str, command: str) -> None:
    host.docker("exec", "-d", container, "sh", "-c", f"exec {command} > /tmp/log 2>&1")


def log(host: Host, container: str) -> str:
    return host.docker("exec", container, "cat", "/tmp/log", check=False)


KEEPALIVED = """
global_defs {{
    vrrp_version 3
}}
vrrp_instance floating {{
    interface eth0
    virtual_router_id 51
    priority {priority}
    advert_int 0.2
    {more}
    virtual_ipaddress {{
        {address}
    }}
}}
"""


def keepalived(cluster: Cluster, host: Host, network: str, address: str, more: str = "") -> None:
    """One that is about to start, in the container vrrp1 or vrrp2; the first one has the address if both run."""
    name, priority = f"vrrp{host.index}", 110 - 10 * host.index
    cluster.run(host, name, network, *OPTIONS)
    write(host, name, "/etc/keepalived.conf", KEEPALIVED.format(priority=priority, address=address, more=more))


def start(host: Host) -> None:
    begin(host, f"vrrp{host.index}", "keepalived --dont-fork --log-console --vrrp --use-file /etc/keepalived.conf")
    eventually(lambda: "Entering" in log(host, f"vrrp{host.index}"), "keepalived runs")


def end(host: Host) -> None:
    host.docker("exec", f"vrrp{host.index}", "killall", "keepalived")
    eventually(lambda: "Stopped Keepalived" in log(host, f"vrrp{host.index}"), "keepalived has ended")


def has(host: Host, address: str) -> bool:
    return address in host.docker("exec", f"vrrp{host.index}", "ip", "addr")


def there_and_back(cluster: Cluster, address: str, all_reach_it: Callable[[], bool]) -> None:
    end(cluster.h1)
    eventually(lambda: has(cluster.h2, address) and all_reach_it(), "h2 has it, and all know")
    start(cluster.h1)
    eventually(lambda: has(cluster.h1, address) and not has(cluster.h2, address), "it went back")
    eventually(all_reach_it, "and all know")


def test_a_floating_address_moves_between_hosts(app: Cluster) -> None:
    """By gratuitous ARP alone: a neighbour that is in use is not asked for again for half a minute."""
    for host in app.lab.hosts:
        keepalived(app, host, "app", f"{FLOATING}/24")

    def all_reach_it() -> bool:
        return reaches(app.h1, "see1", FLOATING) and reaches(app.h2, "see2", FLOATING)

    start(app.h1)
    eventually(lambda: has(app.h1, FLOATING), "h1 has it")
    start(app.h2)
    with pings(app.h1, "see1", FLOATING) as near, pings(app.h2, "see2", FLOATING) as far:
        there_and_back(app, FLOATING, all_reach_it)
    print("longest gap of the floating address, seconds:", near.gap, far.gap)
    assert max(near.gap, far.gap) < 10, (near, far)


@pytest.mark.parametrize(("address", "more"), [("10.78.0.100/24", ""), ("fd00:78::100/64", "native_ipv6")])
def test_it_moves_on_an_internal_network_with_ipv6(app: Cluster, address: str, more: str) -> None:
    plain, _, _ = address.partition("/")
    for host in app.lab.hosts:
        keepalived(app, host, "sealed", address, more)
        start(host)

    def all_reach_it() -> bool:
        family = "-6" if ":" in plain else "-4"
        return reaches(app.h1, "see1", plain, family) and reaches(app.h2, "see2", plain, family)

    eventually(lambda: has(app.h1, plain) and all_reach_it(), "all know that h1 has it")
    there_and_back(app, plain, all_reach_it)


VIRTUAL_MAC = "00:00:5e:00:01:33"


def test_a_virtual_mac_moves_between_hosts(app: Cluster) -> None:
    """As with keepalived's `use_vmac`, for which not every kernel has the macvlan device: nobody is told of it."""
    owners = {host: Owner(app, host) for host in app.lab.hosts}
    owners[app.h1].take()
    with pings(app.h1, "see1", FLOATING) as near, pings(app.h2, "see2", FLOATING) as far:
        for old, new in ((app.h1, app.h2), (app.h2, app.h1)):
            owners[old].leave()
            owners[new].take()
            eventually(lambda: reaches(app.h1, "see1", FLOATING) and reaches(app.h2, "see2", FLOATING), "it has moved")
    print("longest gap of the virtual MAC, seconds:", near.gap, far.gap)
    assert max(near.gap, far.gap) < 10, (near, far)


class Owner:
    """A container that may have the floating address, with the virtual MAC."""

    def __init__(self, cluster: Cluster, host: Host) -> None:
        self._host, name = host, f"vrrp{host.index}"
        cluster.run(host, name, "app", *OPTIONS)
        self._pid = host.docker("inspect", "--format", "{{.State.Pid}}", name)
        self._mac = host.docker("exec", name, "cat", "/sys/class/net/eth0/address")

    def take(self) -> None:
        self._become(VIRTUAL_MAC, "add")

    def leave(self) -> None:
        self._become(self._mac, "del")

    def _become(self, mac: str, change: str) -> None:
        command = f"ip link set eth0 address {mac} && ip addr {change} {FLOATING}/24 dev eth0"
        self._host.run("nsenter", "-t", self._pid, "-n", "--", "sh", "-c", command)


AVAHI = """
[server]
host-name={name}
allow-interfaces=eth0
enable-dbus=no
"""


def test_avahi_finds_a_name_on_the_other_host(app: Cluster) -> None:
    for host, name in ((app.h1, "see1"), (app.h2, "see2")):
        add = "echo avahi:x:99:99::/:/bin/sh >> /etc/passwd; echo avahi:x:99: >> /etc/group"
        host.docker("exec", name, "sh", "-c", add)
        write(host, name, "/etc/avahi.conf", AVAHI.format(name=f"{name}-mdns"))
        begin(host, name, "avahi-daemon --no-drop-root --no-chroot --no-rlimits --file /etc/avahi.conf")
        eventually(lambda host=host, name=name: "startup complete" in log(host, name), "avahi runs")  # type: ignore[misc]
    ask = "echo RESOLVE-HOSTNAME-IPV4 see1-mdns.local | socat -t 1 - UNIX-CONNECT:/run/avahi-daemon/socket,shut-none"
    found = lambda: app.address(app.h1, "see1", "app") in app.h2.docker("exec", "see2", "sh", "-c", ask)  # noqa: E731
    eventually(found, "the name is found", timeout=20)


def test_members_of_a_multicast_group_hear_each_other(app: Cluster) -> None:
    pair = ((app.h1, "see1"), (app.h2, "see2"))
    for host, name in pair:
        begin(host, name, "socat -u UDP4-RECV:7777,ip-add-membership=239.1.2.3:eth0 STDOUT")
        joined = ["exec", name, "grep", "030201EF", "/proc/net/igmp"]
        eventually(lambda h=host, command=joined: h.docker(*command, check=False) != "", "it has joined")  # type: ignore[misc]
    for host, name in pair:
        say = f"echo from {name} | socat -u STDIN UDP4-DATAGRAM:239.1.2.3:7777,ip-multicast-if=$(hostname -i)"
        host.docker("exec", name, "sh", "-c", say)
    for host, name in pair:
        heard = lambda h=host, n=name: {"from see1", "from see2"} <= set(log(h, n).splitlines())  # noqa: E731
        eventually(heard, f"{name} hears both")


def test_an_address_by_dhcp_from_the_other_host(app: Cluster) -> None:
    leased = "10.77.0.150"
    serve = "dnsmasq --no-daemon --user=root --port=0 --interface=eth0 --leasefile-ro --no-ping"
    begin(app.h1, "see1", f"{serve} --dhcp-range={leased},{leased}")
    eventually(lambda: "DHCP, IP range" in log(app.h1, "see1"), "dnsmasq runs")
    app.run(app.h2, "client", "app", *OPTIONS)
    write(app.h2, "client", "/tmp/lease", '#!/bin/sh\n[ -z "$ip" ] || ip addr add "$ip/24" dev "$interface"\n')
    app.h2.docker("exec", "client", "chmod", "+x", "/tmp/lease")
    app.h2.docker("exec", "client", "udhcpc", "-i", "eth0", "-n", "-q", "-s", "/tmp/lease")
    assert reaches(app.h1, "see1", leased)


def test_large_datagrams_arrive(app: Cluster) -> None:
    """In 46 fragments each."""
    app.h1.docker("exec", "-d", "see1", "iperf3", "-s", "-1")
    eventually(lambda: "5201" in app.h1.docker("exec", "see1", "netstat", "-ltn"), "iperf3 listens")
    client = ["iperf3", "-J", "-u", "-l", "65000", "-b", "20M", "-k", "20", "-c", app.address(app.h1, "see1", "app")]
    total = json.loads(app.h2.docker("exec", "see2", *client))["end"]["sum"]
    assert total["packets"] == 20
    assert total["lost_packets"] < 10, total
