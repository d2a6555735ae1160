"""Programs that need a whole Ethernet, as Debian has them, in containers on two hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lab import Host
from tests.engine.conftest import Cluster, eventually, reaches
from tests.engine.traffic import pings

SUBNET = "10.77.0.0/24"
FLOATING = "10.77.0.100"
OPTIONS = ["-v", "/usr:/usr:ro", "--tmpfs", "/run", "--cap-add", "NET_ADMIN"]
"""The machine's programs; the image's dynamic linker finds their libraries."""


@pytest.fixture(scope="module")
def shared(engines: Cluster) -> Iterator[Cluster]:
    """One network for all tests, and the containers see1 and see2, on h1 and h2."""
    engines.network("app", subnet=SUBNET)
    engines.run(engines.h1, "see1", "app", *OPTIONS)
    engines.run(engines.h2, "see2", "app", *OPTIONS)
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
    virtual_ipaddress {{
        {address}/24
    }}
}}
"""


def test_a_floating_address_moves_between_hosts(app: Cluster) -> None:
    """By gratuitous ARP alone: a neighbour that is in use is not asked for again for half a minute."""
    pair = {app.h1: ("vrrp1", 100), app.h2: ("vrrp2", 90)}
    for host, (name, priority) in pair.items():
        app.run(host, name, "app", *OPTIONS)
        write(host, name, "/etc/keepalived.conf", KEEPALIVED.format(priority=priority, address=FLOATING))

    def start(host: Host) -> None:
        begin(host, pair[host][0], "keepalived --dont-fork --log-console --vrrp --use-file /etc/keepalived.conf")
        eventually(lambda: "Entering" in log(host, pair[host][0]), "keepalived runs")

    def has_it(host: Host) -> bool:
        return FLOATING in host.docker("exec", pair[host][0], "ip", "addr")

    def all_reach_it() -> bool:
        return reaches(app.h1, "see1", FLOATING) and reaches(app.h2, "see2", FLOATING)

    start(app.h1)
    eventually(lambda: has_it(app.h1), "h1 has it")
    start(app.h2)
    with pings(app.h1, "see1", FLOATING) as near, pings(app.h2, "see2", FLOATING) as far:
        app.h1.docker("exec", "vrrp1", "killall", "keepalived")
        eventually(lambda: has_it(app.h2) and all_reach_it(), "h2 has it, and all know")
        eventually(lambda: "Stopped Keepalived" in log(app.h1, "vrrp1"), "the first one has ended")
        start(app.h1)
        eventually(lambda: has_it(app.h1) and not has_it(app.h2) and all_reach_it(), "it went back, and all know")
    print("longest gap of the floating address, seconds:", near.gap, far.gap)
    assert max(near.gap, far.gap) < 10, (near, far)


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
