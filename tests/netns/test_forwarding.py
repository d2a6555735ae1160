"""Frames between containers of several hosts, over a data plane that `LinuxKernel` made."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from threading import Event, Thread

import pytest

from tests.netns.world import Container, Host, World, wait_for
from weft.dataplane import FLOOD_MAC, Fdb, Neighbour, Row, Station, pack_address, pack_mac

VNI = 7
GROUP = "239.7.7.7"


@dataclass
class Member:
    """A container with its place on the network."""

    host: Host
    mac: str
    addresses: Sequence[str]
    container: Container

    @property
    def rows(self) -> set[Row]:
        """What other hosts have to know."""
        mac, vtep = pack_mac(self.mac), pack_address(self.host.underlay)
        plain = [address.partition("/")[0] for address in self.addresses]
        neighbours = {Neighbour(f"br{VNI}", pack_address(address), mac) for address in plain}
        return {Fdb(f"vx{VNI}", mac, vtep), Station(f"vx{VNI}", mac), *neighbours}


def flood(host: Host) -> Fdb:
    return Fdb(f"vx{VNI}", FLOOD_MAC, pack_address(host.underlay))


def join(world: World, host: Host, number: int, *, rate: int = 0) -> Member:
    mac, addresses = f"02:42:0a:00:00:{number:02x}", (f"10.0.0.{number}/24", f"fd00::{number:x}/64")
    return Member(host, mac, addresses, world.container(host, VNI, mac, *addresses, rate=rate))


def connect(*members: Member) -> None:
    """Give each host the rows of the others."""
    hosts = {member.host.underlay: member.host for member in members}
    for host in hosts.values():
        others = [member for member in members if member.host is not host]
        host.put(*{row for member in others for row in member.rows}, *{flood(member.host) for member in others})


@pytest.fixture(
    scope="module", params=[("192.0.2.1/24", "192.0.2.2/24"), ("2001:db8::1/64", "2001:db8::2/64")], ids=["v4", "v6"]
)
def pair(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[tuple[Member, Member]]:
    """Containers 10.0.0.1 and 10.0.0.2 on two hosts, connected; for all tests here."""
    with closing(World(tmp_path_factory.mktemp("world"))) as world:
        yield connected(world, *world.hosts(*request.param))


def connected(world: World, *hosts: Host) -> tuple[Member, Member]:
    for host in hosts:
        host.apply(*host.network(VNI, mtu=1430, suppress=True))
    members = join(world, hosts[0], 1), join(world, hosts[1], 2)
    connect(*members)
    return members


@pytest.mark.kernel
def test_containers_reach_each_other_without_a_question_on_the_underlay(pair: tuple[Member, Member]) -> None:
    one, two = pair
    with one.host.capture() as capture:
        for address in ("10.0.0.2", "fd00::2"):
            assert one.container.pings(address)
        for address in ("10.0.0.1", "fd00::1"):
            assert two.container.pings(address)
        frames = capture.frames()
    assert len(frames) >= 8
    assert not [frame for frame in frames if capture.is_question(frame)]


def test_unknown_address_is_asked_for_everywhere_and_answers(pair: tuple[Member, Member]) -> None:
    one, two = pair
    two.container.ip("addr add 10.0.0.99/24 dev eth0")
    two.container.ip("addr add fd00::99/64 dev eth0 nodad")
    with one.host.capture() as capture:
        assert one.container.pings("10.0.0.99")
        assert one.container.pings("fd00::99")
        assert len([frame for frame in capture.frames() if capture.is_question(frame)]) >= 2


@pytest.mark.parametrize("suppress", [False, True])
def test_a_floating_address_moves_by_its_owners_word(world: World, suppress: bool) -> None:
    """By gratuitous ARP, and by an unsolicited advertisement: unless ND is suppressed, as the kernel has it."""
    hosts = world.hosts("192.0.2.1/24", "192.0.2.2/24")
    for host in hosts:
        host.apply(*host.network(VNI, suppress=suppress))
    asker, before, after = join(world, hosts[0], 1), join(world, hosts[0], 2), join(world, hosts[1], 3)
    connect(asker, before, after)
    addresses = {"10.0.0.99": "10.0.0.99/24", "fd00::99": "fd00::99/64"}
    for address, given in addresses.items():
        nodad = " nodad" * (":" in address)
        before.container.ip(f"addr add {given} dev eth0{nodad}")
        assert asker.container.pings(address)
        before.container.ip(f"addr del {given} dev eth0")
        after.container.ip(f"addr add {given} dev eth0{nodad}")
        announce(after, address)
        assert asker.container.pings(address) is not suppress


def announce(member: Member, address: str) -> None:
    """As a new owner does, from its own MAC."""
    mac, packed = pack_mac(member.mac), pack_address(address)
    if len(packed) == 4:
        frame = (
            b"\xff" * 6 + mac + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1) + mac + packed + bytes(6) + packed
        )
    else:
        everyone = pack_address("ff02::1")
        body = struct.pack("!BBHI", 136, 0, 0, 0x20000000) + packed + b"\x02\x01" + mac
        words = struct.unpack("!36H", packed + everyone + struct.pack("!II", len(body), 58) + body)
        total = sum(words)
        total = (total & 0xFFFF) + (total >> 16)
        body = body[:2] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + body[4:]
        head = struct.pack("!IHBB", 6 << 28, len(body), 58, 255)
        frame = b"\x33\x33\x00\x00\x00\x01" + mac + b"\x86\xdd" + head + packed + everyone + body
    with member.container.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.sendto(frame, ("eth0", 0))


@pytest.mark.kernel
def test_a_mac_of_no_container_moves_between_hosts_and_back(world: World, pair: tuple[Member, Member]) -> None:
    """As VRRP's virtual one does, without a word to weft: the next frame finds it."""
    asker, far = pair
    near = join(world, asker.host, 3)
    connect(asker, near, far)
    floating = "02:00:5e:00:01:33"
    asker.container.ip(f"neigh add 10.0.0.97 lladdr {floating} dev eth0")
    for owner, other in [(far, near), (near, far)] * 2:
        other.container.ip(f"link set eth0 address {other.mac}")
        other.container.ip("addr flush to 10.0.0.97 dev eth0")
        owner.container.ip(f"link set eth0 address {floating}")
        owner.container.ip("addr replace 10.0.0.97/24 dev eth0")
        assert asker.container.ping("10.0.0.97", 1)


