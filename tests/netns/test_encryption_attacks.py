"""What an encrypted network must not do, tried: no frame leaves in plain, and none that was not encrypted comes in.

A third machine on the underlay, with the right VNI, ports and routes, injects; and whatever an administrator may do to
the WireGuard device or to the host's firewall while the containers talk, the underlay is watched for their bytes. Each
attack is tried on a plain network, too, where it has to succeed.

All of it happens to the same two hosts, one after the other: what was done to them is undone or mended, and the next
test begins when the containers reach each other.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import product
from secrets import token_hex
from typing import Any

import pytest

from tests.netns.secured import PLAIN, PORT, SECRET, WG_PORT, Mesh, SecuredHost, tap, udp_fragments, vxlan
from tests.netns.world import Container, World, wait_for
from weft.dataplane import Vxlan
from weft.errors import WeftError
from weft.keys import PrivateKey
from weft.model import ENDPOINTS, Endpoint, Host, Pool
from weft.store import Delete, DeleteAll, Put

pytestmark = pytest.mark.kernel

UNDERLAYS = ("192.0.2.1/24", "192.0.2.2/24", "192.0.2.66/24")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    with closing(World(folder)) as world, Mesh(world, folder, *UNDERLAYS) as made:
        yield made


@pytest.fixture(scope="module")
def secret(two: Mesh) -> list[Container]:
    return two.containers(SECRET)


@pytest.fixture(scope="module")
def plain(two: Mesh) -> list[Container]:
    made = two.containers(PLAIN)
    assert made[0].pings("10.7.2.3")
    return made


@pytest.fixture
def pair(secret: list[Container]) -> list[Container]:
    """A container on each host, which reach each other."""
    assert reaches(secret)
    return secret


def reaches(secret: list[Container]) -> bool:
    """WireGuard repeats a handshake that was lost after 5 s."""
    return wait_for(lambda: secret[0].ping("10.7.1.3", 0.5), 15)


def say(container: Container, address: str, mark: bytes, times: int = 5) -> None:
    """Send a datagram with a mark, so often."""
    with container.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for _ in range(times):
            udp.sendto(mark, (address, 9999))


def fresh_mark() -> bytes:
    return token_hex(16).encode()


# Injection

Attack = Callable[[Mesh, SecuredHost, int, bytes], None]


def to_the_underlay(two: Mesh, victim: SecuredHost, port: int, payload: bytes) -> None:
    with two.outsider.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(payload, (victim.me.host.underlay, port))


def to_the_wireguard_address(two: Mesh, victim: SecuredHost, port: int, payload: bytes) -> None:
    """As if routed to it, by an outsider who knows the address."""
    two.outsider.ip(f"route replace 100.64.0.0/10 via {victim.me.host.underlay}")
    address = victim.me.host.wg_address or "100.64.9.9"
    with two.outsider.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(payload, (address, port))


def in_the_name_of_a_peer(two: Mesh, victim: SecuredHost, port: int, payload: bytes) -> None:
    """With the WireGuard address of the other host as its source."""
    source = two.hosts[0].me.host.wg_address or "100.64.9.8"
    two.outsider.ip(f"addr replace {source}/32 dev lo")
    with two.outsider.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((source, 0))
        udp.sendto(payload, (victim.me.host.underlay, port))


def in_fragments(two: Mesh, victim: SecuredHost, port: int, payload: bytes) -> None:
    """The first one too short to show the VNI."""
    with two.outsider.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for packet in udp_fragments("192.0.2.66", victim.me.host.underlay, port, payload):
            raw.sendto(packet, (victim.me.host.underlay, 0))


ACCEPTING = """
add table inet mine
add chain inet mine everything { type filter hook prerouting priority -400; }
add rule inet mine everything accept
"""
ATTACKS = [to_the_underlay, to_the_wireguard_address, in_the_name_of_a_peer, in_fragments]


def test_nothing_is_injected(two: Mesh, pair: list[Container]) -> None:
    victim = two.hosts[1]
    with tap(pair[1]) as inside:
        for firewall in ("", "flush ruleset", ACCEPTING):
            victim.host.run("nft", firewall)
            mark = fresh_mark()
            for attack, port in product(ATTACKS, (PORT, WG_PORT)):
                attack(two, victim, port, vxlan(SECRET.vni, mark))
            assert inside.count(mark) == 0, firewall
            say(pair[0], "10.7.1.3", mark)
            assert inside.count(mark) == 5


@pytest.mark.parametrize("attack", [to_the_underlay, in_fragments])
def test_the_same_reaches_a_plain_network(two: Mesh, plain: list[Container], attack: Attack) -> None:
    """So the attacks above are attacks."""
    mark = fresh_mark()
    with tap(plain[1]) as inside:
        attack(two, two.hosts[1], PORT, vxlan(PLAIN.vni, mark))
        assert inside.count(mark) == 1


# Leaks


def link_down(host: SecuredHost) -> None:
    """The device is down, its address stays."""
    host.host.wg.ip(f"link set {host.host.wireguard} down")


def address_gone(host: SecuredHost) -> None:
    host.host.wg.ip(f"addr flush dev {host.host.wireguard}")


def device_deleted(host: SecuredHost) -> None:
    host.host.wg.ip(f"link del {host.host.wireguard}")


def peers_removed(host: SecuredHost) -> None:
    """Another key: the peers take nothing from it. WireGuard tells nobody of that; the timer has it found."""
    seen = host.host.kernel.observe_tunnel()
    assert seen
    host.host.kernel.configure_tunnel(seen.tunnel, PrivateKey.generate())
    host.agent.refresh()


def firewall_flushed(host: SecuredHost) -> None:
    host.host.run("nft", "flush ruleset")


HARM = [link_down, address_gone, device_deleted, peers_removed, firewall_flushed]


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("repairing", [True, False])
def test_nothing_leaves_in_plain(
    two: Mesh, pair: list[Container], harm: Callable[[SecuredHost], None], repairing: bool
) -> None:
    """With weft there, all is well again by itself; without, when it comes back."""
    sender, mark = two.hosts[0], fresh_mark()
    sender.host.ip("route replace default via 192.0.2.66")
    if not repairing:
        sender.agent.stop()
    with tap(sender.host) as wire, tap(two.outsider) as elsewhere:
        say(pair[0], "10.7.1.3", mark)
        harm(sender)
        for _ in range(10):
            say(pair[0], "10.7.1.3", mark)
            assert wire.count(mark, 0.03) == 0
        if not repairing:
            sender.start()
        assert reaches(pair)
        assert wire.count(mark) == 0
        assert elsewhere.count(mark) == 0


def test_a_plain_network_beside_it_is_seen_on_the_wire(
    two: Mesh, pair: list[Container], plain: list[Container]
) -> None:
    """So the tap would see it; and both live side by side."""
    mark = fresh_mark()
    with tap(two.hosts[0].host) as wire:
        say(pair[0], "10.7.1.3", mark)
        assert wire.count(mark) == 0
        say(plain[0], "10.7.2.3", mark)
        assert wire.count(mark) >= 5


def test_another_way_out_shuts_the_network(two: Mesh, pair: list[Container]) -> None:
    """Somebody gives the device's namespace a second link: the tunnels go, attaching is refused, and why is said."""
    sender = two.hosts[0]
    mark = fresh_mark()
    with tap(sender.host) as wire:
        sender.host.ip(f"link add leak0 type veth peer name leak1 netns {sender.host.wg.path}")
        assert wait_for(lambda: "vx7001" not in sender.host.dp.links())
        assert "refused: encrypted networks are shut: leak1 is in the namespace" in sender.encryption.describe()
        with pytest.raises(WeftError, match="leak1"):
            sender.run(two.world, SECRET, "10.7.1.9")
        say(pair[0], "10.7.1.3", mark)
        assert wire.count(mark) == 0
        sender.host.ip("link del leak0")
        assert reaches(pair)


