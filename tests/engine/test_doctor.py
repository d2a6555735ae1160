"""`weft doctor` names the right cause of faults that are made for real: three hosts over three members of etcd.

An examination takes seconds, so each one has several faults that do not touch each other; nothing but these is named.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import CommandFailed, Host, Lab
from lab.host import RESOLVER
from lab.plan import PROJECT
from tests.engine.clinic import Clinic
from tests.engine.conftest import eventually

pytestmark = pytest.mark.skipif(not shutil.which("etcd"), reason="etcd is not installed: run lab/setup.sh")

VXLAN = 4789
WIREGUARD = 51820


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest) -> Iterator[Clinic]:
    settings = {"WEFT_GC_GRACE": "300", "WEFT_RESYNC": "600", "WEFT_ALLOW_PLAIN_STORE": "on"}
    with Lab(hosts=3, name="doctor", store="etcd", settings=settings) as lab:
        clinic = Clinic(lab)
        eventually(lambda: clinic.alive() == {"h1", "h2", "h3"}, "all hosts are alive", timeout=20)
        yield clinic
        if request.session.testsfailed:
            for host in lab.hosts:
                print(f"--- weft on {host.name}\n{host.log('weft')[-4000:]}")


@pytest.fixture
def clinic(lab: Clinic) -> Iterator[Clinic]:
    yield lab
    lab.lab.mend()
    eventually(lambda: lab.alive() == {"h1", "h2", "h3"}, "all hosts are alive", timeout=30)


@contextmanager
def filtered(host: Host, *rules: str) -> Iterator[None]:
    """Rules of nft in chains `in` and `out`, for a while."""
    chains = "".join(
        f"chain {name} {{ type filter hook {hook} priority -200; }}; "
        for name, hook in (("in", "input"), ("out", "output"))
    )
    host.run("nft", f"table inet doctor {{ {chains} }}; " + "; ".join(f"add rule inet doctor {rule}" for rule in rules))
    try:
        yield
    finally:
        host.run("nft", "delete table inet doctor")


def take_port(host: Host, port: int) -> str:
    return start(host, f"import socket, time; s = socket.socket(type=2); s.bind(('', {port})); time.sleep(600)")


def start(host: Host, program: str, *arguments: str) -> str:
    """Have Python run it on a host; its process id there."""
    command = 'setsid "$0" -c "$@" < /dev/null > /dev/null 2>&1 & echo $!'
    return host.run("sh", "-c", command, sys.executable, program, *arguments)


def test_a_healthy_cluster_has_no_fault(clinic: Clinic) -> None:
    clinic.finds(set(), on=clinic.h2)  # its engines may have just begun to answer
    code, shown = clinic.doctor(clinic.h2)
    assert code == 0, shown
    assert shown.splitlines()[-1] == "no fault: 3 hosts, 17 checks"
    assert clinic.examine(clinic.h2, "--peer", "h3").answer["hosts"][0]["host"] == "h3"
    code, _ = clinic.doctor(clinic.h2, "--peer", "h9")
    assert code == 2


def test_entries_of_the_store_that_are_none_of_wefts(clinic: Clinic) -> None:
    """Someone else's, a broken one, and one of a network that there is not."""
    keys = ("elsewhere/x", "ipam/addresses/10.9.0.0/29/10.9.0.3", "topology/networks/9", "names/gone")
    for key in keys:
        clinic.etcd.put(key, "{" if "9" in key else "8")
    found = clinic.finds({("store", "warning", ())})
    assert [one["command"] for one in found.answer["findings"]] == [f"weft gc --entry {key}" for key in sorted(keys)]
    status = clinic.h1.ask_weft("status")
    assert all(f"the store's entry {key} " in status for key in keys)
    assert "topology/networks/9" in clinic.h2.ask_weft("status"), "its mirror has met it"
    with pytest.raises(CommandFailed, match="the store's entry schema is one that weft needs"):
        clinic.h1.ask_weft("gc", "--entry", "schema")
    for key in keys:
        clinic.h1.ask_weft("gc", "--entry", key)
    assert not clinic.etcd.entries().keys() & set(keys)
    clinic.finds(set())
    assert all("no problem" in host.ask_weft("status") for host in (clinic.h1, clinic.h2))


