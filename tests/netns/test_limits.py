"""Rates that are kept, of one container and of what a network floods; and checksums that no network card computes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from threading import Thread

import pytest

from tests.netns.test_forwarding import VNI, Member, connect, join
from tests.netns.test_monitor import follow, seen
from tests.netns.world import MTU, Capture, Container, Host, World
from weft.dataplane import LinkEvent, Port, Shaper
from weft.kernel.offload import leave_checksums
from weft.reconcile import Create, Update

RATE = 20_000_000
SECONDS = 1.5
FLOOD = 800_000
AT_ONCE = 80_000
PORT = 7000
LIMITED = Port("wp1", "br7", MTU, peer="wc1", rate=RATE)
SHAPERS = Shaper("wp1", RATE), Shaper("vx7", FLOOD)


@pytest.fixture
def hosts(world: World) -> list[Host]:
    hosts = world.hosts("192.0.2.1/24", "192.0.2.2/24")
    for host in hosts:
        host.apply(*host.network(VNI))
    return hosts


def speed(sender: Container, receiver: Container, address: str, seconds: float = SECONDS) -> float:
    """Bit/s of a TCP stream that takes so long at `RATE`, from its first byte to its last one."""
    left = int(RATE / 8 * seconds)
    server = receiver.socket(socket.AF_INET, socket.SOCK_STREAM)
    client = sender.socket(socket.AF_INET, socket.SOCK_STREAM)
    with server, client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, PORT))
        server.listen()
        client.settimeout(10)
        client.connect((address, PORT))
        connection, _ = server.accept()
        with connection:
            connection.settimeout(10)
            began, total = time.monotonic(), left
            sending = Thread(target=client.sendall, args=(bytes(total),))
            sending.start()
            while left:
                left -= len(connection.recv(left))
            sending.join()
            return total * 8 / (time.monotonic() - began)


def fastest(sender: Container, receiver: Container, address: str, enough: float = 0.7 * RATE) -> float:
    """Of three at most: a busy machine makes it slower than it may be, never faster."""
    best = 0.0
    for _ in range(3):
        best = max(best, speed(sender, receiver, address))
        if best > enough:
            break
    return best


@pytest.mark.kernel
def test_a_container_sends_and_gets_no_more_than_its_rate(world: World, hosts: list[Host]) -> None:
    one, two = join(world, hosts[0], 1, rate=RATE), join(world, hosts[1], 2)
    connect(one, two)
    assert one.container.pings("10.0.0.2")
    for way in ((one.container, two.container, "10.0.0.2"), (two.container, one.container, "10.0.0.1")):
        assert 0.7 * RATE < fastest(*way) < 1.15 * RATE


def test_a_container_on_the_same_host_is_limited_and_others_are_not(world: World, hosts: list[Host]) -> None:
    one, two, three = (join(world, hosts[0], n, rate=RATE if n == 1 else 0) for n in (1, 2, 3))
    assert two.container.pings("10.0.0.1")
    assert fastest(one.container, two.container, "10.0.0.2") < 1.15 * RATE
    assert fastest(two.container, three.container, "10.0.0.3", 2 * RATE) > 2 * RATE


@pytest.fixture
def limited(host: Host) -> Host:
    host.apply(*host.network(VNI), LIMITED, *SHAPERS)
    assert not host.plan(*host.network(VNI), LIMITED, *SHAPERS)
    return host


@pytest.mark.kernel
def test_limits_as_tc_sees_them(limited: Host) -> None:
    queues = limited.dp.run("tc", "qdisc", "show")
    assert "dev wp1 root refcnt" in queues
    assert queues.count("rate 20Mbit burst 80000b lat 50ms") == 2
    assert "dev svx7 root refcnt 2 rate 800Kbit burst 80000b lat 50ms" in queues
    assert "mirred (Egress Redirect to device swp1)" in limited.dp.run("tc", "filter", "show", "dev", "wp1", "ingress")
    assert "mirred (Egress Redirect to device svx7)" in limited.dp.run("tc", "filter", "show", "dev", "vx7", "egress")


@pytest.mark.parametrize(
    ("name", "command", "reason"),
    [
        ("wp1", "tc qdisc del dev {} root", "rate is none"),
        ("wp1", "tc qdisc replace dev {} root pfifo limit 10", "rate is none"),
        ("wp1", "tc qdisc change dev {} root tbf rate 1gbit burst 1mb latency 9ms", "rate is none"),
        ("wp1", "tc qdisc del dev {} clsact", "wp1 passes it by"),
        ("wp1", "tc filter del dev {} ingress", "wp1 passes it by"),
        ("vx7", "tc filter del dev {} egress pref 3", "vx7 passes it by"),
        ("swp1", "tc qdisc del dev {} root", "rate is none"),
        ("swp1", "ip link set {} down", "down"),
        ("swp1", "ip link set {} addrgenmode eui64", "makes IPv6 addresses"),
        ("swp1", "ip link del {}", "missing"),
        ("svx7", "tc qdisc del dev {} root", "rate is none"),
        ("svx7", "ip link del {}", "missing"),
    ],
)
def test_drift_of_a_limit_is_told_seen_and_repaired(limited: Host, name: str, command: str, reason: str) -> None:
    with follow(limited.kernel.monitor()) as events:
        limited.dp.run(*command.format(name).split())
        assert seen(events, LinkEvent(name, reason != "missing"))
    wanted = (*limited.network(VNI), LIMITED, *SHAPERS)
    [step] = limited.apply(*wanted)
    assert f"({reason})" in str(step)
    assert not limited.plan(*wanted)


def test_a_limit_comes_changes_and_goes_with_what_is_wanted(limited: Host) -> None:
    network = limited.network(VNI)
    other = replace(LIMITED, rate=RATE * 2), Shaper("wp1", RATE * 2)
    assert len(limited.apply(*network, *other)) == 3  # the network's limit goes
    assert not limited.plan(*network, *other)
    assert "clsact" not in limited.dp.run("tc", "qdisc", "show", "dev", "vx7")  # what is diverted to nowhere is lost
    free = replace(LIMITED, rate=0)
    limited.apply(*network, free)
    assert not limited.plan(*network, free)
    queues = limited.dp.run("tc", "qdisc", "show")
    assert "tbf" not in queues
    assert "clsact" not in queues


def test_a_tunnel_that_is_made_again_is_limited_again(limited: Host) -> None:
    bridge, tunnel = limited.network(VNI)
    wanted = bridge, replace(tunnel, port=4790), LIMITED, *SHAPERS
    assert Update(SHAPERS[1], "its link is made again") in limited.apply(*wanted)
    assert not limited.plan(*wanted)


@contextmanager
def shouting(member: Member) -> Iterator[None]:
    """As much broadcast as the container can send."""
    sock = member.container.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    stopping = False

    def shout() -> None:
        while not stopping:
            sock.sendto(bytes(1000), ("10.0.0.255", PORT))

    with sock:
        thread = Thread(target=shout)
        thread.start()
        try:
            yield
        finally:
            stopping = True
            thread.join()


def heard(capture: Capture, seconds: float) -> int:
    """Bytes of broadcast on the underlay."""
    end, total = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        total += sum(len(frame) for frame in capture.frames() if len(frame) > 1000)
    return total


@pytest.mark.kernel
def test_a_hosts_floods_are_limited_and_nothing_else_is(world: World, hosts: list[Host]) -> None:
    """What was learned before is reached, and what is asked for in the middle of it as well."""
    one, two = join(world, hosts[0], 1), join(world, hosts[1], 2)
    connect(one, two)
    two.container.ip("addr add 10.0.0.99/24 dev eth0")
    hosts[0].kernel.perform(Create(Shaper(f"vx{VNI}", FLOOD)))
    assert one.container.pings("10.0.0.2")
    with shouting(one), hosts[1].capture() as capture:
        heard(capture, 1.0)
        began = time.monotonic()
        total = heard(capture, 1.5)
        seconds = time.monotonic() - began
        assert one.container.pings("10.0.0.99")
    assert 0.5 * FLOOD < total * 8 / seconds < 1.15 * FLOOD + AT_ONCE * 8 / seconds


@pytest.mark.kernel
def test_checksums_are_computed_before_the_tunnel(world: World, hosts: list[Host]) -> None:
    """So they are right on the underlay; otherwise they are left to the network card."""
    one, two = join(world, hosts[0], 1), join(world, hosts[1], 2)
    connect(one, two)
    bridge, tunnel = hosts[0].network(VNI)
    without = replace(tunnel, offload=False)
    for wanted in (tunnel, without):
        ports = [s.link for s in hosts[0].kernel.observe_links().values() if isinstance(s.link, Port)]
        hosts[0].apply(bridge, wanted, *ports)
        assert not hosts[0].plan(bridge, wanted, *ports)
        assert one.container.pings("10.0.0.2")
        sock = one.container.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock, hosts[0].capture() as capture:
            sock.sendto(b"x" * 99, ("10.0.0.2", PORT))
            [frame] = [
                frame for frame in capture.frames() if frame[23] == socket.IPPROTO_UDP and frame.endswith(b"x" * 99)
            ]
        assert is_right(frame) == (wanted is without)


def is_right(frame: bytes) -> bool:
    """The UDP checksum of an IPv4 packet in a frame."""
    pseudo = frame[26:34] + b"\0\x11" + frame[38:40]
    data = pseudo + frame[34:]
    data += bytes(len(data) % 2)
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total == 0xFFFF


def test_drift_of_checksums_is_told_seen_and_repaired(host: Host) -> None:
    bridge, tunnel = host.network(VNI)
    without = replace(tunnel, offload=False)
    host.apply(bridge, without)
    with closing(host.dp.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock, follow(host.kernel.monitor()) as events:
        leave_checksums(sock, "vx7", True)
        assert seen(events, LinkEvent("vx7", True))
    [step] = host.apply(bridge, without)
    assert "offload is on" in str(step)
    assert not host.plan(bridge, without)
