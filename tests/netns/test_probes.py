"""Probes between throw-away hosts: each fault is made for real, and the links say what it is."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.netns.secured import PORT, SecuredHost
from tests.netns.world import World, wait_for
from weft.dataplane import pack_mac, vxlan_name
from weft.model import ENCRYPTED_PROBE_VNI, PROBE_VNI
from weft.probes.links import Kind, ProbeLink
from weft.probes.measurements import Probes
from weft.probes.prober import Prober
from weft.store import Put
from weft.store.sqlite import SqliteStore
from weft.topology import probe_mac

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

SIZE, ENCRYPTED_SIZE = 1450, 1390
_SIOCETHTOOL, _ETHTOOL_STXCSUM = 0x8946, 0x17


class ProbedHost(SecuredHost):
    """With all that measures; nothing is probed but on demand."""

    probes = True

    def start(self) -> None:
        self.me.host = replace(self.me.host, probes=True)
        self.publish()
        super().start()
        self.store.transact([], [Put(self.me.host.alive_key, "test")])
        prober = Prober(self.cluster, self.me, size=self._size, open_socket=self.host.kernel.open_probe)
        self.measuring = Probes(self.store, self.cluster, self.me, prober, interval=0)
        self.measuring.start()

    def stop(self) -> None:
        self.measuring.stop()
        super().stop()

    def become_old(self) -> None:
        """Be of a version that knows no probes."""
        self.measuring.stop()
        self.me.host = replace(self.me.host, probes=False)
        self.publish()

    def measure(self, kind: Kind = "plain", deadline: float = 8.0) -> dict[tuple[str, str], ProbeLink]:
        """The links by the names of their ends, measured now."""
        names = {host.id: host.name for host in self.cluster.hosts.values()}
        links = self.measuring.probe(deadline=deadline)
        return {(names[one.sender], names[one.receiver]): one for one in links if one.kind == kind}

    def nft(self, rule: str, hook: str = "input") -> None:
        self.host.run("nft", "add table inet test")
        self.host.run("nft", f"add chain inet test c {{ type filter hook {hook} priority -300; }}")
        self.host.run("nft", f"add rule inet test c {rule}")

    def _size(self, kind: Kind) -> int:
        return self.attachments.limit(encrypted=kind == "encrypted").mtu


class Trio:
    """Three hosts on a switch that know of each other."""

    def __init__(self, world: World, folder: Path, resources: ExitStack, network: str = "192.0.2.{}/24") -> None:
        self.store = resources.enter_context(closing(SqliteStore(folder / "weft.db")))
        hosts = world.hosts(*(network.format(number) for number in (1, 2, 3)))
        self.hosts = [ProbedHost(host, self.store, folder) for host in hosts]
        for one in self.hosts:
            resources.callback(one.stop)
        assert wait_for(lambda: all(len(one.cluster.alive) == 3 for one in self.hosts))
        assert wait_for(lambda: all(len(self.rows(one)) == 2 for one in self.hosts))
        self.names = [one.me.host.name for one in self.hosts]
        size = self.hosts[0].attachments.limit().mtu
        assert wait_for(lambda: is_all_good(self.hosts[0], "plain", size), 30)
        self.switch = world.switch

    @staticmethod
    def rows(one: ProbedHost, vni: int = PROBE_VNI) -> list[str]:
        if vxlan_name(vni) not in one.host.dp.links():
            return []
        return [row["dst"] for row in one.host.dp.fdb(vxlan_name(vni)) if "dst" in row]


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def trio(world: World, tmp_path: Path, resources: ExitStack) -> Trio:
    return Trio(world, tmp_path, resources)


def is_good(link: ProbeLink, size: int = SIZE) -> bool:
    return (link.small, link.full, link.offloaded, link.mtu, link.corrupt) == (0, 0, 0, size, 0)


@pytest.mark.parametrize(("network", "size"), [("192.0.2.{}/24", 1450), ("fd00::{}/64", 1430)])
def test_healthy_hosts_measure_no_fault(
    world: World, tmp_path: Path, resources: ExitStack, network: str, size: int
) -> None:
    trio = Trio(world, tmp_path, resources, network)
    links = trio.hosts[0].measure()
    assert len(links) == 4, "to and from two others"
    assert all(is_good(link, size) for link in links.values()), links
    assert all(0 < (link.rtt or 0) < 1 for link in links.values())
    assert trio.hosts[1].measuring.links() == trio.hosts[2].measuring.links()


def test_a_drop_in_one_direction_is_told_from_one_in_both(trio: Trio) -> None:
    one, two, three = trio.hosts
    a, b, c = trio.names
    two.nft(f"ip saddr {one.host.underlay} udp dport {PORT} drop")
    for observer, others in ((one, (a, c)), (two, (b, c))):
        links = observer.measure()
        assert (links[a, b].small, links[a, b].full) == (1, 1)
        assert is_good(links[b, a])
        assert is_good(links[others])
    known = {(one.sender, one.receiver): one for one in three.measuring.links()}
    assert known[one.me.id, two.me.id].small == 1, "others know it from the store"
    assert is_good(known[two.me.id, one.me.id])
    two.host.run("nft", "flush ruleset")
    assert is_good(one.measure()[a, b])


def test_a_drop_in_both_directions_is_one_in_both(trio: Trio) -> None:
    one, two, _ = trio.hosts
    a, b, c = trio.names
    two.nft(f"udp dport {PORT} drop")
    two.host.run("nft", "add chain inet test o { type filter hook output priority 0; }")
    two.host.run("nft", f"add rule inet test o udp dport {PORT} drop")
    links = one.measure()
    assert (links[a, b].small, links[b, a].small) == (1, 1)
    assert is_good(links[a, c])


@pytest.mark.parametrize("mtu", [1400, 900])
def test_a_smaller_mtu_on_the_way_is_measured_to_the_byte(trio: Trio, mtu: int) -> None:
    """The switch's port lets frames pass that are longer by a VLAN tag (is_skb_forwardable in the kernel)."""
    one, *_ = trio.hosts
    a, b, c = trio.names
    trio.switch.ip(f"link set p1 mtu {mtu}")
    links = one.measure()
    for way in ((a, b), (b, a)):
        assert (links[way].small, links[way].full, links[way].mtu) == (0, 1, mtu + 4 - 50), links
    assert is_good(links[a, c])


