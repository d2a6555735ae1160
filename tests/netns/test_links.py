"""Links of the data plane: made, observed, drifted, repaired, refused."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.netns.world import MTU, UDP_PORT, Host, World
from weft.dataplane import SHARED_MAC, Bridge, Link, Port, Station, Vxlan
from weft.errors import KernelError
from weft.reconcile import Create, Remove, Update

MAC = "02:42:0a:00:00:02"
KERNEL = tuple(int(part) for part in os.uname().release.split(".")[:2])


def port(name: str = "wp1", bridge: str = "br7", mtu: int = MTU) -> Port:
    return Port(name, bridge, mtu, peer=name.replace("wp", "wc"), mac=MAC)


@pytest.fixture
def links(host: Host) -> tuple[Bridge, Vxlan, Port]:
    """A network with one port, made and in order."""
    made = (*host.network(7), port())
    host.apply(*made)
    assert not host.plan(*made)
    return made


@pytest.mark.kernel
@pytest.mark.parametrize("underlay", ["192.0.2.1/24", "2001:db8::1/64"])
def test_links_are_made_as_wanted(world: World, underlay: str) -> None:
    host = world.host(underlay)
    wanted = (*host.network(7), port())

    host.apply(*wanted)

    assert {name: seen.link for name, seen in host.kernel.observe_links().items()} == {w.name: w for w in wanted}
    assert not host.plan(*wanted)


@pytest.mark.kernel
def test_bridge_as_ip_sees_it(host: Host, links: tuple[Link, ...]) -> None:
    seen = host.dp.link("br7")
    data = seen["linkinfo"]["info_data"]
    assert seen["mtu"] == MTU
    assert "UP" in seen["flags"]
    assert seen["inet6_addr_gen_mode"] == "none"
    assert (data["stp_state"], data["mcast_snooping"]) == (0, 0)


RESOLVER = (("169.254.77.53", "169.254.77.53/32"), ("169.254.77.53", "10.77.0.0/24"))


def test_a_bridge_with_the_resolvers_address(host: Host) -> None:
    """It answers for the address itself and has a way back; whatever else it is given is taken away again."""
    wanted = Bridge("br7", MTU, RESOLVER)
    host.apply(wanted)
    assert not host.plan(wanted)
    assert "10.77.0.0/24 proto kernel scope link src 169.254.77.53" in host.dp.run("ip", "route", "show", "dev", "br7")
    assert host.dp.link("br7")["address"] == SHARED_MAC
    host.dp.run("ip", "link", "set", "br7", "address", MAC)
    assert host.apply(wanted) == [Update(wanted, "has a MAC of its own")]
    assert not host.plan(wanted)
    host.dp.run("ip", "addr", "del", "169.254.77.53/32", "dev", "br7")
    host.dp.run("ip", "addr", "add", "10.77.0.9/16", "dev", "br7")
    assert [type(step) for step in host.plan(wanted)] == [Update]
    host.apply(wanted)
    assert not host.plan(wanted)
    host.apply(replace(wanted, addresses=()))
    assert "inet " not in host.dp.run("ip", "addr", "show", "dev", "br7")


@pytest.mark.kernel
def test_vxlan_device_as_ip_sees_it(host: Host, links: tuple[Link, ...]) -> None:
    seen = host.dp.link("vx7")
    data, port_data = seen["linkinfo"]["info_data"], seen["linkinfo"]["info_slave_data"]
    assert (seen["mtu"], seen["master"], seen["inet6_addr_gen_mode"]) == (MTU, "br7", "none")
    assert "UP" in seen["flags"]
    assert (data["id"], data["local"], data["port"]) == (7, host.underlay, UDP_PORT)
    assert (data["learning"], data.get("proxy", False)) == (False, False)
    assert (port_data["learning"], port_data["proxy_arp_wifi"], port_data["neigh_suppress"]) == (False, True, False)


CHOSEN = {
    "source_ports": (40000, 50000),
    "ttl": 9,
    "tos": 46 << 2,
    "checksum": False,
    "multicast": False,
    "suppress": True,
}


@pytest.mark.kernel
@pytest.mark.parametrize("underlay", ["192.0.2.1/24", "2001:db8::1/64"])
def test_what_users_choose_for_a_tunnel_is_made_and_read_back(world: World, underlay: str) -> None:
    host = world.host(underlay)
    bridge, plain = host.network(7)
    chosen = replace(plain, port=4790, **CHOSEN)  # type: ignore[arg-type]
    host.apply(bridge, chosen)
    assert not host.plan(bridge, chosen)
    seen = host.dp.link("vx7")["linkinfo"]
    data = seen["info_data"]
    assert (data["port"], data["port_range"]) == (4790, {"low": 40000, "high": 50000})
    assert (data["ttl"], data["tos"], data["udp_csum"]) == (9, "0xb8", False)
    assert (data["udp_zero_csum6_tx"], data["udp_zero_csum6_rx"]) == (True, True)
    assert seen["info_slave_data"]["mcast_flood"] is False

    reason = "port is 4790, not 4789"
    assert host.apply(bridge, plain) == [Remove("vx7", reason), Create(plain, reason)]
    inherited = replace(plain, tos=1, ttl=3, multicast=False)  # changed in place
    assert [str(step) for step in host.apply(bridge, inherited)] == [
        "update VXLAN device vx7 (VNI 7, UDP port 4789) (ttl is none, tos is none, multicast is on)"
    ]
    assert host.dp.link("vx7")["linkinfo"]["info_data"]["tos"] == "0x1"  # "inherit" without -j
    host.apply(bridge, plain)
    assert not host.plan(bridge, plain)


@pytest.mark.kernel
def test_vxlan_socket_is_in_the_host_and_the_device_is_not(host: Host, links: tuple[Link, ...]) -> None:
    assert f":{UDP_PORT}" in host.run("ss", "-lun")
    assert f":{UDP_PORT}" not in host.dp.run("ss", "-lun")
    assert "vx7" not in host.links()


def test_port_as_ip_sees_it(host: Host, links: tuple[Link, ...]) -> None:
    seen, peer = host.dp.link("wp1"), host.link("wc1")
    assert (seen["mtu"], seen["master"], seen["inet6_addr_gen_mode"]) == (MTU, "br7", "none")
    assert "UP" in seen["flags"]
    assert (peer["mtu"], peer["address"]) == (MTU, MAC)
    assert seen["linkinfo"]["info_slave_data"]["learning"] is False
    (entry,) = [entry for entry in host.dp.fdb("wp1") if entry["mac"] == MAC]
    assert (entry["master"], entry["state"]) == ("br7", "static")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("ip link set br7 mtu 1400", "mtu is 1400"),
        ("ip link set vx7 mtu 1400", "mtu is 1400"),
        ("ip link set wp1 mtu 1400", "mtu is 1400"),
        ("ip link set vx7 nomaster", "bridge is none"),
        ("ip link set wp1 nomaster", "bridge is none"),
        ("ip link set br7 down", "down"),
        ("ip link set vx7 down", "down"),
        ("ip link set wp1 down", "down"),
        ("bridge link set dev vx7 learning on", "learning on"),
        ("bridge link set dev wp1 learning on", "learning on"),
        ("bridge link set dev vx7 neigh_suppress on", "suppress is on"),
        ("ip link set vx7 type bridge_slave proxy_arp_wifi off", "proxyarp_wifi off"),
        ("ip link set vx7 type vxlan learning", "vxlan_learning on"),
        ("ip link set vx7 type vxlan ttl 5", "ttl is 5"),
        ("ip link set vx7 type vxlan tos inherit", "tos is 1"),
        ("bridge link set dev vx7 mcast_flood off", "multicast is off"),
        ("ip link set br7 type bridge mcast_snooping 1", "mcast_snooping on"),
        ("ip link set br7 type bridge stp_state 1", "stp_state on"),
        ("ip link set br7 addrgenmode eui64", "makes IPv6 addresses"),
    ],
)
def test_drift_is_seen_and_repaired(host: Host, links: tuple[Link, ...], command: str, reason: str) -> None:
    host.dp.run(*command.split())

    steps = host.apply(*links)

    changed = next(link for link in links if link.name in command)
    assert Update(changed, steps[0].reason) in steps
    assert reason in steps[0].reason
    assert not host.plan(*links)


def test_master_of_another_network_is_put_right(host: Host, links: tuple[Link, ...]) -> None:
    others = host.network(8)
    host.apply(*links, *others)
    host.dp.ip("link set wp1 master br8")

    assert [str(step) for step in host.apply(*links, *others)] == [
        "update port wp1 (bridge is br8, learning on)"  # as a port is when it is put into a bridge
    ]
    assert not host.plan(*links, *others)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vni": 8}, "vni is 7, not 8"),
        ({"local": "192.0.2.9"}, "local is 192.0.2.1, not 192.0.2.9"),
        ({"local": "2001:db8::9"}, "local is 192.0.2.1, not 2001:db8::9"),
        ({"port": 4790}, "port is 4789, not 4790"),
        ({"source_ports": (1024, 2048)}, "source ports is none, not (1024, 2048)"),
        ({"checksum": False}, "checksum is on, not off"),
    ],
)
def test_vxlan_device_that_cannot_be_changed_is_made_anew(
    host: Host, links: tuple[Bridge, Vxlan, Port], change: dict[str, str | int], reason: str
) -> None:
    bridge, vxlan, own_port = links
    wanted = replace(vxlan, **change)  # type: ignore[arg-type]

    assert host.apply(bridge, wanted, own_port) == [Remove("vx7", reason), Create(wanted, reason)]
    assert not host.plan(bridge, wanted, own_port)


@pytest.mark.parametrize(
    "command",
    [
        "vx7 type vxlan id 7 local 192.0.2.1 dstport 4789 nolearning",
        "vx7 type bridge",
    ],
)
def test_impostor_is_replaced(host: Host, command: str) -> None:
    """The first one has its UDP socket in the data plane, where there is no underlay."""
    host.dp.ip(f"link add {command}")
    links = host.network(7)

    steps = host.apply(*links)

    assert [type(step) for step in steps] == [Remove, Create, Create]
    assert not host.plan(*links)


def test_foreign_link_is_removed(host: Host, links: tuple[Link, ...]) -> None:
    host.dp.ip("link add foreign type veth peer name alien")

    assert {step.name for step in host.apply(*links) if isinstance(step, Remove)} == {"foreign", "alien"}
    assert host.dp.links() == {"br7", "vx7", "wp1"}


def test_creating_what_exists_is_refused_and_changes_nothing(host: Host, links: tuple[Link, ...]) -> None:
    for link in links:
        with pytest.raises(KernelError) as refused:
            host.kernel.perform(Create(link))
        assert refused.value.errno == errno.EEXIST
        assert "choose another" not in str(refused.value)
    assert not host.plan(*links)


def test_vni_in_use_on_this_host_is_told_apart(host: Host) -> None:
    host.ip("link add theirs type vxlan id 7 local 192.0.2.1 dstport 4789")
    bridge, vxlan = host.network(7)
    host.kernel.perform(Create(bridge))

    with pytest.raises(KernelError, match=r"VNI 7 on UDP port 4789 is already used .* -o weft.vni=") as refused:
        host.kernel.perform(Create(vxlan))

    assert refused.value.errno == errno.EEXIST
    assert host.dp.links() == {"br7"}


def test_taken_udp_port_is_explained_and_leaves_no_half_made_device(host: Host) -> None:
    bridge, vxlan = host.network(7)
    host.kernel.perform(Create(bridge))
    with host.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", UDP_PORT))
        with pytest.raises(KernelError, match="UDP port 4789 is used by another program") as refused:
            host.kernel.perform(Create(vxlan))

    assert refused.value.errno == errno.EADDRINUSE
    assert host.dp.links() == {"br7"}


def test_port_without_its_bridge_is_refused_and_leaves_no_end(host: Host) -> None:
    before = host.links()
    with pytest.raises(KernelError, match="create port wp1: No such device; br7 is missing") as refused:
        host.kernel.perform(Create(port()))
    assert refused.value.errno == errno.ENODEV
    assert not host.dp.links()
    assert host.links() == before


def test_taken_name_of_the_other_end_is_refused(host: Host, links: tuple[Link, ...]) -> None:
    taken = replace(port("wp2"), peer="wc1")
    with pytest.raises(KernelError) as refused:
        host.kernel.perform(Create(taken))
    assert refused.value.errno == errno.EEXIST
    assert not host.plan(*links)


@pytest.mark.xfail(KERNEL < (6, 15), reason="looks for the name where the request comes from, not where the link goes")
def test_vxlan_device_named_like_a_link_of_the_host_is_made(host: Host) -> None:
    host.ip("link add vx7 type bridge")
    assert host.apply(*host.network(7))
    assert not host.plan(*host.network(7))


def test_removing_what_is_gone_is_done(host: Host) -> None:
    host.kernel.perform(Remove("wp1", "not wanted"))


def test_either_end_of_a_port_removes_both(host: Host, links: tuple[Link, ...]) -> None:
    before = host.links()
    host.kernel.perform(Create(port("wp2")))
    host.kernel.perform(Remove("wp2", "not wanted"))
    assert host.links() == before

    host.ip("link del wc1")
    assert not host.kernel.has_links(["wp1"])


def test_mtu_too_small_for_ipv6(host: Host) -> None:
    """And back; then links have IPv6 again, and still no address by which they would speak."""
    for mtu in (1000, MTU):
        wanted = (*host.network(7, mtu=mtu), port(mtu=mtu))
        host.apply(*wanted)
        assert not host.plan(*wanted)
    assert {link["inet6_addr_gen_mode"] for link in map(host.dp.link, ("br7", "vx7", "wp1"))} == {"none"}
    assert host.dp.run("ip", "-6", "-br", "addr") == ""


def test_mtu_of_the_underlay_changes(host: Host, links: tuple[Link, ...]) -> None:
    smaller = (*host.network(7, mtu=1400), port(mtu=1400))
    host.apply(*smaller)
    assert not host.plan(*smaller)
    host.apply(*links)
    assert not host.plan(*links)


def test_bridge_without_ports_keeps_its_mtu(host: Host, links: tuple[Link, ...]) -> None:
    host.apply(links[0])
    assert not host.plan(links[0])


def test_links_are_found_by_name(host: Host, links: tuple[Link, ...]) -> None:
    assert host.kernel.has_links(["br7", "vx7", "wp1"])
    assert not host.kernel.has_links(["br7", "wp2"])
    assert host.kernel.observe_links(["br7", "wp2"]).keys() == {"br7"}


@pytest.mark.kernel
def test_kernel_that_can_is_approved_without_a_trace(host: Host, links: tuple[Link, ...]) -> None:
    host.kernel.check()
    assert not host.plan(*links)


def test_any_thread_may_call(host: Host, links: tuple[Link, ...]) -> None:
    def come_and_go(number: int) -> bool:
        name = f"wp{number}"
        host.kernel.perform(Create(port(name)))
        row = Station("vx7", bytes([2, 0, 0, 0, 0, number]))
        host.put(row)
        seen = row in host.observe("vx7") and name in host.kernel.observe_links() and host.kernel.has_links([name])
        host.kernel.perform(Remove(name, "not wanted"))
        return seen and not host.kernel.has_links([name])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(come_and_go, range(100, 140)))
    assert not host.plan(*links)


def test_broken_socket_is_replaced(host: Host, links: tuple[Link, ...]) -> None:
    connection = host.kernel._links._dp
    connection._thread.run(connection._route.close)

    with pytest.raises(KernelError, match="update bridge br7: Bad file descriptor"):
        host.kernel.perform(Update(links[0], "test"))
    host.kernel.perform(Update(links[0], "test"))


def test_missing_capability_is_named(host: Host) -> None:
    script = f"""
from pathlib import Path
from weft.kernel import LinuxKernel
kernel = LinuxKernel(Path({str(host.dp.path.parent)!r}), Path({str(host.path)!r}))
kernel.open()
try:
    kernel.check()
finally:
    kernel.close()
"""
    weakened = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(weakened, capture_output=True, text=True, timeout=30, env=environment)
    assert "Operation not permitted; weft needs the capability CAP_NET_ADMIN" in done.stderr
