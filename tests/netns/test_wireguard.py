"""The WireGuard device as weft makes it, repairs it, and changes its key; judged by `ip` and by packets."""

from __future__ import annotations

import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.netns.secured import PLAIN, SECRET, WG_PORT, Mesh, tap
from tests.netns.world import Container, Host, World, wait_for
from weft.dataplane import Peer, Tunnel
from weft.errors import KernelError, StoreError
from weft.kernel import userspace
from weft.keys import PrivateKey
from weft.model import Pool
from weft.reconcile import TunnelPlan, plan_tunnel
from weft.store import Put

UNDERLAYS = ("192.0.2.1/24", "192.0.2.2/24", "192.0.2.66/24")
ROTATIONS = 10
STAGED = 128
"""Packets that WireGuard keeps for a peer without a session (MAX_STAGED_PACKETS)."""
SO_RCVBUFFORCE = 33


@pytest.fixture
def two(world: World, tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(world, tmp_path, *UNDERLAYS) as made:
        yield made


class Flow:
    """A datagram every 20 ms from one container to another, each with a number. All have to arrive, once."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.sent = 0
        self._source = source
        self._sink = sink
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            self._source.sendto(f"{self.sent}".encode(), self._sink.getsockname())
            self.sent += 1

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def received(self) -> int:
        """After the end."""
        return received(self._sink, self.sent)


@contextmanager
def flow(source: Container, target: Container, address: str) -> Iterator[Flow]:
    with (
        source.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        target.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink,
    ):
        sink.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)  # nobody reads until the end
        sink.bind((address, 7))
        running = Flow(sender, sink)
        try:
            yield running
        finally:
            running.end()


def received(sock: socket.socket, expected: int) -> int:
    """How many different datagrams have come, once all have or none comes any more."""
    seen: set[bytes] = set()
    sock.settimeout(3)
    with suppress(TimeoutError):
        while len(seen) < expected:
            seen.add(sock.recv(2048))
    return len(seen)


@pytest.mark.kernel
def test_keys_change_under_traffic(two: Mesh) -> None:
    """Both ways, every 20 ms, over ten changes on one host; afterwards nobody has an old key."""
    first, second = two.containers(SECRET)
    assert first.pings("10.7.1.3")
    owner, peer = two.hosts
    changed = [owner.me.host.wg_key]
    with flow(first, second, "10.7.1.3") as there, flow(second, first, "10.7.1.2") as back:
        overtaxed = 0
        for _ in range(ROTATIONS):
            start = there.sent
            changed.append(owner.encryption.rotate())
            assert wait_for(lambda: known_keys(peer.host) == {changed[-1]}, 30)
            assert wait_for(lambda: shaken(peer.host, changed[-1]), 30)
            overtaxed += max(0, there.sent - start - STAGED)
            before = there.sent  # the next change comes while packets flow under the new key
            assert wait_for(lambda before=before: there.sent > before + 5)  # type: ignore[misc]
        for one in (there, back):
            one.end()
            assert one.sent - one.received() <= overtaxed
    assert len(set(changed)) == ROTATIONS + 1
    seen = owner.host.kernel.observe_tunnel()
    assert seen
    assert [key.public for key in [owner.keys.read()] if key] == [seen.tunnel.key] == [changed[-1]]


def test_a_key_that_cannot_be_published_cuts_nothing_off(two: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store fails in the middle of a change, and stays away: this host goes on under its old key."""
    first, second = two.containers(SECRET)
    assert first.pings("10.7.1.3")
    owner = two.hosts[0]
    before = owner.me.host.wg_key
    answers = iter([owner.publish])

    def publish() -> None:
        try:
            next(answers)()
        except StopIteration:
            raise StoreError("away") from None

    monkeypatch.setattr(owner.encryption, "_publish", publish)
    with flow(first, second, "10.7.1.3") as there, flow(second, first, "10.7.1.2") as back:
        with pytest.raises(StoreError):
            owner.encryption.rotate()
        sent = there.sent
        assert wait_for(lambda: there.sent > sent + 5)
        for one in (there, back):
            one.end()
            assert one.received() == one.sent
    seen = owner.host.kernel.observe_tunnel()
    assert seen
    assert [key.public for key in [owner.keys.read()] if key] == [seen.tunnel.key] == [owner.me.host.wg_key] == [before]


def known_keys(host: Host) -> set[str]:
    seen = host.kernel.observe_tunnel()
    return {peer.key for peer in seen.tunnel.peers} if seen else set()


def shaken(host: Host, key: str) -> bool:
    """Whether there was a handshake with the owner of the key."""
    seen = host.kernel.observe_tunnel()
    return bool(seen and key in seen.contacts and seen.contacts[key].handshake)


def test_the_key_is_in_one_file_for_root_alone(two: Mesh, tmp_path: Path) -> None:
    two.containers(SECRET)
    files = [path for path in tmp_path.glob("*key*") if path.is_file()]
    assert len(files) == len(two.hosts)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    secrets = [key.secret.hex() for key in (host.keys.read() for host in two.hosts) if key]
    database = b"".join(path.read_bytes() for path in tmp_path.glob("weft.db*"))
    for path in files:
        assert path.read_bytes() not in database
    assert not any(secret.encode() in database for secret in secrets)


@pytest.fixture
def tunnel(host: Host) -> tuple[Tunnel, PrivateKey]:
    """A device with two peers, made and in order."""
    key = PrivateKey.generate()
    peers = frozenset(Peer(PrivateKey.generate().public, f"100.64.0.{n}", f"192.0.2.{n}", WG_PORT + n) for n in (7, 8))
    wanted = Tunnel(key.public, "100.64.0.1/10", WG_PORT, 1440, peers)
    apply(host, wanted, key)
    return wanted, key


def apply(host: Host, wanted: Tunnel, key: PrivateKey) -> TunnelPlan:
    host.kernel.ensure_tunnel()
    seen = host.kernel.observe_tunnel()
    assert seen
    plan = plan_tunnel(wanted, seen)
    if plan.reasons:
        host.kernel.configure_tunnel(wanted, key)
    host.kernel.write_peers(plan)
    return plan


def settled(host: Host, wanted: Tunnel) -> bool:
    seen = host.kernel.observe_tunnel()
    return seen is not None and not plan_tunnel(wanted, seen)


@pytest.mark.kernel
def test_a_tunnel_is_made_as_wanted(host: Host, tunnel: tuple[Tunnel, PrivateKey]) -> None:
    wanted, key = tunnel
    assert settled(host, wanted)
    assert not apply(host, wanted, key)


def test_an_mtu_may_be_too_small_for_ipv6(host: Host, tunnel: tuple[Tunnel, PrivateKey]) -> None:
    for mtu in (1200, 1440):
        wanted = replace(tunnel[0], mtu=mtu)
        apply(host, wanted, tunnel[1])
        assert settled(host, wanted)


def test_its_device_is_alone_and_its_socket_is_the_hosts(host: Host, tunnel: tuple[Tunnel, PrivateKey]) -> None:
    assert host.wg.links() == {host.wireguard}
    assert host.wireguard not in host.links()
    assert host.kernel.intruders() == []
    shown = host.wg.run("ip", "-br", "addr", "show", host.wireguard)
    assert shown.split()[2:] == ["100.64.0.1/10"]
    assert wait_for(lambda: f":{WG_PORT}" in host.run("ss", "-lun"))
    assert host.wg.run("ip", "route") == f"100.64.0.0/10 dev {host.wireguard} proto kernel scope link src 100.64.0.1 \n"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("ip link set {} mtu 1300", "other mtu"),
        ("ip link set {} down", "down"),
        ("ip addr flush dev {}", "other address"),
        ("ip addr add 100.64.7.7/10 dev {}", "other address"),
    ],
)
def test_drift_is_seen_and_repaired(host: Host, tunnel: tuple[Tunnel, PrivateKey], command: str, reason: str) -> None:
    host.wg.run(*command.format(host.wireguard).split())
    assert reason in apply(host, *tunnel).reasons
    assert settled(host, tunnel[0])


