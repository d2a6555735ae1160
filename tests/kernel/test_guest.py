"""The kernel that `make test-kernel` boots has what tests are run on it for: WireGuard of its own, under our VXLAN."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pyroute2 import WireGuard

from lab.kernel import GUEST
from tests.netns.world import Container, Host, World
from weft.dataplane import FLOOD_MAC, Fdb, pack_address

pytestmark = pytest.mark.kernel

T = TypeVar("T")

VNI = 7
MTU = 1390
PORT = 51820
OUTSIDE = ("192.0.2.1", "192.0.2.2")
INSIDE = ("100.64.0.1", "100.64.0.2")


def test_this_is_the_kernel_that_was_booted() -> None:
    assert os.uname().release == os.environ[GUEST]
    assert b"lab/guest/main" in Path("/proc/1/cmdline").read_bytes()


def test_containers_reach_each_other_by_vxlan_over_the_kernels_wireguard(world: World) -> None:
    hosts = world.hosts(*(f"{address}/24" for address in OUTSIDE))
    keys = [make_device(host, inside) for host, inside in zip(hosts, INSIDE, strict=True)]
    for here in (
        0,
        1,
    ):  # both, before there is anything to send: a handshake that comes too early is repeated after 5 s
        add_peer(hosts[here], 1 - here, keys[1 - here])
    one, two = (connect(world, hosts[here], here) for here in (0, 1))

    with hosts[0].capture() as capture:
        assert one.pings("10.0.0.2")
        assert two.pings("10.0.0.1")
        assert not capture.frames(), "VXLAN on the underlay outside of WireGuard"

    for host in hosts:
        (peer,) = wireguard(host, lambda socket: socket.info("wg0")[0].get_attr("WGDEVICE_A_PEERS"))
        assert peer.get_attr("WGPEER_A_RX_BYTES")
        assert host.link("wg0")["linkinfo"]["info_kind"] == "wireguard"


def make_device(host: Host, address: str) -> bytes:
    """A WireGuard link with a new key; the public half, which this kernel has computed."""
    host.ip("link add wg0 type wireguard")
    private = b64encode(os.urandom(32)).decode()
    wireguard(host, lambda socket: socket.set("wg0", private_key=private, listen_port=PORT))
    host.ip(f"addr add {address}/24 dev wg0")
    host.ip("link set wg0 up")
    public: bytes = wireguard(host, lambda socket: socket.info("wg0")[0].get_attr("WGDEVICE_A_PUBLIC_KEY"))
    return public


def add_peer(host: Host, number: int, key: bytes) -> None:
    peer = {
        "public_key": key.decode(),
        "endpoint_addr": OUTSIDE[number],
        "endpoint_port": PORT,
        "allowed_ips": [f"{INSIDE[number]}/32"],
    }
    wireguard(host, lambda socket: socket.set("wg0", peer=peer))


def connect(world: World, host: Host, number: int) -> Container:
    """A container on a network of which the other host is reached through WireGuard."""
    bridge, vxlan = host.network(VNI, MTU)
    host.apply(bridge, replace(vxlan, local=INSIDE[number]))
    host.put(Fdb(vxlan.name, FLOOD_MAC, pack_address(INSIDE[1 - number])))
    return world.container(host, VNI, f"02:42:0a:00:00:0{number + 1}", f"10.0.0.{number + 1}/24")


def wireguard(host: Host, work: Callable[[Any], T]) -> T:
    def with_socket() -> T:
        with WireGuard() as socket:
            return work(socket)

    return host.do(with_socket)
