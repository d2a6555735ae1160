"""Encrypted or refused: what is wanted, what is published, and what happens when something is missing."""

from __future__ import annotations

import json
import logging
import os
import stat
import time
import traceback
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import cast

import pytest

from tests.unit.conftest import FakeHost
from tests.unit.test_agent import eventually
from weft import topology
from weft.cluster import Cluster
from weft.config import from_environment
from weft.dataplane import FLOOD_MAC, Bridge, Fdb, Peer, Tunnel, TunnelEvent, Vxlan, pack_address
from weft.errors import ConfigError, Conflict, Exhausted, InvalidRequest, KernelError, StoreError, Unreadable
from weft.hosts import TunnelAddressInUse
from weft.kernel.namespace import NamespaceThread
from weft.kernel.userspace import Userspace
from weft.keys import KeyFile, PrivateKey
from weft.model import ENDPOINTS, NETWORKS, Endpoint, Host, Network, Pool
from weft.options import parse_options
from weft.reconcile import Contact, ObservedTunnel, TunnelPlan, plan_tunnel
from weft.store import Delete, DeleteAll, Entry, Put, Snapshot
from weft.store.sqlite import SqliteStore

Hosts = Callable[..., FakeHost]
CIDR = "10.1.0.0/24"
KEYS = [PrivateKey(bytes([n]) * 32).public for n in range(5)]


def secured(number: int, **other: object) -> Host:
    """A host that can encrypt, but for `other`."""
    host = Host(f"{number:032x}", f"h{number}", f"192.0.2.{number}", "", KEYS[number], f"100.64.0.{number}", 51820)
    return replace(host, **other)  # type: ignore[arg-type]


ALICE = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
ALICE_PUBLIC = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
SECRET = Network(7, "secret", (Pool(CIDR),), 0, False, "h1", encrypted=True)


# Records


def test_a_weft_without_encryption_cannot_read_an_encrypted_network() -> None:
    """It takes the pools from the top of the record, and leaves out what it cannot read."""
    stored = json.loads(SECRET.encode())
    assert "pools" not in stored
    assert Network.read(Entry(SECRET.key, SECRET.encode(), 1)) == SECRET
    plain = replace(SECRET, encrypted=False)
    assert "pools" in json.loads(plain.encode())
    assert Network.read(Entry(plain.key, plain.encode(), 1)) == plain


def test_a_damaged_wrapping_is_no_plain_network() -> None:
    for text in ('{"encrypted":{}}', '{"encrypted":[1]}', '{"encrypted":null}'):
        with pytest.raises(Unreadable):
            Network.read(Entry(SECRET.key, text, 1))


def test_hosts_of_older_wefts_are_read() -> None:
    old = '{"id":"a","name":"h1","underlay":"192.0.2.1","version":"0.1.0"}'
    host = Host.read(Entry("topology/hosts/a", old, 1))
    assert not host.can_encrypt


@pytest.mark.parametrize(
    "wrong",
    [
        {"wg_key": ""},
        {"wg_key": "AAAA"},
        {"wg_key": "not base64 at all, but of the right length!!"},
        {"wg_address": ""},
        {"wg_address": "10.0.0.1"},
        {"wg_address": "fd00::1"},
        {"wg_port": 0},
        {"wg_port": 99999},
    ],
)
def test_who_can_encrypt(wrong: dict[str, object]) -> None:
    assert secured(1).can_encrypt
    assert not secured(1, **wrong).can_encrypt


# What is wanted


def cluster_of(*hosts: Host, network: Network = SECRET) -> Cluster:
    cluster = Cluster()
    endpoints = [
        Endpoint(f"e{n}", 7, f"02:42:0a:01:00:{n:02x}", (f"10.1.0.{n}",), host.id) for n, host in enumerate(hosts, 2)
    ]
    records: list[Host | Network | Endpoint] = [*hosts, network, *endpoints]
    cluster.apply((one.key, one.encode()) for one in records)
    return cluster


def test_peers_are_all_others_that_can_encrypt() -> None:
    me = secured(1)
    cluster = cluster_of(me, secured(2), secured(3, wg_key=""), secured(4, underlay="2001:db8::4"))
    assert topology.peers(cluster, me) == {Peer(KEYS[2], "100.64.0.2", "192.0.2.2", 51820)}


