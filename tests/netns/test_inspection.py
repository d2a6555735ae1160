"""What the doctor looks at on a host, each fault made for real."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.netns.world import Host, World, wait_for
from weft.config import from_environment
from weft.doctor.checkup import Checkup, Place
from weft.doctor.facts import Facts
from weft.doctor.findings import Finding
from weft.doctor.local import of_host
from weft.kernel import Inspection

PEER = "192.0.2.2"


@pytest.fixture
def host(world: World) -> Host:
    made = world.host("192.0.2.1/24")
    made.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    return made


@pytest.fixture
def inspection(host: Host) -> Iterator[Inspection]:
    with closing(Inspection(host.dp.path.parent, host.path)) as made:
        yield made


def look(inspection: Inspection, underlay: str = "192.0.2.1") -> Facts:
    settings = from_environment({"WEFT_DNS": "off", "WEFT_HOSTNAME": "h1"})
    return Checkup(settings, inspection, lambda: Place(underlay, [PEER], True), []).look()


def findings(facts: Facts) -> list[Finding]:
    return list(of_host(facts))


def test_a_host_without_fault(host: Host, inspection: Inspection) -> None:
    facts = look(inspection)
    assert findings(facts) == []
    assert facts.drops == ()
    assert (facts.device, facts.mtu, facts.towards) == ("eth0", 1500, "192.0.2.1")


NFT = """
table inet f {
  chain input { type filter hook input priority 0; policy accept; ct state established,related accept; jump more; };
  chain more { RULE; };
}
"""


@pytest.mark.parametrize(
    "rule", ["udp dport { 53, 4000-5000 } drop", "ip saddr 192.0.2.0/24 udp dport 4789 reject", "meta l4proto udp drop"]
)
def test_a_rule_of_nft(host: Host, inspection: Inspection, rule: str) -> None:
    host.run("nft", " ".join(NFT.replace("RULE", rule).split()))
    (drop,) = [one for one in look(inspection).drops if one.port == 4789]
    assert not drop.outgoing
    assert drop.drop.where == "nft table inet f, chain input"
    host.run("sh", "-c", drop.drop.repair)
    assert [one for one in look(inspection).drops if one.port == 4789] == []


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize(("chain", "outgoing"), [("INPUT", False), ("OUTPUT", True)])
def test_a_rule_of_iptables(host: Host, inspection: Inspection, program: str, chain: str, outgoing: bool) -> None:
    if subprocess.run(["nsenter", f"--net={host.path}", program, "-S"], capture_output=True).returncode:
        pytest.skip(f"this kernel has no {program}")
    host.run(program, "-A", chain, "-p", "udp", "-m", "multiport", "--dports", "4789,8472", "-j", "DROP")
    (drop,) = look(inspection).drops
    assert (drop.port, drop.outgoing) == (4789, outgoing)
    host.run("sh", "-c", drop.drop.repair)
    assert look(inspection).drops == ()


def test_a_port_that_another_program_has(host: Host, inspection: Inspection) -> None:
    program = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 4789)); print(); input()"
    argv = ["nsenter", f"--net={host.path}", sys.executable, "-uc", program]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        (one,) = findings(look(inspection))
        process.communicate(b"\n", timeout=10)
    assert (one.check, one.severity) == ("udp-port", "error")
    assert f"(pid {process.pid})" in one.cause
    assert findings(look(inspection)) == []


def test_the_kernels_own_socket_is_no_program(host: Host, inspection: Inspection) -> None:
    host.ip("link add vx7 type vxlan id 7 dstport 4789 local 192.0.2.1")
    host.ip("link set vx7 up")
    assert findings(look(inspection)) == []


def test_a_vtep_address_that_is_nowhere(inspection: Inspection) -> None:
    (one,) = findings(look(inspection, "192.0.2.77"))
    assert (one.check, one.severity) == ("vtep", "error")


def test_switches(host: Host, inspection: Inspection) -> None:
    host.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    (one,) = findings(look(inspection))
    assert (one.check, one.command) == ("kernel", "sysctl -w net.ipv4.ip_forward=1")
    host.run("sh", "-c", one.command)
    assert findings(look(inspection)) == []


def test_a_data_plane_that_routes(host: Host, inspection: Inspection) -> None:
    """Then containers of one internal network could reach another."""
    host.dp.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    (one,) = findings(look(inspection))
    assert (one.check, one.severity) == ("kernel", "error")
    assert "net.ipv4.ip_forward must be 0" in one.cause
    host.run("sh", "-c", one.command)
    assert findings(look(inspection)) == []


def test_a_run_folder_that_is_not_shared(host: Host) -> None:
    """As in a container without rshared: in mount and PID namespaces of its own."""
    program = (
        "from pathlib import Path; from contextlib import closing; from weft.kernel import Inspection\n"
        f"with closing(Inspection(Path({str(host.dp.path.parent)!r}))) as i: print(i.mounts())"
    )
    argv = [
        "unshare",
        "--mount",
        "--propagation=private",
        "--pid",
        "--fork",
        "--kill-child",
        sys.executable,
        "-c",
        program,
    ]
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=30, env={"PYTHONPATH": ":".join(sys.path)})
    assert "do not reach the host: it is not shared" in shown.stdout, shown.stderr


def test_a_data_plane_whose_mount_is_gone(host: Host, tmp_path: Path) -> None:
    (tmp_path / "dp").touch()  # as it is after a reboot, or umount
    with closing(Inspection(tmp_path, host.path)) as inspection:
        (one,) = findings(look(inspection))
    assert (one.check, one.severity) == ("mounts", "error")
    assert "is no namespace" in one.evidence


def test_pings(world: World) -> None:
    host, other = world.hosts("192.0.2.1/24", "192.0.2.2/24")
    answers = ["192.0.2.2", "192.0.2.9"]
    with closing(Inspection(host.dp.path.parent, host.path)) as inspection:
        assert wait_for(lambda: inspection.reached(answers, "192.0.2.1")["192.0.2.2"])
        other.run("nft", "table ip f { chain i { type filter hook input priority 0; icmp type echo-request drop; }; }")
        assert inspection.reached(answers, "192.0.2.1") == {"192.0.2.2": False, "192.0.2.9": False}
