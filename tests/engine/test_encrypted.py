"""Encrypted networks on real engines: made once, carried by WireGuard alone, refused where that cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import CommandFailed, Host
from lab.host import PLUGIN_SOCKET
from tests.engine import pinger
from tests.engine.conftest import Cluster, eventually, reaches, refusal
from tests.engine.traffic import pings
from weft import cli

SUBNET = "10.78.0.0/24"
PLACE = "127.0.0.1:9789"
SETTINGS = {"WEFT_LISTEN": PLACE, "WEFT_WG_POOL": "10.99.0.0/16", "WEFT_KEY_ROTATION": "1", "WEFT_RESYNC": "3"}
ROTATIONS = 10
CREATE = [
    "network",
    "create",
    "-d",
    "weft",
    "--ipam-driver",
    "weft",
    "--subnet",
    "10.78.0.0/24",
    "-o",
    "encrypted",
    "secret",
]
STAGED_SECONDS = 128 * pinger.INTERVAL
"""WireGuard keeps so many packets for a peer without a session."""


@pytest.fixture
def secret(cluster: Cluster) -> tuple[str, str]:
    """Addresses of web1 on h1 and web2 on h2, on an encrypted network that h1 made."""
    cluster.network("secret", "-o", "encrypted", subnet=SUBNET)
    first, second = cluster.run(cluster.h1, "web1", "secret"), cluster.run(cluster.h2, "web2", "secret")
    eventually(lambda: reaches(cluster.h1, "web1", second), "ping across")
    return first, second


def ask(host: Host, path: str, method: str = "GET") -> Any:
    """What the `weft` command asks, without a process for it."""
    return cli.ask(host.root / PLUGIN_SOCKET[1:], method, f"/weft/{path}")


def state(host: Host, name: str) -> dict[str, Any]:
    """All that weft says of a network."""
    found: dict[str, Any] = ask(host, f"networks?name={name}")
    return found


def test_a_pool_that_overlaps_a_route_of_the_host_is_refused(cluster: Cluster) -> None:
    """The first test: once the host has an address, nothing may keep it from its encrypted networks."""
    cluster.h1.run("ip", "route", "add", "10.99.7.0/24", "dev", "docker0")
    said = refusal(cluster.h1, *CREATE)
    cluster.h1.run("ip", "route", "del", "10.99.7.0/24", "dev", "docker0")
    assert "WEFT_WG_POOL=10.99.0.0/16 overlaps the route 10.99.7.0/24 dev docker0 of this host" in said
    assert cluster.keys("topology/networks/") == []
    assert not cluster.h1.run(
        "nsenter", "--net=/run/docker/weft/wg", "ip", "-o", "link", "show", "weft-wg", check=False
    )


def test_without_wireguard_it_is_refused(cluster: Cluster) -> None:
    """Before all that need it: afterwards the device is there. A kernel that has WireGuard needs no wireguard-go."""
    program = shutil.which("wireguard-go", path="/usr/sbin:/usr/bin")
    assert program, "lab/setup.sh installs it"
    cluster.h1.run("mount", "--bind", "/dev/null", program)
    try:
        cluster.h1.docker(*CREATE)
        assert state(cluster.h1, "secret")["encrypted"] == "active (kernel)"
    except CommandFailed as refused:
        said = str(refused)
        assert "this kernel has no WireGuard (Linux 5.6 and newer do: modprobe wireguard), and wireguard-go" in said
        assert "apt install wireguard-go" in said
        assert cluster.keys("topology/networks/") == []
    finally:
        cluster.h1.run("umount", program)


def test_only_wireguard_is_on_the_wire(cluster: Cluster, secret: tuple[str, str]) -> None:
    """A plain network beside it is not encrypted, so the capture would show what is not."""
    cluster.network("app", subnet="10.79.0.0/24")
    cluster.run(cluster.h1, "plain1", "app")
    plain = cluster.run(cluster.h2, "plain2", "app")
    with cluster.h2.capture("udp and not port 53") as lines:
        assert reaches(cluster.h1, "web1", secret[1])
        assert reaches(cluster.h2, "web2", secret[0], "-s", "1362")
        eventually(lambda: reaches(cluster.h1, "plain1", plain), "ping across the plain network")
    text = "\n".join(lines)
    assert re.search(rf"{cluster.h1.address}\.51820 > {cluster.h2.address}\.51820: UDP", text)
    assert f"> {plain}: ICMP echo request" in text
    assert secret[0] not in text
    assert secret[1] not in text
    in_plain = re.findall(r"\.4789: VXLAN.* vni (\d+)", text)
    assert set(in_plain) == {str(state(cluster.h1, "app")["vni"])}


def test_the_option_is_the_same_on_all_hosts(cluster: Cluster, secret: tuple[str, str]) -> None:
    for host in (cluster.h1, cluster.h2):
        options = json.loads(host.docker("network", "inspect", "--format", "{{json .Options}}", "secret"))
        assert "encrypted" in options
        assert host.docker("exec", "web1" if host is cluster.h1 else "web2", "cat", "/sys/class/net/eth0/mtu") == "1390"
        with pytest.raises(CommandFailed, match="cannot be used like that: it is encrypted"):
            host.docker("network", "create", "-d", "weft", "--ipam-driver", "weft", "--subnet", SUBNET, "other")


def kill_and_start_weft(host: Host) -> None:
    host.kill_weft()
    host.start_weft()


@pytest.mark.parametrize("happens", [Host.restart_weft, kill_and_start_weft])
def test_no_packet_is_lost_when_weft_restarts(
    cluster: Cluster, secret: tuple[str, str], happens: Callable[[Host], None]
) -> None:
    with pings(cluster.h2, "web2", secret[0]) as count:
        happens(cluster.h1)
        cluster.run(cluster.h1, "later", "secret")
    assert count.lost == 0
    assert count.sent > 10


def test_keys_change_under_traffic(cluster: Cluster, secret: tuple[str, str]) -> None:
    """Ten times; each time until the other host has followed. Of pings, each needs both ways."""
    keys: list[str] = []
    overtaxed = 0.0
    with pings(cluster.h2, "web2", secret[0]) as count:
        for _ in range(ROTATIONS):
            began = time.monotonic()
            keys.append(ask(cluster.h1, "rotate-key", "POST")["key"])
            eventually(
                lambda: peer(cluster.h2, "h1")["handshake"] and peer(cluster.h2, "h1")["key"] == keys[-1],
                "new key",
                timeout=20,
            )
            overtaxed += max(0.0, time.monotonic() - began - STAGED_SECONDS)
    assert count.lost <= overtaxed / pinger.INTERVAL
    assert len(set(keys)) == ROTATIONS


def test_an_old_key_is_changed_by_itself(cluster: Cluster, secret: tuple[str, str]) -> None:
    """After WEFT_KEY_ROTATION: the file says since when it is in use. The old one is nowhere afterwards."""
    before = peer(cluster.h2, "h1")["key"]
    file = cluster.h1.data / "weft/wireguard.key"
    private = file.read_text()
    with pings(cluster.h2, "web2", secret[0]) as count:
        began = time.monotonic()
        made = time.time() - 86400 - 60
        os.utime(file, (made, made))

        def changed() -> bool:
            nonlocal began
            now, seen = time.monotonic(), peer(cluster.h2, "h1")
            began = now if seen["key"] == before else began
            return bool(seen["key"] != before and seen["handshake"])

        eventually(changed, "new key", timeout=30)
        overtaxed = max(0.0, time.monotonic() - began - STAGED_SECONDS)
    assert count.lost <= overtaxed / pinger.INTERVAL
    assert count.sent > 10
    assert file.read_text() != private
    key = peer(cluster.h2, "h1")["key"]
    assert f"was replaced; the new one is {key}" in cluster.h1.log("weft")
    assert json.loads(cluster.h2.ask_weft("peers", "--json"))[0]["key"] == key
    assert before not in str(cluster.entries())
    snapshots = [host.data / "weft/snapshot.json" for host in cluster.lab.hosts]
    eventually(lambda: not any(before in file.read_text() for file in snapshots), "no snapshot has the old key")
    assert [ask(host, "plan") for host in cluster.lab.hosts] == [[], []]


def test_weft_goes_on_with_a_snapshot_from_before_it_had_a_key(cluster: Cluster, secret: tuple[str, str]) -> None:
    """As after a first encrypted network, or a change of the key, of which the disk knows nothing yet."""
    before = peer(cluster.h2, "h1")
    file = cluster.h1.data / "weft/snapshot.json"
    with pings(cluster.h2, "web2", secret[0]) as count:
        cluster.h1.kill_weft()
        file.write_text(re.sub(r'\\"wg_key\\":\\"[^"]+\\",\\"wg_address\\":\\"[^"]+\\",', "", file.read_text()))
        assert "wg_address" not in file.read_text()
        cluster.h1.start_weft()
        cluster.run(cluster.h1, "later", "secret")
    now = peer(cluster.h2, "h1")
    assert (now["key"], now["address"]) == (before["key"], before["address"])
    assert count.lost == 0


def peer(host: Host, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in ask(host, "peers") if one["host"] == name)
    return found


def test_people_see_what_is_encrypted_and_how(cluster: Cluster, secret: tuple[str, str]) -> None:
    other = peer(cluster.h1, "h2")
    assert other["state"] == "peer"
    assert other["endpoint"] == f"{cluster.h2.address}:51820"
    assert other["backend"] in ("kernel", "wireguard-go")
    assert min(other["handshake"], other["received"], other["sent"]) > 0
    shown = cluster.h1.ask_weft("network", "inspect", "secret")
    assert re.search(rf"^encrypted: +active \({other['backend']}\)$", shown, re.MULTILINE)
    assert re.search(rf"^secret +\d+ +{SUBNET} +active \(", cluster.h1.ask_weft("network", "ls"), re.MULTILINE)
    assert re.search(rf"^h2 +10\.99\.\S+ +{other['endpoint']} +\d+ s ago", cluster.h1.ask_weft("peers"), re.MULTILINE)
    said = cluster.h1.ask_weft("status"), cluster.h1.log("weft")
    assert all(("a thirtieth of the throughput" in text) is (other["backend"] == "wireguard-go") for text in said)
    assert state(cluster.h1, "secret")["unencryptable"] == []
    logs = "".join(host.log("weft") for host in cluster.lab.hosts)
    secrets = [(host.data / "weft/wireguard.key").read_text() for host in cluster.lab.hosts]
    assert not any(key in logs for key in secrets)


def scrape(host: Host) -> dict[str, float]:
    """What Prometheus would read: by series, its value."""
    code = f"import urllib.request as u; print(u.urlopen('http://{PLACE}/metrics', timeout=10).read().decode())"
    lines = host.run(sys.executable, "-c", code).splitlines()
    series = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in series}


def test_prometheus_sees_what_docker_asked_and_what_was_encrypted(cluster: Cluster, secret: tuple[str, str]) -> None:
    eventually(lambda: reaches(cluster.h1, "web1", "web2"), "ping by name")
    vni = state(cluster.h1, "secret")["vni"]
    remote = f'weft_network_endpoints{{network="secret",vni="{vni}",where="remote"}}'
    eventually(lambda: scrape(cluster.h1).get(remote) == 1, "the endpoint")
    found = scrape(cluster.h1)
    assert found['weft_call_duration_seconds_count{call="NetworkDriver.Join"}'] >= 1
    assert found['weft_store_request_duration_seconds_count{request="transact"}'] >= 1
    assert found['weft_dns_questions_total{outcome="answered"}'] >= 1
    assert found[f'weft_pool_used_addresses{{network="secret",pool="{SUBNET}",vni="{vni}"}}'] == 3
    assert found["weft_wireguard_peers"] == 1
    assert found['weft_wireguard_received_bytes_total{peer="h2"}'] > 0
    assert time.time() - found['weft_wireguard_last_handshake_timestamp_seconds{peer="h2"}'] < 200
    for part in ("store", "engine", "dns", "encryption"):
        assert found[f"weft_{part}_up"] == 1


def test_prometheus_sees_the_ways_between_hosts(cluster: Cluster, secret: tuple[str, str]) -> None:
    """Of both kinds and in both directions. A busy machine may lose a probe: they are measured until it does not."""
    mtus = {"plain": 1450, "encrypted": 1390}
    sound = {f'weft_links{{kind="{kind}",state="sound"}}': 2.0 for kind in mtus}

    def is_sound() -> bool:
        ask(cluster.h1, "doctor")  # which measures; in this lab nothing else does
        return sound.items() <= scrape(cluster.h1).items()

    eventually(is_sound, "no loss", timeout=60)
    found = scrape(cluster.h1)
    for kind, mtu in mtus.items():
        for direction in ("in", "out"):
            way = f'direction="{direction}",kind="{kind}",peer="h2"'
            for probe in ("small", "full", "offloaded"):
                assert found[f'weft_link_loss_ratio{{{way},probe="{probe}"}}'] == 0
            assert found[f"weft_link_mtu_bytes{{{way}}}"] == mtu
            assert found[f"weft_link_corrupt_probes{{{way}}}"] == 0
            assert 0 < found[f"weft_link_rtt_seconds{{{way}}}"] < 60


def test_a_device_that_is_deleted_is_made_again(cluster: Cluster, secret: tuple[str, str]) -> None:
    with cluster.h2.capture("udp and port 4789") as lines:
        cluster.h1.run("nsenter", "--net=/run/docker/weft/wg", "ip", "link", "del", "weft-wg")
        eventually(lambda: reaches(cluster.h1, "web1", secret[1]), "ping across", timeout=20)
    assert not any(lines)


def test_no_key_is_in_the_log_or_in_a_support_bundle(cluster: Cluster, secret: tuple[str, str], tmp_path: Path) -> None:
    """Nor a label that looks like a password. What is needed to help is in it."""
    cluster.network("labelled", "--label", "db_password=hunter2", subnet="10.79.0.0/24")
    key = (cluster.h1.data / "weft/wireguard.key").read_text().strip()
    command = ("support-bundle", "--json", "--output", str(tmp_path / "bundle.tar.gz"))
    answer = json.loads(cluster.h1.ask_weft(*command, timeout=90))
    with tarfile.open(answer["file"]) as archive:
        opened = {member.name.partition("/")[2]: archive.extractfile(member) for member in archive.getmembers()}
        files = {name: file.read().decode() for name, file in opened.items() if file}
    packed = "\n".join(files.values())
    for text in (packed, cluster.h1.log("weft"), json.dumps(ask(cluster.h1, "events"))):
        assert key not in text
    assert "hunter2" not in packed
    assert "db_password" in files["docker/engine.json"]
    assert "vxlan" in files["kernel/dp/link.txt"]
    assert "eth0" in files["kernel/host/address.txt"]
    assert "weft-wg" in files["kernel/wg/link.txt"]
    assert secret[0] in files["daemon/endpoints.json"]
    assert json.loads(files["daemon/plan.json"]) == []
    assert not {name for name in answer["missing"] if name.startswith(("daemon/", "docker/engine"))}