def test_faults_inside_of_hosts(clinic: Clinic) -> None:
    h1, h2, h3 = clinic.h1, clinic.h2, clinic.h3
    clinic.network("tiny", subnet="10.9.0.0/29")
    web3 = clinic.run(h3, "web3", "tiny")
    (vni,) = (key.rpartition("/")[2] for key in clinic.keys("topology/networks/"))
    free = [number for number in range(2, 7) if f"10.9.0.{number}" != web3]
    for number in free:  # endpoints of h2 that its Docker does not have; with web3's the pool has no more
        identity, address = f"{number}" * 64, f"10.9.0.{number}"
        endpoint = {
            "id": identity, "vni": int(vni), "mac": f"02:42:0a:09:00:0{number}",
            "addresses": [address], "host": clinic.ids[h2],
        }  # fmt: skip
        clinic.etcd.put(f"topology/endpoints/{vni}/{identity}", json.dumps(endpoint))
    h2.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    daemon_json = {name: value for name, value in h1.engine_options.items() if name != "dns"}
    h1.write("etc/docker/daemon.json", json.dumps(daemon_json))
    h1.kill_engine()
    clinic.etcd.members[2].kill()
    try:
        with filtered(h3, f"in ip daddr {RESOLVER} udp dport 53 drop"):
            found = clinic.finds(
                {
                    ("kernel", "error", ("h2",)),
                    ("names", "error", ("h3",)),
                    ("docker", "error", ("h1",)),
                    ("names", "warning", ("h1",)),
                    ("docker", "warning", ("h2",)),
                    ("store", "warning", ("h1", "h2", "h3")),
                    ("pools", "warning", ()),
                }
            )
        assert found.of("kernel", "h2")["command"] == "sysctl -w net.ipv4.ip_forward=1"
        assert found.of("names", "h3")["command"].startswith("iptables -I INPUT -i docker_gwbridge")
        assert "weft setup dns" in found.of("names", "h1")["command"]
        assert clinic.etcd.members[2].address in found.of("store", "h1", "h2", "h3")["evidence"]
        assert found.of("pools")["evidence"].startswith("5 of 5 addresses are held")
    finally:
        h2.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        for number in free:
            clinic.etcd.delete(f"topology/endpoints/{vni}/{str(number) * 64}")
        clinic.lab.mend()
        clinic.clean()


def test_filters_of_hosts_and_on_the_way(clinic: Clinic) -> None:
    h1, h2, h3 = clinic.h1, clinic.h2, clinic.h3
    h2.block_udp(VXLAN, h3)
    with filtered(h1, f"in udp dport {VXLAN} drop"):
        found = clinic.finds(
            {("udp-port", "error", ("h1",)), ("path", "error", ("h2", "h3"))}, "from h2 to h3, in this direction only"
        )
    assert found.of("udp-port", "h1")["command"] == f"nft insert rule inet doctor in udp dport {VXLAN} accept"

    clinic.lab.mend()
    h2.cut_from(h3)
    h1.run("iptables", "-I", "OUTPUT", "-p", "udp", "--dport", str(VXLAN), "-j", "DROP")
    try:
        found = clinic.finds({("udp-port", "error", ("h1",)), ("path", "error", ("h2", "h3"))})
    finally:
        h1.run("iptables", "-D", "OUTPUT", "-p", "udp", "--dport", str(VXLAN), "-j", "DROP")
    assert "which it sends" in found.of("udp-port", "h1")["cause"]
    assert "do not reach each other" in found.of("path", "h2", "h3")["cause"]

    clinic.lab.mend()
    h1.block_udp(VXLAN, h2)
    h2.block_udp(VXLAN, h1)
    h3.narrow_path(1400)
    try:
        found = clinic.finds(
            {("path", "error", ("h1", "h2")), ("mtu", "error", ("h3",))}, "dropped on the way between h1 and h2"
        )
    finally:
        h3.narrow_path(1500)
    assert found.of("path", "h1", "h2")["cause"].endswith("dropped on the way between h1 and h2")
    # A bridge grants a VLAN tag's four bytes more, and on a busy machine a probe may be missed.
    assert re.search(r"; 140[0-4] bytes fit", found.of("mtu", "h3")["evidence"])