@pytest.mark.kernel
def test_peers_follow(host: Host, tunnel: tuple[Tunnel, PrivateKey]) -> None:
    """One moves, one has a new key at its old address, one comes, one goes."""
    wanted, key = tunnel
    first, second = sorted(wanted.peers)
    peers = {
        first._replace(endpoint="192.0.2.77"),
        second._replace(key=PrivateKey.generate().public),
        Peer(PrivateKey.generate().public, "100.64.0.9", "2001:db8::9", WG_PORT),
    }
    changed = Tunnel(wanted.key, wanted.address, wanted.port, wanted.mtu, frozenset(peers))
    plan = apply(host, changed, key)
    assert (len(plan.put), plan.delete) == (3, (second.key,))
    assert settled(host, changed)
    assert apply(host, wanted, key)
    assert settled(host, wanted)


def test_a_running_device_is_found_again(host: Host, tunnel: tuple[Tunnel, PrivateKey]) -> None:
    """As after weft's restart: the same device, not another."""
    index = host.wg.link(host.wireguard)["ifindex"]
    host.kernel.close()
    host.kernel.open()
    assert not apply(host, *tunnel)
    assert host.wg.link(host.wireguard)["ifindex"] == index


def test_a_deleted_device_is_made_again(host: Host, tunnel: tuple[Tunnel, PrivateKey]) -> None:
    host.wg.ip(f"link del {host.wireguard}")
    assert not host.kernel.has_tunnel("100.64.0.1/10")
    apply(host, *tunnel)
    assert settled(host, tunnel[0])


def test_another_link_in_its_namespace_is_told(host: Host, tunnel: tuple[Tunnel, PrivateKey]) -> None:
    host.wg.ip("link add other0 type veth peer name other1")
    assert host.kernel.intruders() == ["other0", "other1"]


