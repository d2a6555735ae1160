"""The lab itself: Docker Engines in namespaces, without weft."""

import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab import CommandFailed, Host, Lab, LabError
from lab.plan import LABS, RUNTIME, Plan
from lab.process import run, wait_until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("dockerd", path="/usr/sbin:/usr/bin"),
    reason="the lab needs root and dockerd",
)

# A closed port says "refused", unless a firewall swallows the question.
IS_REFUSED = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.settimeout(1)
    s.connect((sys.argv[1], int(sys.argv[2])))
    s.send(b"hello")
    try:
        s.recv(1)
    except ConnectionRefusedError:
        print("refused")
    except TimeoutError:
        print("swallowed")
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(hosts=2, name="test-lab", weft=False) as lab:
        yield lab


@pytest.fixture
def h1(lab: Lab) -> Host:
    return lab.hosts[0]


@pytest.fixture
def h2(lab: Lab) -> Host:
    return lab.hosts[1]


def reaches(source: Host, target: Host, size: int = 56) -> bool:
    """Whether a packet with so many bytes of payload comes back."""
    ping = ["busybox", "ping", "-c1", "-W1", "-s", str(size), target.address]
    return "1 packets received" in source.run(*ping, check=False)


def knock(source: Host, target: Host, port: int) -> str:
    return source.run(sys.executable, "-c", IS_REFUSED, target.address, str(port))


def namespaces(processes: Iterable[int | str]) -> set[str]:
    found = set()
    for process in processes:
        for kind in ("mnt", "net", "pid"):
            with suppress(OSError):  # it has ended meanwhile
                found.add(os.readlink(f"/proc/{process}/ns/{kind}"))
    return found


def holders(name: str) -> list[int]:
    records = [*(RUNTIME / name).glob("*.holder"), RUNTIME / name / "switch"]
    return [int(record.read_text().split()[0]) for record in records]


def links() -> set[str]:
    return {line.split()[0] for line in run(["ip", "-br", "link"]).splitlines()}


def leftovers(name: str) -> list[str]:
    """Files, cgroups and mounts of a lab; its namespaces are looked for by number."""
    paths = [*RUNTIME.glob(name), *Path(Plan.data_root).glob(name)]
    cgroups = Path("/sys/fs/cgroup").glob(f"**/{LABS}/{name}")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return [*map(str, paths), *map(str, cgroups), *(line for line in mounts if f"{LABS}/{name}" in line)]


def test_engines_answer_and_are_different_ones(h1: Host, h2: Host) -> None:
    identities = {host.docker("info", "--format", "{{.ID}} {{.Name}}") for host in (h1, h2)}
    assert {identity.split()[1] for identity in identities} == {"h1", "h2"}
    assert len({identity.split()[0] for identity in identities}) == 2


def test_docker_host_works_with_a_plain_client(h1: Host) -> None:
    environment = {**os.environ, "DOCKER_HOST": h1.docker_host}
    assert run(["docker", "info", "--format", "{{.Name}}"], env=environment) == "h1"


def test_hosts_reach_each_other_and_have_a_default_route(h1: Host, h2: Host) -> None:
    assert reaches(h1, h2)
    assert "dev eth0" in h1.run("ip", "route", "show", "default")


def test_outside_names_get_an_answer_at_once(h1: Host) -> None:
    assert "192.168.78.254" in h1.docker("run", "--rm", "weft-lab", "nslookup", "gateway.lab", timeout=4)
    with pytest.raises(CommandFailed, match="NXDOMAIN"):
        h1.docker("run", "--rm", "weft-lab", "nslookup", "no.such.name", timeout=4)


def test_a_container_of_the_image_runs_and_stops_at_once(h1: Host) -> None:
    h1.docker("run", "--detach", "--name", "quick", "weft-lab")
    assert "iperf 3" in h1.docker("exec", "quick", "iperf3", "--version")
    assert "127.0.0.1" in h1.docker("exec", "quick", "ping", "-c1", "localhost")
    assert "eth0" in h1.exec_in_container_netns("quick", "ip", "-br", "addr")
    h1.docker("stop", "--time", "30", "quick", timeout=5)
    h1.docker("rm", "quick")