def test_what_is_changed_on_the_way_is_corrupt(trio: Trio) -> None:
    one, two, _ = trio.hosts
    a, b, c = trio.names
    two.nft(f"ip saddr {one.host.underlay} udp dport {PORT} @th,960,16 set 0xdead", hook="prerouting")
    links = one.measure()
    assert links[a, b].corrupt > 0
    assert links[b, a].corrupt == 0
    assert is_good(links[a, c])


def test_a_card_that_breaks_checksums_is_found_although_small_probes_pass(trio: Trio) -> None:
    """What VMware's did: the checksums that a container's kernel leaves to the card come out wrong."""
    one, two, _ = trio.hosts
    a, b, _ = trio.names
    one.host.do(lambda: set_checksum_offload("eth0", on=False))  # else a veth would carry them unfinished
    for protocol, checksum in ((6, 528), (17, 448)):
        rule = f"ip saddr {one.host.underlay} udp dport {PORT} @th,312,8 {protocol} @th,{checksum},16 set 0xdead"
        two.nft(rule, hook="prerouting")
    links = one.measure()
    assert (links[a, b].small, links[a, b].full, links[a, b].offloaded) == (0, 0, 1)
    assert links[a, b].corrupt > 0
    assert is_good(links[b, a])


def test_a_host_that_is_down_is_reached_by_nobody(trio: Trio) -> None:
    one, two, _ = trio.hosts
    a, b, c = trio.names
    two.measuring.stop()
    two.host.ip("link set eth0 down")
    links = one.measure(deadline=4.0)
    assert links[a, b].small == 1
    assert is_good(links[a, c])


def test_a_host_too_old_for_probes_is_unknown(trio: Trio) -> None:
    one, two, _ = trio.hosts
    a, b, _ = trio.names
    two.become_old()
    assert wait_for(lambda: not one.cluster.hosts[two.me.id].probes)
    link = one.measure()[a, b]
    assert (link.small, link.full, link.mtu, link.faulty) == (None, None, None, False)


def test_the_encrypted_way_is_measured_on_its_own(trio: Trio) -> None:
    one, two, _ = trio.hosts
    a, b, _ = trio.names
    for host in trio.hosts:
        host.encryption.require()
        host.agent.refresh()
    assert wait_for(lambda: all(len(trio.rows(host, ENCRYPTED_PROBE_VNI)) == 2 for host in trio.hosts))
    assert wait_for(lambda: is_all_good(one, "encrypted", ENCRYPTED_SIZE), 30)
    two.nft(f"udp dport {PORT} drop")
    assert is_good(one.measure("encrypted")[a, b], ENCRYPTED_SIZE)
    assert one.measure("plain")[a, b].small == 1


def is_all_good(one: ProbedHost, kind: Kind, size: int) -> bool:
    """To and from both others."""
    links = one.measure(kind)
    return len(links) == 4 and all(is_good(link, size) for link in links.values())


def test_what_stays_when_weft_stops_is_harmless(trio: Trio) -> None:
    one, two, _ = trio.hosts
    one.stop()
    before = one.host.dp.links()
    with one.host.capture() as capture:
        two.measure(deadline=3.0)
        ours = [frame for frame in capture.frames() if frame[6:12] != bytes(6)]
    assert one.host.dp.links() == before
    assert ours, "probes arrive"
    assert not [frame for frame in ours if frame[6:12] == mac(one)], "nobody answers"
    one.start()


def mac(one: ProbedHost) -> bytes:
    return pack_mac(probe_mac(one.me.id))


def set_checksum_offload(device: str, *, on: bool) -> None:
    """What `ethtool -K DEVICE tx` does."""
    value = array.array("B", struct.pack("II", _ETHTOOL_STXCSUM, on))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, struct.pack("16sP", device.encode(), value.buffer_info()[0]))