def test_nothing_passes_for_the_kernels_own_or_for_the_device_by_its_name(
    host: Host, tunnel: tuple[Tunnel, PrivateKey]
) -> None:
    name = next(name for name in ("sit0", "ip_vti0", "erspan0") if name not in host.wg.links())
    host.wg.ip(f"link add {name} type veth peer name other1")
    assert host.kernel.intruders() == sorted(("other1", name))
    assert host.kernel.has_tunnel("100.64.0.1/10")
    host.wg.ip(f"link del {host.wireguard}")
    host.wg.ip(f"link add {host.wireguard} type bridge")
    host.wg.ip(f"addr add 100.64.0.1/10 dev {host.wireguard}")
    host.wg.ip(f"link set {host.wireguard} up")
    assert not host.kernel.has_tunnel("100.64.0.1/10")


def test_a_port_in_use_is_named(host: Host) -> None:
    key = PrivateKey.generate()
    with host.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", WG_PORT))
        with pytest.raises(KernelError, match=r"UDP port 51820 is used by another program.*WEFT_WG_PORT"):
            apply(host, Tunnel(key.public, "100.64.0.1/10", WG_PORT, 1440), key)
    apply(host, Tunnel(key.public, "100.64.0.1/10", WG_PORT, 1440), key)


def test_without_either_wireguard_it_is_said_what_to_install(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that has WireGuard does not need the other."""
    monkeypatch.setattr(userspace, "which", lambda *_, **__: None)
    refusal = ""
    try:
        host.kernel.ensure_tunnel()
    except KernelError as error:
        refusal = str(error)
    if refusal:
        assert "modprobe wireguard" in refusal
        assert "apt install wireguard-go" in refusal
        assert host.wg.links() == set()
    else:
        assert host.wg.link(host.wireguard)["linkinfo"]["info_kind"] == "wireguard"


@pytest.mark.parametrize("underlays", [UNDERLAYS, ("2001:db8::1/64", "2001:db8::2/64", "2001:db8::66/64")])
def test_the_largest_packets_cross_whole(world: World, tmp_path: Path, underlays: tuple[str, ...]) -> None:
    """1390 bytes over IPv4, 1370 over IPv6; and a plain network beside it has its own MTU."""
    with Mesh(world, tmp_path, *underlays) as two:
        for network, name in ((SECRET, "1"), (PLAIN, "2")):
            first, second = two.containers(network)
            mtu = first.link("eth0")["mtu"]
            overhead = 70 if ":" in underlays[0] else 50
            assert mtu == (1500 - overhead if network is PLAIN else 1500 - 50 - overhead - 10)
            assert first.pings(f"10.7.{name}.3")
            with (
                second.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink,
                first.socket(socket.AF_INET, socket.SOCK_DGRAM) as source,
            ):
                sink.bind((f"10.7.{name}.3", 7))
                source.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
                source.sendto(bytes(mtu - 28), (f"10.7.{name}.3", 7))
                assert received(sink, 1) == 1


def test_nothing_of_the_host_collides_with_wireguards_pool(world: World, tmp_path: Path) -> None:
    """Each host's WireGuard address is the other one's on the underlay, and that of the other's container."""
    underlays = ("100.64.0.2/10", "100.64.0.3/10", "100.64.0.66/10")
    with Mesh(world, tmp_path, *underlays) as two:
        first, second = two.hosts
        for one, other in ((first, second), (second, first)):
            key = PrivateKey.generate()
            one.keys.write(key)
            one.me.encrypt(key.public, other.me.host.underlay, WG_PORT)
            one.publish()
        containers = two.containers(replace(SECRET, pools=(Pool("100.64.0.0/24"),)))
        assert first.me.host.wg_address == second.me.host.underlay
        assert containers[0].pings("100.64.0.3")
        mark = b"collision"
        with tap(first.host) as underlay, containers[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.sendto(mark, ("100.64.0.3", 9999))
            assert underlay.count(mark) == 0
        assert "100.64.0.3 dev eth0" in first.host.run("ip", "route", "get", "100.64.0.3")


def test_a_host_that_moves_is_followed(two: Mesh) -> None:
    first, _ = two.containers(SECRET)
    assert first.pings("10.7.1.3")
    moving = two.hosts[1]
    moving.host.ip("addr del 192.0.2.2/24 dev eth0")
    moving.host.ip("addr add 192.0.2.22/24 dev eth0")
    moving.me.move("192.0.2.22")
    moving.publish()
    moving.agent.refresh()
    assert wait_for(lambda: any(p.endpoint == "192.0.2.22" for p in peers(two.hosts[0].host)))
    assert wait_for(lambda: first.ping("10.7.1.3", 0.5), 15)


def peers(host: Host) -> frozenset[Peer]:
    seen = host.kernel.observe_tunnel()
    return seen.tunnel.peers if seen else frozenset()


def test_two_hosts_that_claim_one_address_are_both_no_peers(two: Mesh) -> None:
    first, _ = two.containers(SECRET)
    assert first.pings("10.7.1.3")
    impostor = replace(two.hosts[1].me.host, id="f" * 32, name="h9", wg_key=PrivateKey.generate().public)
    two.store.transact([], [Put(impostor.key, impostor.encode())])
    assert wait_for(lambda: not peers(two.hosts[0].host))
