"""The data-plane namespace itself, and the threads that live in namespaces."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.netns.world import Host, Namespace, World
from weft.dataplane import Neighbour, pack_address
from weft.errors import KernelError
from weft.kernel import LinuxKernel
from weft.kernel.namespace import find_namespace
from weft.reconcile import Create

OWN = Path("/proc/self/ns/net")


def test_data_plane_survives_close_and_is_found_again(host: Host) -> None:
    bridge, vxlan = host.network(7)
    host.apply(bridge, vxlan)
    before = host.dp.path.stat().st_ino

    host.kernel.close()
    assert host.dp.links() == {"br7", "vx7"}
    host.kernel.open()

    assert host.dp.path.stat().st_ino == before
    assert not host.plan(bridge, vxlan)


def test_plain_file_left_from_before_a_reboot_is_mounted_over(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "dp").touch()

    host = world.host(run=run)

    assert host.apply(*host.network(7))
    assert host.dp.links() == {"br7", "vx7"}


def test_plain_file_and_no_file_are_no_namespaces(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_namespace(tmp_path / "nothing") is None
    assert not caplog.messages
    (tmp_path / "file").touch()
    assert find_namespace(tmp_path / "file") is None
    assert "mount --make-rshared /run" in caplog.text


def test_other_threads_stay_where_they_are(host: Host) -> None:
    before = OWN.stat().st_ino
    host.apply(*host.network(7))
    assert OWN.stat().st_ino == before
    assert "br7" not in {name for _, name in socket.if_nameindex()}


def test_bridges_are_spared_netfilter(host: Host) -> None:
    switches = list(Path("/proc/sys/net/bridge").glob("bridge-nf-call-*"))
    for switch in switches:
        host.dp.do(lambda switch=switch: switch.write_text("1"))  # type: ignore[misc]

    host.kernel.perform(Create(host.network(7)[0]))

    for switch in switches:
        assert host.dp.do(switch.read_text) == "0\n"


def test_no_namespace_of_ours_routes(host: Host) -> None:
    """As the kernel makes one on a host that does, and that is every host with Docker."""
    spaces = [host.dp, Namespace(host.dp.path.with_name("wg"))]
    for space in spaces:
        space.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    host.kernel.close()

    host.kernel.open()

    for space in spaces:
        for name in ("ipv4/ip_forward", "ipv4/conf/default/forwarding", "ipv6/conf/all/forwarding"):
            assert space.do(Path("/proc/sys/net", name).read_text) == "0\n"


def test_ipv6_neighbours_are_taken_where_ipv6_is_off_by_default(host: Host) -> None:
    default = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    host.dp.do(lambda: default.write_text("1"))

    host.kernel.perform(Create(host.network(7)[0]))

    row = Neighbour("br7", pack_address("fd00::2"), bytes(6))
    host.put(row)
    assert host.observe("br7") == {row}


def test_missing_host_namespace_is_an_error_and_leaves_nothing_open(tmp_path: Path) -> None:
    open_files = set(os.listdir("/proc/self/fd"))
    kernel = LinuxKernel(tmp_path, host=tmp_path / "nothing")
    with pytest.raises(KernelError, match="nothing: No such file"):
        kernel.open()
    assert set(os.listdir("/proc/self/fd")) == open_files


def test_without_the_namespace_of_wireguard_plain_networks_go_on(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Encrypted ones are refused, loudly; and all is well as soon as what was in the way is gone."""
    host = world.host(run=tmp_path / "run")
    run = tmp_path / "other"
    (run / "wg").mkdir(parents=True)
    kernel = LinuxKernel(run, host=host.path, wireguard=host.wireguard)
    kernel.open()
    try:
        assert "no encrypted network works on this host: mount a network namespace at" in caplog.text
        bridge, vxlan = host.network(7)
        for link in (bridge, vxlan):
            kernel.perform(Create(link))
        assert kernel.observe_links().keys() == {"br7", "vx7"}
        for needed in (kernel.intruders, kernel.ensure_tunnel, kernel.tunnel_monitor):
            with pytest.raises(KernelError, match="mount a network namespace"):
                needed()
        secret = replace(vxlan, name="vx8", vni=8, encrypted=True)
        with pytest.raises(KernelError, match="mount a network namespace"):
            kernel.perform(Create(secret))
        assert kernel.observe_tunnel() is None
        (run / "wg").rmdir()
        assert kernel.intruders() == []
        kernel.perform(Create(secret))
        assert kernel.observe_links(["vx8"])["vx8"].link == secret
    finally:
        kernel.close()
        subprocess.run(["umount", str(run / "dp"), str(run / "wg")], check=False)