def test_a_failed_command_tells_what_it_said(h1: Host) -> None:
    with pytest.raises(CommandFailed, match=r"h1\$ docker inspect nobody(?s:.*)No such object") as failure:
        h1.docker("inspect", "nobody")
    assert failure.value.returncode == 1


def test_cut_link_cuts_and_restore_link_restores(h1: Host, h2: Host) -> None:
    h1.cut_link()
    assert not reaches(h1, h2)
    assert "NO-CARRIER" in h1.run("ip", "link", "show", "eth0")
    h1.restore_link()
    wait_until(lambda: reaches(h1, h2), "h2 after the ARP question that got no answer", timeout=5)


def test_cut_from_loses_what_passes_between_two_and_nothing_else() -> None:
    with Lab(hosts=3, name="test-three", weft=False) as three:
        h1, h2, h3 = three.hosts
        h1.cut_from(h2)
        h1.cut_from(h2)
        assert not reaches(h1, h2)
        assert not reaches(h2, h1)
        assert reaches(h1, h3)
        assert reaches(h3, h2)
        h2.restore_to(h1)
        assert reaches(h1, h2)


def test_change_address_lasts_over_a_reboot(h1: Host, h2: Host) -> None:
    before = h2.address
    for address in ("192.168.78.99", before):
        h2.change_address(address)
        assert reaches(h1, h2)
        assert f"{address}/24" in h2.run("ip", "-o", "addr", "show", "eth0")
        assert "default via 192.168.78.254" in h2.run("ip", "route")


def test_set_mtu_changes_interface_and_path(h1: Host, h2: Host) -> None:
    for host in (h1, h2):
        host.set_mtu(1400)
    assert " mtu 1400 " in h1.run("ip", "link", "show", "eth0")
    assert reaches(h1, h2, size=1400), "hosts that know of the MTU cut the packet up"
    h2.set_mtu(1500)
    assert not reaches(h1, h2, size=1400), "the answer of one that does not know is lost"
    h1.set_mtu(1500)
    assert reaches(h1, h2, size=1400)


def test_narrow_path_loses_packets_which_the_interface_takes(h1: Host, h2: Host) -> None:
    h1.narrow_path(1400)
    assert " mtu 1500 " in h1.run("ip", "link", "show", "eth0")
    assert reaches(h1, h2, size=1300)
    assert not reaches(h1, h2, size=1400)
    h1.narrow_path(1500)
    assert reaches(h1, h2, size=1400)


def test_drop_udp_swallows_one_port_until_it_is_allowed(h1: Host, h2: Host) -> None:
    h2.drop_udp(4789)
    h2.drop_udp(4789)
    assert knock(h1, h2, 4789) == "swallowed"
    assert knock(h1, h2, 4790) == "refused"
    h2.allow_udp(4789)
    h2.allow_udp(4789)
    assert knock(h1, h2, 4789) == "refused"


def test_capture_shows_what_passed(h1: Host, h2: Host) -> None:
    with h2.capture("icmp") as lines:
        assert reaches(h1, h2)
    assert any(f"{h1.address} > {h2.address}: ICMP echo request" in line for line in lines)
    with pytest.raises(LabError, match="syntax error"), h2.capture("no such filter"):
        pass


def test_there_is_no_data_plane_without_weft(h1: Host) -> None:
    with pytest.raises(LabError, match="h1 has no data plane"):
        h1.dataplane("ip", "link")