@pytest.mark.parametrize("same", [{"wg_key": KEYS[2]}, {"wg_address": "100.64.0.2"}, {"wg_key": KEYS[1]}])
def test_what_two_claim_is_nobodys(same: dict[str, object]) -> None:
    me = secured(1)
    others = topology.peers(cluster_of(me, secured(2), secured(3, **same), secured(4)), me)
    undisputed = {"100.64.0.4"} if same != {"wg_key": KEYS[1]} else {"100.64.0.2", "100.64.0.4"}
    assert {peer.address for peer in others} == undisputed


def test_rows_of_an_encrypted_network_name_no_plain_address() -> None:
    me = secured(1)
    cluster = cluster_of(me, secured(2), secured(3, wg_key="?"), secured(4, wg_address=""))
    rows = topology.network_rows(cluster, 7, me)
    assert {row.vtep for row in rows if isinstance(row, Fdb)} == {pack_address("100.64.0.2")}
    assert Fdb("vx7", FLOOD_MAC, pack_address("100.64.0.2")) in rows
    plain = topology.network_rows(cluster_of(me, secured(2), network=replace(SECRET, encrypted=False)), 7, me)
    assert {row.vtep for row in plain if isinstance(row, Fdb)} == {pack_address("192.0.2.2")}


@pytest.mark.parametrize(("underlay", "overhead"), [("192.0.2.1", 110), ("2001:db8::1", 130)])
def test_overhead(underlay: str, overhead: int) -> None:
    assert topology.overhead(underlay, encrypted=True) == overhead


def test_a_plan_for_the_tunnel() -> None:
    first, second = (Peer(KEYS[n], f"100.64.0.{n}", f"192.0.2.{n}", 51820) for n in (2, 3))
    wanted = Tunnel(KEYS[1], "100.64.0.1", 51820, 1440, frozenset({first, second}))
    assert not plan_tunnel(wanted, ObservedTunnel(wanted, "kernel"))
    moved, rekeyed = first._replace(endpoint="192.0.2.9"), second._replace(key=KEYS[4])
    seen = replace(wanted, key=KEYS[0], peers=frozenset({moved, rekeyed}))
    plan = plan_tunnel(wanted, ObservedTunnel(seen, "kernel", ("down",)))
    assert plan == TunnelPlan(("other key", "down"), tuple(sorted((first, second))), (KEYS[4],))


# Keys


def test_a_key_is_kept_for_root_alone_and_shown_to_nobody(tmp_path: Path) -> None:
    path = tmp_path / "wireguard.key"
    file, key = KeyFile(path), PrivateKey.generate()
    assert file.read() is None
    assert file.age() == 0
    old = os.umask(0)
    try:
        file.write(key)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert [again.public for again in [KeyFile(path).read()] if again] == [key.public]
    assert key.secret.hex() not in f"{key!r} {key} {vars(file)}"
    assert path.read_text() not in repr(key)


def test_public_keys_are_those_of_x25519() -> None:
    """Alice's of RFC 7748, section 6.1."""
    alice = bytes.fromhex(ALICE)
    assert b64decode(PrivateKey(alice).public).hex() == ALICE_PUBLIC


@pytest.mark.parametrize("text", [b"", b"topsecret", b"\xff\x00", b"QUJD"])
def test_a_damaged_key_file_is_named_and_not_shown(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "wireguard.key"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"wireguard.key holds no WireGuard key: delete it") as caught:
        KeyFile(path).read()
    assert "topsecret" not in str(caught.value)
    assert caught.value.__cause__ is None


# Making it


def test_the_first_encrypted_network_makes_all_and_publishes_it(host: Hosts, store: SqliteStore) -> None:
    one = host(1)
    one.create_network("n1", "10.2.0.0/24")
    assert not has_device(one)
    assert not one.me.host.can_encrypt
    network = one.create_network("n2", CIDR, encrypted=True)
    assert network.encrypted
    record = Host.read(store.get(one.me.host.key))  # type: ignore[arg-type]
    assert record.can_encrypt
    assert one.kernel.tunnel
    assert (one.kernel.tunnel.key, one.kernel.tunnel.address) == (record.wg_key, f"{record.wg_address}/10")
    assert one.kernel.tunnel.mtu == 1440
    one.run("n2", "e1", CIDR)
    tunnel = one.kernel.links[f"vx{network.vni}"]
    assert tunnel == Vxlan(tunnel.name, network.vni, record.wg_address, 4789, 1390, f"br{network.vni}", encrypted=True)