def test_a_host_that_is_off_and_one_of_another_time_version_and_address(clinic: Clinic) -> None:
    h2, h3 = clinic.h2, clinic.h3
    old = h3.data / "old"
    old.mkdir()
    (old / "sitecustomize.py").write_text("import weft; weft.__version__ = '0.0.9'")
    h2.cut_link()
    h3.stop_weft()
    h3.clock_offset = 3600
    h3.start_weft({"PYTHONPATH": f"{PROJECT}/lab/clock:{PROJECT}/plugin"})
    try:
        found = clinic.finds({("host", "error", ("h2",)), ("clock", "warning", ("h1", "h3"))}, "h2 is off, or cut off")
        assert re.search(r"differ by 3[56]\d\d s", found.of("clock", "h1", "h3")["cause"])  # as long as asking took
        h2.restore_link()
        h3.stop_weft()
        h3.clock_offset = 0
        h3.run("ip", "addr", "add", "10.99.0.3/32", "dev", "lo")
        h3.start_weft({"PYTHONPATH": f"{old}:{PROJECT}/plugin", "WEFT_UNDERLAY": "10.99.0.3"})
        found = clinic.finds({("version", "warning", ("h3",)), ("vtep", "error", ("h3",))})
        assert f"WEFT_UNDERLAY={h3.address}" in found.of("vtep", "h3")["evidence"]
        h3.run("ip", "addr", "del", "10.99.0.3/32", "dev", "lo")
        clinic.finds({("version", "warning", ("h3",)), ("vtep", "error", ("h3",))}, "on none of the host's interfaces")
    finally:
        h3.clock_offset = 0
        h3.restart_weft()
        h3.run("ip", "addr", "del", "10.99.0.3/32", "dev", "lo", check=False)


def test_without_the_daemon(clinic: Clinic) -> None:
    h1, h2 = clinic.h1, clinic.h2
    h2.stop_weft()
    try:
        clinic.finds({("host", "error", ("h2",))}, "h2 is up, but weft there does not run")
        h2.run("ip", "addr", "add", f"{h1.address}/32", "dev", "lo")
        h2.settings["WEFT_UNDERLAY"] = h1.address  # with which it would not start
        found = clinic.finds({("host", "error", ("h2",)), ("vtep", "error", ("h2",))}, on=h2)
        assert f"another host has the VTEP address {h1.address}" in found.of("vtep", "h2")["cause"]
        private = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        shown = h2.run(*private, *h2._weft_command(), "doctor", env=h2._weft_environment(), check=False)
        assert "FAULT host on h2: weft does not run" in shown
        assert "FAULT mounts on h2" in shown
    finally:
        h2.settings["WEFT_UNDERLAY"] = "eth0"
        h2.run("ip", "addr", "del", f"{h1.address}/32", "dev", "lo", check=False)
        h2.start_weft()


def test_ports_that_other_programs_took_at_boot(clinic: Clinic) -> None:
    h3 = clinic.h3
    h3.crash()
    h3.boot_alone()
    take_port(h3, VXLAN)
    take_port(h3, 53)
    h3.start_weft()
    try:
        found = clinic.finds(
            {("udp-port", "error", ("h3",)), ("docker", "error", ("h3",)), ("names", "error", ("h3",))}
        )
        assert f"UDP port {VXLAN}, which VXLAN needs, is used by python" in found.of("udp-port", "h3")["cause"]
        assert found.of("names", "h3")["cause"] == "names of other hosts' containers are not answered"
        assert f"{RESOLVER} port 53: Address already in use" in found.of("names", "h3")["evidence"]
    finally:
        h3.crash()
        h3.boot()