def test_live_restore_keeps_a_container_over_a_killed_engine(h1: Host) -> None:
    h1.stop_engine()
    h1.start_engine("--live-restore")
    h1.docker("run", "--detach", "--name", "survivor", "weft-lab")
    started = h1.docker("inspect", "--format", "{{.State.Pid}}", "survivor")
    h1.kill_engine()
    with pytest.raises(CommandFailed, match="Cannot connect"):
        h1.docker("ps")
    h1.start_engine("--live-restore")
    assert h1.docker("inspect", "--format", "{{.State.Pid}}", "survivor") == started
    h1.docker("rm", "--force", "survivor")


def test_an_engine_that_cannot_start_says_why(h1: Host) -> None:
    h1.stop_engine()
    with pytest.raises(LabError, match="unknown flag: --no-such-option"):
        h1.start_engine("--no-such-option")
    h1.start_engine()


def test_a_crashed_host_boots_with_its_data(h1: Host, h2: Host) -> None:
    h1.docker("network", "create", "kept")
    h1.docker("run", "--detach", "--name", "always", "--restart", "always", "weft-lab")
    h1.run("touch", "/run/forgotten", "/etc/remembered")
    h1.crash()
    assert not h1.up
    assert not reaches(h2, h1)
    with pytest.raises(LabError, match="h1 is not up"):
        h1.run("true")
    h1.boot()
    assert reaches(h2, h1)
    assert "kept" in h1.docker("network", "ls", "--format", "{{.Name}}").split()
    running = ["inspect", "--format", "{{.State.Running}}", "always"]
    wait_until(lambda: h1.docker(*running) == "true", "the container's restart")
    assert h1.run("ls", "/run/forgotten", "/etc/remembered", check=False) == "/etc/remembered"
    h1.docker("rm", "--force", "always")


def test_down_leaves_nothing() -> None:
    links_before = links()
    lab = Lab(hosts=1, name="test-down", weft=False)
    lab.up()
    lab.hosts[0].docker("run", "--detach", "weft-lab")
    own = namespaces(holders("test-down")) - namespaces(["self"])
    assert len(own) == 6
    Lab.load("test-down").down()
    assert leftovers("test-down") == []
    assert own.isdisjoint(namespaces(entry.name for entry in Path("/proc").glob("[0-9]*")))
    assert links() == links_before


def test_up_works_after_everything_was_killed_and_with_another_subnet() -> None:
    with Lab(hosts=1, name="test-again", weft=False):
        for pid in holders("test-again"):
            os.kill(pid, signal.SIGKILL)
        assert leftovers("test-again")
        with Lab(hosts=2, name="test-again", weft=False, subnet="10.99.0.0/24", mtu=9000) as lab:
            assert lab.hosts[1].address == "10.99.0.2"
            assert reaches(lab.hosts[0], lab.hosts[1], size=8900)
    assert leftovers("test-again") == []


def test_hosts_can_have_ipv6_addresses_only() -> None:
    with Lab(hosts=2, name="test-six", weft=False, subnet="fd78::/64") as lab:
        assert reaches(lab.hosts[0], lab.hosts[1])


def test_members_of_etcd_are_machines_of_their_own() -> None:
    with Lab(hosts=1, name="test-etcd", weft=False, store="etcd") as lab:
        leader = lab.etcd.leader
        others = [member for member in lab.etcd.members if member is not leader]
        leader.cut_from(*others)
        wait_until(lambda: any(member.leads() for member in others), "another leader")
        assert not leader.serves()
        leader.restore_to(*others)
        wait_until(leader.serves, "the old leader follows")
        lab.etcd.freeze()
        assert not any(member.serves() for member in lab.etcd.members)
        lab.etcd.thaw()
        lab.etcd.kill()
        with pytest.raises(LabError, match="no member of etcd serves"):
            lab.etcd.entries()
        lab.etcd.start()
        assert lab.etcd.entries() == {}
        assert "true" in lab.hosts[0].run("busybox", "wget", "-qO-", f"http://{leader.address}:2379/health")
    assert leftovers("test-etcd") == []


def test_names_that_could_lead_elsewhere_are_refused() -> None:
    with pytest.raises(LabError, match="cannot be a lab's name"):
        Lab(name="../docker")