def left_over(one: FakeHost, network: Network) -> None:
    """A plain network of the same VNI was there before, and its devices still are."""
    plain = one.attachments.links(replace(network, encrypted=False))
    one.kernel.links.update((link.name, link) for link in plain)


def is_encrypted(one: FakeHost, network: Network) -> bool:
    tunnel = one.kernel.links[f"vx{network.vni}"]
    return isinstance(tunnel, Vxlan) and tunnel.encrypted


def test_a_container_is_not_attached_to_a_plain_device_that_was_left_over(host: Hosts) -> None:
    one = host(1)
    network = one.create_network("n1", CIDR, encrypted=True)
    left_over(one, network)
    one.run("n1", "e1", CIDR)
    assert is_encrypted(one, network)


def test_a_plain_device_is_replaced_although_a_handler_needs_one(host: Hosts) -> None:
    one = host(1)
    network = one.create_network("n1", CIDR, encrypted=True)
    one.run("n1", "e1", CIDR)
    left_over(one, network)
    one.cluster.load(one.store.list("topology/").entries)
    assert one.attachments.pinned()
    one.agent.resync()
    assert is_encrypted(one, network)


def has_device(host: FakeHost) -> bool:
    return host.kernel.tunnel is not None


def test_without_wireguard_nothing_is_left(host: Hosts, store: SqliteStore) -> None:
    one = host(1)
    one.kernel.wireguard = False
    with pytest.raises(KernelError, match="install wireguard-go"):
        one.create_network("n1", CIDR, encrypted=True)
    assert store.list("topology/networks/").entries == ()
    assert not one.me.host.can_encrypt
    assert one.encryption.describe().startswith("refused: create WireGuard device")
    one.create_network("n1", CIDR)


def test_only_who_has_an_encrypted_network_goes_on_trying(host: Hosts) -> None:
    """Not a host without WireGuard, on which the mirror has tried to make another host's."""
    one = host(1)
    one.kernel.wireguard = False
    with pytest.raises(KernelError):
        one.create_network("n1", CIDR, encrypted=True)
    one.agent.start()
    try:
        eventually(lambda: one.cluster.loaded and one.agent.responds(1))
        assert one.encryption.problem
        assert one.agent._next_tunnel == inf
        one.kernel.wireguard = True
        one.create_network("n1", CIDR, encrypted=True)
        one.kernel.tunnel, one.kernel.wireguard = None, False
        one.agent._triggers.put(TunnelEvent())
        eventually(lambda: one.agent._next_tunnel != inf)
    finally:
        one.agent.stop()


def test_joining_with_another_encryption_is_refused(host: Hosts) -> None:
    host(1).create_network("n1", CIDR, encrypted=True)
    with pytest.raises(Conflict, match="it is encrypted"):
        host(2).create_network("n2", CIDR)
    host(1).create_network("n3", "10.2.0.0/24")
    with pytest.raises(Conflict, match="it is not encrypted"):
        host(2).create_network("n3", "10.2.0.0/24", encrypted=True)


def test_an_mtu_that_only_fits_a_plain_network_is_refused(host: Hosts) -> None:
    with pytest.raises(InvalidRequest, match="1390 is the most"):
        host(1).create_network("n1", CIDR, encrypted=True, mtu=1400)


def test_an_address_that_another_host_took_is_not_used(host: Hosts) -> None:
    one = host(1)
    taken: list[str] = []

    def refuse_once() -> None:
        if not taken:
            taken.append(one.me.host.wg_address)
            raise TunnelAddressInUse("taken")
        one.publish()

    one.encryption._publish = refuse_once
    one.create_network("n1", CIDR, encrypted=True)
    assert one.me.host.wg_address not in taken
    assert one.kernel.tunnel
    assert one.kernel.tunnel.address == one.me.host.wg_interface


# The pool of addresses


def choose_pool(one: FakeHost, pool: str) -> None:
    """As after a start with another WEFT_WG_POOL."""
    before, one.me.host = one.me.host, replace(one.me.host, wg_pool=pool)
    one.encryption.resume(before)