def test_forwarding_goes_on_without_us(pair: tuple[Member, Member]) -> None:
    one, two = pair
    for member in pair:
        member.host.kernel.close()
    assert one.container.pings("10.0.0.2")
    assert two.container.pings("fd00::1")
    for member in pair:
        member.host.kernel.open()


@pytest.mark.kernel
def test_broadcast_and_multicast_reach_the_other_host(pair: tuple[Member, Member]) -> None:
    one, two = pair
    assert one.container.pings("10.0.0.2")
    with (
        one.container.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        two.container.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
    ):
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.0.0.1"))
        membership = socket.inet_aton(GROUP) + socket.inet_aton("10.0.0.2")
        receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        receiver.settimeout(5)
        receiver.bind(("", 7777))
        for target in ("10.0.0.255", GROUP):
            sender.sendto(target.encode(), (target, 7777))
            assert receiver.recv(100) == target.encode()


def test_mac_moves_to_another_host_without_loss(world: World) -> None:
    """Two hosts answer for one MAC; a third changes its mind all the time, and every packet finds one of them."""
    here, *others = world.hosts("192.0.2.1/24", "192.0.2.2/24", "192.0.2.3/24")
    for host in (here, *others):
        host.apply(*host.network(VNI))
    asker, *twins = join(world, here, 1), *(join(world, host, 2) for host in others)
    for twin in twins:
        twin.host.put(*asker.rows)
    here.put(*twins[0].rows)
    assert asker.container.pings("10.0.0.2")
    done = Event()

    def change() -> None:
        while not done.is_set():
            for twin in twins:
                here.put(*twin.rows)

    changing = Thread(target=change)
    changing.start()
    try:
        assert all(asker.container.ping("10.0.0.2") for _ in range(50))
    finally:
        done.set()
        changing.join()


def test_idle_devices_say_nothing(world: World) -> None:
    """No router solicitation, no MLD report, no query: neither to other hosts nor to containers."""
    host = world.host()
    bridge, vxlan = host.network(VNI)
    with host.capture() as capture:
        host.apply(bridge, vxlan)
        host.put(Fdb(f"vx{VNI}", FLOOD_MAC, pack_address("192.0.2.2")))
        host.ip("neigh add 192.0.2.2 lladdr 02:78:00:00:00:02 dev eth0")
        container = world.container(host, VNI, "02:42:0a:00:00:01", "10.0.0.1/24")
        with container.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as heard:
            time.sleep(3)
            assert not capture.frames()
            heard.setblocking(False)
            with pytest.raises(BlockingIOError):
                heard.recv(2000)


def test_container_leaves_and_its_port_goes(world: World) -> None:
    host = world.host()
    host.apply(*host.network(VNI))
    member = join(world, host, 1)
    assert len(host.dp.links()) == 3
    member.container.ip("link del eth0")
    assert wait_for(lambda: len(host.dp.links()) == 2)