def test_ports_that_networks_have_of_their_own(clinic: Clinic) -> None:
    """A packet filter counts where a container needs the port, another program wherever one may come to need it."""
    h1, h2, h3 = clinic.h1, clinic.h2, clinic.h3
    for number, port in enumerate((4790, 4791)):
        clinic.network(f"own{number}", "-o", f"weft.port={port}", subnet=f"10.7.{number}.0/24")
    for host in (h1, h2):
        clinic.run(host, f"own-{host.name}", "own0")
    program = take_port(h3, 4791)
    try:
        with filtered(h2, "in udp dport 4790 drop"), filtered(h3, "in udp dport 4790 drop"):
            h1.block_udp(VXLAN, h2)
            found = clinic.finds(
                {("udp-port", "error", ("h2",)), ("udp-port", "error", ("h3",)), ("path", "error", ("h1", "h2"))}
            )
        assert found.of("udp-port", "h2")["cause"] == (
            "a packet filter of h2 drops UDP port 4790 of network own0, incoming"
        )
        assert "UDP port 4791, which network own1 needs, is used by python" in found.of("udp-port", "h3")["cause"]
        with pytest.raises(CommandFailed, match="UDP port 4791 is used by another program"):
            clinic.run(h3, "own-h3", "own1")
    finally:
        h3.run("kill", program)
        clinic.lab.mend()
        clinic.clean()


def test_a_slow_store_and_a_kernel_that_weft_cannot_mend(clinic: Clinic) -> None:
    """h2 reaches etcd by a slow way; on h3 another program made a tunnel of a network's VNI when weft had none."""
    h1, h2, h3 = clinic.h1, clinic.h2, clinic.h3
    clinic.network("rival", "-o", "weft.vni=777", subnet="10.6.0.0/24")
    for host in (h1, h3):
        clinic.run(host, f"rival-{host.name}", "rival")
    h2.stop_weft()
    slow = start(h2, _SLOWLY, clinic.etcd.leader.address)
    h2.start_weft({"WEFT_STORE": "etcd://127.0.0.1:2399"})
    h3.run("sh", "-c", _RIVAL, "777", str(VXLAN))
    try:
        found = clinic.finds({("store", "warning", ("h2",)), ("drift", "error", ("h3",))}, "the store is slow", on=h2)
        assert re.search(r"one reading took 0\.[67] s", found.of("store", "h2")["evidence"])
        assert "left to do: create vxlan" in found.of("drift", "h3")["evidence"].lower()
        assert "VNI 777 on UDP port 4789 is already used by another VXLAN" in found.of("drift", "h3")["evidence"]
        h3.run("ip", "link", "del", "rival")
        clinic.finds({("store", "warning", ("h2",))}, on=h2)
    finally:
        h3.run("ip", "link", "del", "rival", check=False)
        h2.restart_weft()
        h2.run("kill", slow)
        clinic.clean()


_SLOWLY = """
import asyncio, sys

async def pump(reader, writer, seconds):
    while data := await reader.read(65536):
        asyncio.get_running_loop().call_later(seconds, writer.write, data)
    asyncio.get_running_loop().call_later(seconds, writer.close)

async def serve(reader, writer):
    there, back = await asyncio.open_connection(sys.argv[1], 2379)
    await asyncio.gather(pump(reader, back, 0), pump(there, writer, 0.6), return_exceptions=True)

async def main():
    await (await asyncio.start_server(serve, "127.0.0.1", 2399)).serve_forever()

asyncio.run(main())
"""
_RIVAL = """
until ip link add rival type vxlan id "$0" dstport "$1"; do
    nsenter --net=/run/docker/weft/dp ip link del "vx$0"
done
"""