def test_addresses_are_of_the_pool(host: Hosts) -> None:
    one = host(1)
    choose_pool(one, "10.99.0.0/24")
    one.create_network("n1", CIDR, encrypted=True)
    assert one.me.host.wg_address.startswith("10.99.0.")
    assert one.kernel.tunnel
    assert one.kernel.tunnel.address == f"{one.me.host.wg_address}/24"


def test_a_pool_that_a_route_of_the_host_overlaps_is_refused_until_there_is_an_address(host: Hosts) -> None:
    one = host(1)
    routes = ["10.99.7.0/24 dev eth1"]
    one.encryption._occupied = lambda _: next(iter(routes), "")
    choose_pool(one, "10.99.0.0/16")
    with pytest.raises(
        ConfigError, match=r"WEFT_WG_POOL=10\.99\.0\.0/16 overlaps the route 10\.99\.7\.0/24 dev eth1 of"
    ):
        one.create_network("n1", CIDR, encrypted=True)
    assert one.kernel.tunnel is None
    found = routes.pop()
    network = one.create_network("n1", CIDR, encrypted=True)
    routes.append(found)
    one.encryption.sync()
    one.attachments.check(encrypted=network.encrypted)


def test_another_pool_is_another_address_and_the_same_key(host: Hosts) -> None:
    one = host(1)
    one.create_network("n1", CIDR, encrypted=True)
    before, tunnel = one.me.host, one.kernel.tunnel
    choose_pool(one, "10.99.0.0/16")

    def away() -> None:
        raise StoreError("away")

    one.encryption._publish = away  # nobody could learn of another address
    one.encryption.sync()
    assert one.kernel.tunnel == tunnel
    one.encryption._publish = one.publish
    assert one.encryption.sync()
    assert one.me.host.can_encrypt
    assert (one.me.host.wg_key, one.me.host.wg_pool) == (before.wg_key, "10.99.0.0/16")
    assert one.kernel.tunnel
    assert one.kernel.tunnel.address == one.me.host.wg_interface


def test_hosts_of_another_pool_are_no_peers() -> None:
    """Its route ends at its own pool."""
    me, other = secured(1), secured(2, wg_pool="10.99.0.0/16", wg_address="10.99.0.2")
    assert other.can_encrypt
    cluster = cluster_of(me, other)
    assert not topology.peers(cluster, me)
    assert not [row for row in topology.network_rows(cluster, 7, me) if isinstance(row, Fdb)]


def test_a_pool_without_a_free_address_says_so(host: Hosts) -> None:
    one = host(1)
    choose_pool(one, "10.99.0.0/24")
    others = [secured(1, id=f"{n:032x}", wg_pool="10.99.0.0/24", wg_address=f"10.99.0.{n}") for n in range(1, 255)]
    one.cluster.apply((other.key, other.encode()) for other in others[1:] if other.id != one.me.id)
    one.encryption.require()
    assert one.me.host.wg_address == "10.99.0.1"
    one.me.encrypt("", "", 0)
    one.cluster.apply([(replace(others[0], id="f" * 32).key, replace(others[0], id="f" * 32).encode())])
    with pytest.raises(Exhausted, match=r"10\.99\.0\.0/24 has no address.*WEFT_WG_POOL"):
        one.encryption.require()


def test_a_store_that_is_away_refuses_and_leaves_no_half_of_it(host: Hosts) -> None:
    one = host(1)

    def away() -> None:
        raise StoreError("away")

    one.encryption._publish = away
    with pytest.raises(StoreError):
        one.encryption.require()
    assert not one.me.host.wg_key
    one.encryption._publish = one.publish
    one.encryption.require()
    assert one.me.host.can_encrypt


@pytest.mark.parametrize(
    ("scheme", "allowed", "refused"), [("etcd", "0", True), ("etcd", "1", False), ("etcds", "0", False)]
)
def test_a_store_without_tls_is_refused_unless_allowed(host: Hosts, scheme: str, allowed: str, refused: bool) -> None:
    settings = from_environment({"WEFT_STORE": f"{scheme}://a:2379", "WEFT_ALLOW_PLAIN_STORE": allowed})
    assert bool(settings.encryption_refusal) == refused
    one = host(1)
    one.encryption._refusal = settings.encryption_refusal
    if refused:
        with pytest.raises(ConfigError, match=r"store with TLS.*WEFT_ALLOW_PLAIN_STORE=1"):
            one.create_network("n1", CIDR, encrypted=True)
        assert one.kernel.tunnel is None
    else:
        assert one.create_network("n1", CIDR, encrypted=True)


