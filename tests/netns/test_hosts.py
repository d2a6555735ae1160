"""Two hosts at one store: who may join it, who is forgotten, and what the `weft` command says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.docker_api import DockerApi
from tests.netns.plugin import Plugin, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

MakeHost = Callable[..., Plugin]


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[DockerApi]:
    api = DockerApi(tmp_path / "docker.sock")
    yield api
    api.close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[MakeHost]:
    """Makes host number N, not started yet; all share a store."""
    hosts: list[Plugin] = []

    def make(number: int, address: str = "", **settings: str) -> Plugin:
        address = address or f"192.168.78.{number}"
        one = Plugin(tmp_path / f"h{number}", address, tmp_path / "weft.db", **settings)
        hosts.append(one)
        return one

    yield make
    for one in hosts:
        one.close()
        if one.log.exists():
            assert "Traceback" not in one.log.read_text()


def test_without_a_setting_the_vtep_address_is_towards_the_other_hosts(made: MakeHost) -> None:
    """And not by the default route, which leads elsewhere."""
    one, other = made(1, underlay=""), made(2)
    for words in (
        "link add uplink type veth peer name wire",
        "link set wire up",
        "link set uplink up",
        "addr add 203.0.113.1/24 dev uplink",
        "route add default via 203.0.113.254",
    ):
        one.host.run("ip", *words.split())
    other.start()
    one.start()
    assert answer(one, "status")["host"]["underlay"] == "192.168.78.1"


def command(host: Plugin, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The `weft` command on that host, as a person types it."""
    argv = host.host.enter([sys.executable, "-m", "weft", *arguments])
    return subprocess.run(argv, env=host.environment(), capture_output=True, text=True, timeout=30)


def answer(host: Plugin, *arguments: str) -> Any:
    done = command(host, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def states(host: Plugin) -> dict[str, tuple[bool, int]]:
    return {one["name"]: (one["alive"], one["endpoints"]) for one in answer(host, "host", "ls")}


def test_hosts_are_listed_with_what_they_have(made: MakeHost) -> None:
    one, two = made(1).start(), made(2).start()
    one.endpoint(one.network())
    wait_until(lambda: states(two) == {"h1": (True, 1), "h2": (True, 0)}, "both hosts in the list")
    shown = command(two, "host", "ls").stdout.splitlines()
    assert shown[0].split() == ["NAME", "UNDERLAY", "STATE", "ENDPOINTS", "WEFT", "ID"]
    assert shown[1].split()[:4] == ["h1", "192.168.78.1", "alive", "1"]


def test_a_clone_is_refused_and_its_original_goes_on(made: MakeHost) -> None:
    one, clone = made(1).start(), made(2)
    clone.state.mkdir()
    (clone.state / "host-id").write_text((one.state / "host-id").read_text())
    refused = clone.run_to_end()
    assert refused.returncode == 3
    assert "is in use by host h1" in refused.stderr
    assert "delete the files host-id and wireguard.key" in refused.stderr
    assert states(one) == {"h1": (True, 0)}


@pytest.mark.parametrize(
    ("double", "words"),
    [
        ({"address": "192.168.78.1"}, "the underlay address 192.168.78.1 of this host is host h1"),
        ({"hostname": "h1"}, "the name h1 of this host is host h1"),
    ],
)
def test_a_second_host_of_one_address_or_name_is_refused(made: MakeHost, double: dict[str, str], words: str) -> None:
    one = made(1).start()
    refused = made(2, **double).run_to_end()
    assert refused.returncode == 3
    assert words in refused.stderr
    assert states(one) == {"h1": (True, 0)}


def test_a_changed_address_is_published_and_the_others_follow(made: MakeHost) -> None:
    one, two = made(1, resync="60").start(), made(2, underlay="eth0").start()
    network = one.network()
    one.endpoint(network)
    same = two.network(network.cidr)
    remote = two.endpoint(same)
    wait_until(lambda: one.vteps(one.vni(network)).get(remote.mac) == "192.168.78.2", "the way to h2")
    two.host.run("ip", "addr", "del", "192.168.78.2/24", "dev", "eth0")
    two.host.run("ip", "addr", "add", "192.168.78.22/24", "dev", "eth0")
    wait_until(lambda: one.vteps(one.vni(network)).get(remote.mac) == "192.168.78.22", "the new way to h2")
    assert "192.168.78.22" in command(one, "host", "ls").stdout
    vxlan = two.overlay_links()[f"vx{two.vni(same)}"]
    assert vxlan["linkinfo"]["info_data"]["local"] == "192.168.78.22"
    assert two.veth(remote) == set(remote.veth)  # what the container has, it keeps


def test_who_is_alive_is_forgotten_by_force_only(made: MakeHost) -> None:
    one, two = made(1).start(), made(2).start()
    network = two.network()
    endpoint = two.endpoint(network)
    refused = command(one, "host", "forget", "h2")
    assert refused.returncode == 1
    assert "h2" in refused.stderr
    assert "is alive" in refused.stderr
    two.stop()
    done = command(one, "host", "forget", "h2", "--force")
    assert done.returncode == 0, done.stderr
    assert "host h2 (192.168.78.2) is forgotten, with 1 endpoints" in done.stdout
    assert one.mentions(endpoint.id) == one.mentions(endpoint.address) == []
    unknown = command(one, "host", "forget", "h2")
    assert (unknown.returncode, "no host is called 'h2' (known: h1)" in unknown.stderr) == (1, True)


def test_a_silent_host_is_collected_after_the_grace(made: MakeHost) -> None:
    one, two = made(1, host_grace="6").start(), made(2).start()
    endpoint = two.endpoint(two.network())
    two.stop()
    # Its lease first.
    seen: list[dict[str, Any]] = []  # what the first look shows may be collected before the second on a busy machine

    def listed() -> bool:
        seen[:] = answer(one, "gc", "--dry-run")
        return bool(seen)

    wait_until(listed, "h2 in the list of what is to be collected", timeout=15)
    (due,) = seen
    assert due["what"].startswith("host h2 (")
    assert due["why"] == "it gives no sign of life"
    wait_until(lambda: "h2" not in states(one), "h2 forgotten", timeout=15)
    assert one.mentions(endpoint.id) == []


def test_what_would_be_collected_is_shown_with_why_and_when(made: MakeHost, docker: DockerApi) -> None:
    one = made(1, docker=docker.url, gc_grace="3600").start()
    network = one.network()
    kept, gone = one.endpoint(network), one.endpoint(network)
    with docker.has(network, endpoints=(kept,)):
        wait_until(lambda: len(answer(one, "gc", "--dry-run")) == 1, "one object to collect")
        (due,) = answer(one, "gc", "--dry-run")
        assert gone.id[:12] in due["what"]
        assert due["why"] == "this host's Docker does not have it"
        assert 3000 < due["seconds"] <= 3600
        shown = command(one, "gc", "--dry-run").stdout.splitlines()
        assert shown[0].split() == ["OBJECT", "WHY", "COLLECTED"]
        assert answer(one, "gc") == []  # nothing has been missing for an hour
        assert one.mentions(gone.id)


def test_without_a_daemon_the_command_says_so(made: MakeHost) -> None:
    one = made(1)
    done = command(one, "host", "ls")
    assert done.returncode == 4
    assert "no weft daemon runs on this host" in done.stderr
    done = command(one, "gc")
    assert done.returncode == 1
    assert "no weft daemon runs on this host" in done.stderr