def test_a_card_that_spoils_checksums(clinic: Clinic) -> None:
    """Those that a container's kernel leaves to it."""
    h1, h3 = clinic.h1, clinic.h3
    h3.run(sys.executable, "-c", _OFFLOAD_CHECKSUMS, "0")
    rules = (f"in ip saddr {h3.address} udp dport {VXLAN} {one} set 0xdead" for one in _INNER_CHECKSUMS)
    try:
        with filtered(h1, *rules):
            found = clinic.finds({("checksum", "error", ("h3", "h1"))})
        assert "checksum the card makes are lost, others pass" in found.of("checksum", "h3", "h1")["evidence"]
        assert found.of("checksum", "h3", "h1")["command"].startswith("ethtool -K eth0 ")
    finally:
        h3.run(sys.executable, "-c", _OFFLOAD_CHECKSUMS, "1")
    clinic.finds(set())


def test_encrypted_networks(clinic: Clinic) -> None:
    h1, h2, h3 = clinic.h1, clinic.h2, clinic.h3
    clinic.network("secret", "-o", "encrypted", subnet="10.8.0.0/24")
    for host in clinic.lab.hosts:
        clinic.run(host, f"s-{host.name}", "secret")
    try:
        h1.block_udp(WIREGUARD, h2)
        h2.block_udp(WIREGUARD, h1)
        h3.run("nsenter", "--net=/run/docker/weft/wg", "ip", "link", "add", "way-out", "type", "bridge")
        found = clinic.finds({("guard", "error", ("h3",)), ("wireguard", "error", ("h1", "h2"))})
        assert found.of("guard", "h3")["command"] == "nsenter --net=/run/docker/weft/wg ip link delete way-out"
        assert f"UDP port {WIREGUARD} is dropped on the way" in found.of("wireguard", "h1", "h2")["cause"]
        h3.run("sh", "-c", found.of("guard", "h3")["command"])
        clinic.lab.mend()
        change_device(h3, f"public_key={hex_key(clinic, h1)}\nremove=true")
        found = clinic.finds({("wireguard", "error", ("h3", "h1"))})
        cause = "h3 does not have h1's published WireGuard key among its peers"
        assert found.of("wireguard", "h3", "h1")["cause"] == cause
        h3.restart_weft()
        change_device(h2, f"private_key={'40' * 32}")
        found = clinic.finds({("wireguard", "error", ("h2",))})
        assert "another than the one it has published" in found.of("wireguard", "h2")["cause"]
        h2.restart_weft()
        clinic.finds(set())
    finally:
        clinic.lab.mend()
        clinic.clean()


def change_device(host: Host, setting: str) -> None:
    """Past weft, over wireguard-go's socket."""
    host.run(sys.executable, "-c", _CHANGE, setting)


def hex_key(clinic: Clinic, host: Host) -> str:
    """The public key that a host has published, as wireguard-go writes it."""
    record = json.loads(clinic.etcd.entries("topology/hosts/")[f"topology/hosts/{clinic.ids[host]}"])
    return b64decode(record["wg_key"]).hex()


_OFFLOAD_CHECKSUMS = """
import array, fcntl, socket, struct, sys
value = array.array("B", struct.pack("II", 0x17, int(sys.argv[1])))  # ETHTOOL_STXCSUM
fcntl.ioctl(socket.socket(type=2), 0x8946, struct.pack("16sP", b"eth0", value.buffer_info()[0]))
"""
"""As `ethtool -K eth0 tx` does. A veth that does would carry them unfinished, and none could be wrong."""
_INNER_CHECKSUMS = ("@th,312,8 6 @th,528,16", "@th,312,8 17 @th,448,16")
"""Of TCP and of UDP, in VXLAN."""
_CHANGE = """
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect("/var/run/wireguard/weft-wg.sock")
s.sendall(f"set=1\\n{sys.argv[1]}\\n\\n".encode())
assert b"errno=0" in s.recv(100)
"""


def test_the_store(clinic: Clinic) -> None:
    clinic.finds(set())  # what hosts have measured of each other stays as it is when the store does
    for member in clinic.etcd.members[:2]:
        member.kill()
    found = clinic.finds({("store", "error", ("h1",))})
    assert "no quorum" in found.of("store", "h1")["cause"]
    clinic.etcd.members[2].kill()
    clinic.finds({("store", "error", ("h1",))}, "the store cannot be reached")