def test_peers_are_not_taken_from_a_store_without_tls_either(two: tuple[FakeHost, FakeHost]) -> None:
    """As after a change of the setting, with the device still there."""
    one, other = two
    one.agent.stop()
    known, key = keys(one), one.me.host.wg_key
    one.encryption._refusal = "no TLS"
    one.cluster.load([Entry(host.key, host.encode(), 1) for host in (one.me.host, other.me.host, secured(3))])
    one.encryption.sync()
    assert keys(one) == known
    assert one.encryption.describe() == "refused: no TLS"
    with pytest.raises(ConfigError, match="no TLS"):
        one.encryption.rotate()
    assert one.me.host.wg_key == key


# Keeping it


@pytest.fixture
def two(host: Hosts) -> Iterator[tuple[FakeHost, FakeHost]]:
    """Two hosts whose agents run, each with a container on one encrypted network."""
    one, other = host(1), host(2)
    for each, network in ((one, "n1"), (other, "n2")):
        each.create_network(network, CIDR, encrypted=True)
        each.run(network, f"e{network}", CIDR)
        each.agent.start()
    eventually(lambda: bool(keys(one)) and bool(keys(other)))
    yield one, other
    for each in (one, other):
        each.agent.stop()


def keys(host: FakeHost) -> set[str]:
    return {peer.key for peer in host.kernel.tunnel.peers} if host.kernel.tunnel else set()


def test_peers_follow_records(two: tuple[FakeHost, FakeHost]) -> None:
    one, other = two
    assert keys(one) == {other.me.host.wg_key}
    vtep = pack_address(other.me.host.wg_address)
    eventually(lambda: any(isinstance(row, Fdb) and row.vtep == vtep for row in one.kernel.rows))
    other.store.transact([], [Put(other.record.key, other.record.encode())])  # without a key
    eventually(lambda: not keys(one))
    eventually(lambda: not any(isinstance(row, Fdb) for row in one.kernel.rows))


def test_a_peer_that_answers_from_another_address_stays_there_while_it_does(two: tuple[FakeHost, FakeHost]) -> None:
    """As from a host whose VTEP is on the loopback interface, or one of two uplinks."""
    one, other = two
    assert one.kernel.tunnel
    (told,) = one.kernel.tunnel.peers

    def wander(endpoint: str, handshake: float) -> str:
        assert one.kernel.tunnel
        one.kernel.tunnel = replace(one.kernel.tunnel, peers=frozenset({told._replace(endpoint=endpoint)}))
        one.kernel.contacts = {told.key: Contact(handshake)}
        one.agent.refresh()
        one.agent.preview(5)
        (now,) = one.kernel.tunnel.peers
        return now.endpoint

    assert wander("192.0.2.77", time.time() - 10) == "192.0.2.77"
    assert not one.agent.preview(5).tunnel
    assert wander("192.0.2.77", time.time() - 1000) == told.endpoint
    wander("192.0.2.77", time.time() - 10)
    other.store.transact([], [Put(other.me.host.key, replace(other.me.host, underlay="192.168.78.9").encode())])
    eventually(
        lambda: (
            one.kernel.tunnel is not None and {peer.endpoint for peer in one.kernel.tunnel.peers} == {"192.168.78.9"}
        )
    )


def test_rotation_switches_the_device_before_it_publishes(two: tuple[FakeHost, FakeHost]) -> None:
    one, other = two
    seen: list[tuple[str, str]] = []

    def publish() -> None:
        assert one.kernel.tunnel
        seen.append((one.kernel.tunnel.key, one.me.host.wg_key))
        one.publish()

    one.encryption._publish = publish
    before = one.me.host.wg_key
    now = one.encryption.rotate()
    assert seen == [(before, before), (now, now)]  # first whether the store is there at all
    eventually(lambda: keys(other) == {now})