def test_a_tunnel_device_in_the_wrong_namespace_is_made_anew(two: Mesh, pair: list[Container]) -> None:
    """It looks the same but for where its socket is."""
    sender = two.hosts[0]
    sender.agent.stop()
    sender.host.dp.ip("link del vx7001")
    local = sender.me.host.wg_address
    vxlan_device = f"vx7001 netns {sender.host.dp.path} type vxlan id 7001 local {local} dstport {PORT} nolearning"
    sender.host.ip(f"link add {vxlan_device}")
    sender.start()
    assert reaches(pair)
    assert is_encrypted(sender, SECRET.vni)


def is_encrypted(host: SecuredHost, vni: int) -> bool:
    name = f"vx{vni}"
    link = host.host.kernel.observe_links([name])[name].link
    return isinstance(link, Vxlan) and link.encrypted


def test_a_container_is_not_attached_to_a_plain_device_that_was_left_over(two: Mesh) -> None:
    """Of a plain network of the same VNI that the store has lost: a container uses it, so its devices are kept."""
    network = replace(SECRET, vni=7003, name="left", pools=(Pool("10.7.3.0/24"),))
    for one in two.hosts:
        one.run(two.world, replace(network, encrypted=False), f"10.7.3.9{one.me.host.name[-1]}")
    two.store.transact([], [Delete(network.key), DeleteAll(f"{ENDPOINTS}{network.vni}/")])
    for one in two.hosts:
        assert wait_for(lambda one=one: network.vni not in one.cluster.networks and one.agent.responds(5))  # type: ignore[misc]
        assert not is_encrypted(one, network.vni)
        one.attachments.check(encrypted=True)
        one.attachments.attach(network, Endpoint("early", network.vni, "02:42:0a:07:01:63", ("10.7.3.99",), one.me.id))
        assert is_encrypted(one, network.vni)
    mark = fresh_mark()
    with tap(two.hosts[0].host) as wire:
        first, second = two.containers(network)
        with tap(second) as inside:
            assert first.pings("10.7.3.3")
            say(first, "10.7.3.3", mark)
            assert inside.count(mark) == 5
        assert wire.count(mark) == 0