@pytest.mark.parametrize(("age", "deaf", "handshakes"), [(60, 0, 1), (60, 1, 2), (60, 99, 3), (7200, 99, 0)], ids=str)
def test_sessions_that_do_not_begin_under_the_new_key_are_helped(
    two: tuple[FakeHost, FakeHost],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    age: float,
    deaf: int,
    handshakes: int,
) -> None:
    """Those with peers that there was one with: who is away is not waited for."""
    monkeypatch.setattr("weft.encryption._HANDSHAKE_SECONDS", 0.01)
    one, other = two
    one.kernel.contacts = {other.me.host.wg_key: Contact(time.time() - age)}
    one.kernel.deaf = deaf
    one.encryption.rotate()
    assert one.kernel.handshakes == handshakes
    assert (f"no WireGuard session under the new key yet with {other.me.host.wg_address}" in caplog.text) == (
        handshakes == 3
    )


def test_a_key_is_not_changed_while_nobody_can_be_told(two: tuple[FakeHost, FakeHost]) -> None:
    one, _ = two
    before = one.me.host.wg_key

    def away() -> None:
        raise StoreError("away")

    one.encryption._publish = away
    with pytest.raises(StoreError):
        one.encryption.rotate()
    assert one.kernel.tunnel
    assert one.kernel.tunnel.key == one.me.host.wg_key == before
    one.encryption._rotation = 1e-9
    one.encryption.sync()
    assert one.encryption.describe() == "active (kernel)"
    assert one.kernel.tunnel.key == before


@pytest.mark.parametrize("fails", ["store", "disk"])
def test_a_key_that_cannot_be_published_or_kept_is_taken_back(two: tuple[FakeHost, FakeHost], fails: str) -> None:
    """The others know the old one only, so under the new one nothing could be sent."""
    one, other = two
    before, calls = one.me.host.wg_key, []

    def publish() -> None:
        calls.append(one.me.host.wg_key)
        if fails == "store" and len(calls) > 1:
            raise StoreError("away")
        one.publish()

    def full(key: PrivateKey) -> None:
        raise ConfigError("no space left")

    one.encryption._publish = publish
    if fails == "disk":
        one.encryption._keys.write = full  # type: ignore[method-assign]
    with pytest.raises(StoreError if fails == "store" else ConfigError):
        one.encryption.rotate()
    assert calls[1] != before
    assert one.kernel.tunnel
    kept = one.encryption._keys.read()
    assert kept
    assert one.kernel.tunnel.key == one.me.host.wg_key == kept.public == before
    assert one.encryption.describe() == "active (kernel)"
    assert Host.read(one.store.get(one.me.host.key)).wg_key == before  # type: ignore[arg-type]
    eventually(lambda: keys(other) == {before})


def test_an_old_key_is_changed_by_itself(two: tuple[FakeHost, FakeHost], tmp_path: Path) -> None:
    one, other = two
    before = one.me.host.wg_key
    one.encryption._rotation = 86400.0
    one.agent.refresh()
    os.utime(tmp_path / "1.key", (0, 0))
    one.agent.refresh()
    eventually(lambda: before not in keys(other) and bool(keys(other)))
    assert one.me.host.wg_key != before


def test_another_link_beside_the_device_takes_the_tunnels_away(two: tuple[FakeHost, FakeHost]) -> None:
    """Although a container uses the network: it is cut off rather than heard by others."""
    one, _ = two
    vxlan = next(name for name in one.kernel.links if name.startswith("vx"))
    one.kernel.carrier = {name for name in one.kernel.links if name.startswith("wp")}
    one.kernel.beside = ["eth7"]
    with pytest.raises(ConfigError, match="eth7 is in the namespace of the WireGuard device"):
        one.run("n1", "late", CIDR)
    one.agent._triggers.put(TunnelEvent())
    eventually(lambda: vxlan not in one.kernel.links)
    assert "refused" in one.encryption.describe()
    one.kernel.beside = []
    one.agent._triggers.put(TunnelEvent())
    eventually(lambda: vxlan in one.kernel.links)
    one.run("n1", "late", CIDR)
    assert one.encryption.describe() == "active (kernel)"


def test_a_tunnel_that_the_store_has_lost_is_taken_away_as_well(two: tuple[FakeHost, FakeHost]) -> None:
    one, _ = two
    one.kernel.carrier = {name for name in one.kernel.links if name.startswith("wp")}
    vxlan = next(name for name in one.kernel.links if name.startswith("vx"))
    one.store.transact([], [DeleteAll(NETWORKS), DeleteAll(ENDPOINTS)])
    eventually(lambda: not one.cluster.networks)
    compare(one)
    assert vxlan in one.kernel.links
    one.kernel.beside = ["eth7"]
    compare(one)
    assert vxlan not in one.kernel.links


def test_a_device_that_is_gone_is_made_again_and_the_tunnels_stay(two: tuple[FakeHost, FakeHost]) -> None:
    one, other = two
    links = dict(one.kernel.links)
    one.kernel.tunnel = None
    one.kernel.fail("ensure_tunnel")
    one.agent._triggers.put(TunnelEvent())
    eventually(lambda: keys(one) == {other.me.host.wg_key})
    assert one.kernel.links == links
    assert one.encryption.describe() == "active (kernel)"


def restore_as_plain(one: FakeHost) -> Network:
    """The store becomes that of a time when the network was a plain one, with another container of this host."""
    network = next(iter(one.cluster.networks.values()))
    now = one.cluster.local_endpoints(network.vni, one.me.id)
    plain, before = replace(network, encrypted=False), replace(now[0], id="before")
    one.store.transact([], [Delete(now[0].key), Put(plain.key, plain.encode()), Put(before.key, before.encode())])
    eventually(lambda: before.id in one.cluster.endpoints[network.vni])
    return network


def compare(one: FakeHost) -> None:
    one.agent.refresh()
    assert one.agent.responds(5)