# Peers


def put(two: Mesh, host: Host) -> None:
    two.store.transact([], [Put(host.key, host.encode())])


WRONG: list[dict[str, Any]] = [
    {"wg_key": ""},
    {"wg_key": "nonsense"},
    {"wg_key": PrivateKey(bytes(range(32))).public},
    {"wg_address": ""},
    {"wg_address": "192.0.2.2"},
    {"wg_port": 0},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_peer_that_cannot_be_encrypted_to_gets_nothing(
    two: Mesh, pair: list[Container], change: dict[str, Any]
) -> None:
    """No key, no address, or what a store that was tampered with may say; the right record mends it."""
    sender, right = two.hosts[0], two.hosts[1].me.host
    put(two, replace(right, **change))
    assert wait_for(lambda: right.wg_key not in contacts(sender))
    mark = fresh_mark()
    with tap(sender.host) as wire, tap(pair[1]) as inside:
        for _ in range(3):
            say(pair[0], "10.7.1.3", mark)
            assert wire.count(mark, 0.1) == 0
        assert inside.count(mark) == 0
    put(two, right)
    assert reaches(pair)


def test_a_host_that_is_forgotten_is_no_peer(two: Mesh, pair: list[Container]) -> None:
    sender, gone = two.hosts
    assert gone.me.host.wg_key in contacts(sender)
    sender.forget(gone)
    assert wait_for(lambda: gone.me.host.wg_key not in contacts(sender))
    mark = fresh_mark()
    with tap(sender.host) as wire:
        say(pair[0], "10.7.1.3", mark)
        assert wire.count(mark) == 0
    gone.publish()
    assert reaches(pair)


def contacts(host: SecuredHost) -> set[str]:
    seen = host.host.kernel.observe_tunnel()
    return {peer.key for peer in seen.tunnel.peers} if seen else set()