def test_a_restored_store_makes_no_running_container_speak_plain(
    two: tuple[FakeHost, FakeHost], caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = two
    one.kernel.carrier = {name for name in one.kernel.links if name.startswith("wp")}
    network = restore_as_plain(one)
    for _ in range(2):
        compare(one)
        assert is_encrypted(one, network)
    assert caplog.text.count("uses it encrypted (wp") == 1
    one.kernel._remove(f"vx{network.vni}")
    compare(one)
    assert f"vx{network.vni}" not in one.kernel.links
    one.kernel.carrier.clear()
    compare(one)
    assert not is_encrypted(one, network)


def test_a_bug_on_wireguards_side_does_not_keep_plain_networks_from_following(
    two: tuple[FakeHost, FakeHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = two

    def bug() -> None:
        raise ValueError("a message that nobody expected")

    monkeypatch.setattr(one.kernel, "observe_tunnel", bug)
    one.kernel.links["stray"] = Bridge("stray", 1500)
    one.agent.refresh()
    eventually(lambda: "stray" not in one.kernel.links)


def test_networks_that_come_and_go_cost_encryption_nothing(
    two: tuple[FakeHost, FakeHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    compare(one)
    asked: list[str] = []
    for name in ("observe_tunnel", "underlay_mtu"):
        monkeypatch.setattr(one.kernel, name, lambda *_, name=name: asked.append(name))
    network = other.create_network("p2", "10.2.0.0/24")
    eventually(lambda: network.vni in one.cluster.networks)
    assert one.agent.responds(5)
    assert not asked


def test_a_host_that_joins_does_not_have_the_underlay_looked_at(
    two: tuple[FakeHost, FakeHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = two
    compare(one)
    monkeypatch.setattr(one.kernel, "underlay_mtu", lambda *_: pytest.fail("it was"))
    third = secured(3)
    one.store.transact([], [Put(third.key, third.encode())])
    eventually(lambda: third.wg_key in keys(one))


def test_the_device_follows_the_underlays_mtu(two: tuple[FakeHost, FakeHost]) -> None:
    one, _ = two
    one.kernel.mtu = 9000
    compare(one)
    assert one.kernel.tunnel
    assert one.kernel.tunnel.mtu == 8940


def test_no_peer_goes_before_the_store_is_read(two: tuple[FakeHost, FakeHost]) -> None:
    """As after a restart with the store away: the device may know newer keys than the snapshot on disk."""
    one, other = two
    one.agent.stop()
    newer = secured(3)
    one.cluster.load([Entry(host.key, host.encode(), 1) for host in (one.me.host, secured(2), newer)], certain=False)
    assert one.kernel.tunnel
    known = Peer(KEYS[4], newer.wg_address, newer.underlay, 51820)
    one.kernel.tunnel = replace(one.kernel.tunnel, peers=one.kernel.tunnel.peers | {known})
    one.encryption.sync()
    assert keys(one) == {other.me.host.wg_key, KEYS[2], KEYS[4]}


def test_peers_outlast_a_loss_of_the_store(two: tuple[FakeHost, FakeHost], monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the others have registered again, or are surely gone. Who is forgotten is no peer from then on."""
    one, other = two
    now = time.monotonic()
    monkeypatch.setattr("weft.cluster.monotonic", lambda: now)
    monkeypatch.setattr("weft.encryption.monotonic", lambda: now)
    known = keys(one)
    for _ in range(2):  # a second snapshot makes it last no longer
        one.agent._triggers.put(Snapshot((), 1))
        assert one.agent.responds(5)
        assert keys(one) == known
        assert one.agent._next_tunnel != inf
        now += 10
    eventually(lambda: not keys(one))
    eventually(lambda: one.agent._next_tunnel == inf)
    one.agent._triggers.put(Snapshot((), 1))
    other.publish()
    eventually(lambda: keys(one) == known)
    other.store.transact([], [Delete(other.me.host.key)])
    eventually(lambda: not keys(one))


@pytest.mark.parametrize("damaged", [False, True])
def test_after_a_start_the_key_is_that_of_the_file(
    two: tuple[FakeHost, FakeHost], tmp_path: Path, damaged: bool
) -> None:
    """The record may be from before the last change of the key."""
    one, _ = two
    before = one.me.host
    now = one.encryption.rotate()
    if damaged:
        (tmp_path / "1.key").write_text("?")
    one.encryption.resume(before)
    assert one.me.host == replace(before, wg_key=before.wg_key if damaged else now)
    one.agent.stop()  # or it makes the device anew
    one.kernel.tunnel = None
    one.encryption.resume(one.record)
    assert one.me.host == one.record


def test_the_address_is_the_devices_while_the_store_is_away(two: tuple[FakeHost, FakeHost]) -> None:
    """As after a restart with a snapshot from before the first encrypted network: what runs is not cut off."""
    one, _ = two
    one.agent.stop()
    before, tunnel = one.me.host, one.kernel.tunnel

    def away() -> None:
        raise StoreError("away")

    one.encryption._publish = away
    one.encryption.resume(one.record)
    assert one.me.host == before
    one.encryption.sync()
    assert one.kernel.tunnel == tunnel
    assert one.encryption.describe() == "active (kernel)"


def test_secrets_are_in_no_log(
    two: tuple[FakeHost, FakeHost], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    two[0].encryption.rotate()
    for path in tmp_path.glob("*.key"):
        assert path.read_text() not in caplog.text


@pytest.mark.parametrize("answer", ["private_key={}\n\n", "private_key={}\nerrno=\n\n", "errno=0\nprivate_key={}\n\n"])
def test_an_answer_of_wireguard_go_that_is_not_understood_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    device = Userspace(cast(NamespaceThread, None), "weft-wg")
    monkeypatch.setattr(device, "_ask", lambda _: answer.format(ALICE))
    with pytest.raises(KernelError, match="names no errno") as caught:
        device.read()
    shown = "".join(traceback.format_exception(caught.value))
    assert ALICE not in shown


# Options


@pytest.mark.parametrize(("text", "on"), [("", True), ("true", True), ("1", True), ("false", False), ("0", False)])
def test_the_option(text: str, on: bool) -> None:
    assert parse_options({"encrypted": text}).encrypted is on


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must be true or false"):
        parse_options({"weft.encrypted": "maybe"})
    with pytest.raises(InvalidRequest, match="unknown option 'encrypt'"):
        parse_options({"encrypt": ""})


@pytest.mark.parametrize(("text", "seconds"), [("off", 0), ("1", 86400), ("30", 2592000)])
def test_the_interval_of_keys(text: str, seconds: float) -> None:
    assert from_environment({"WEFT_KEY_ROTATION": text}).key_rotation == seconds


def test_a_senseless_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match="days from 1 to 365, or off"):
        from_environment({"WEFT_KEY_ROTATION": "0.01"})
