"""The `weft` command against real engines: each command once, and what is left of them while the daemon is stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from lab import CommandFailed, Host
from lab.host import PLUGIN_SOCKET
from lab.plan import PROJECT
from tests.engine.conftest import Cluster, eventually, reaches
from weft import __version__, cli

SUBNET = "10.88.0.0/24"
CREATE = ("network", "create", "--subnet", SUBNET, "--gateway", "10.88.0.9", "--label", "team=net", "app")


@pytest.fixture(scope="module")
def app(engines: Cluster) -> Iterator[Cluster]:
    """A network that the command made, with a container on each host."""
    made = answer(engines.h1, *CREATE)
    assert (made["name"], made["subnets"], made["members"]) == ("app", [SUBNET], ["h1", "h2"])
    engines.run(engines.h1, "web1", "app", "--ip", "10.88.0.11")
    engines.run(engines.h2, "web2", "app", "--ip", "10.88.0.12", "--network-alias", "web")
    eventually(lambda: [e["names"][:1] for e in ask(engines.h1, "endpoints")] == [["web1"], ["web2"]], "their names")
    yield engines
    engines.clean()


@pytest.fixture(scope="module")
def stopped(app: Cluster) -> Iterator[Cluster]:
    """The daemon of the first host does not run."""
    snapshot = app.h1.data / "weft/snapshot.json"
    eventually(lambda: all(name in snapshot.read_text() for name in ("web1", "web2")), "it is on disk", timeout=30)
    app.h1.stop_weft()
    yield app
    app.h1.start_weft()


def answer(host: Host, *words: str) -> Any:
    """What the command prints for scripts."""
    return json.loads(host.ask_weft(*words, "--json"))


def ask(host: Host, path: str) -> Any:
    """The same from the daemon itself, which is quicker than to start a command."""
    return cli.ask(host.root / PLUGIN_SOCKET[1:], "GET", f"/weft/{path}")


def refused(host: Host, *words: str) -> CommandFailed:
    with pytest.raises(CommandFailed) as failed:
        host.ask_weft(*words)
    return failed.value


def test_a_network_that_the_command_made_is_docker_s_own_on_all_hosts(app: Cluster) -> None:
    for host in (app.h1, app.h2):
        found = json.loads(host.docker("network", "inspect", "app"))[0]
        assert (found["Driver"], found["IPAM"]["Driver"], found["Labels"]) == ("weft", "weft", {"team": "net"})
        assert found["IPAM"]["Config"][0]["Gateway"] == "10.88.0.9"
    assert reaches(app.h1, "web1", "10.88.0.12")


def test_status_says_how_the_host_is(app: Cluster) -> None:
    eventually(lambda: ask(app.h1, "status")["names"]["answers"], "names are answered")
    status = ask(app.h1, "status")
    assert status["problems"] == []
    links, rows = status["agent"]["links"], status["agent"]["rows"]
    assert status["agent"]["synced"]
    assert (links >= 3, rows >= 4) == (True, True)  # of web1, of web2, and those of probes
    assert (status["host"]["name"], status["host"]["driver"]) == ("h1", "weft")
    assert (status["hosts"], status["alive"], status["networks"], status["endpoints"]) == (2, 2, 1, 2)
    assert status["store"]["seconds"] > 0
    assert status["engine"]["version"] == app.h1.docker("version", "--format", "{{.Server.Version}}")
    shown = app.h1.ask_weft("status")
    assert f"in sync: {links} links, {rows} rows" in shown
    assert "no problem" in shown


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("version", "version"),
        ("status", "status"),
        ("events", "events"),
        ("hosts", "host ls"),
        ("networks?name=app", "network inspect"),
        ("endpoints", "endpoint ls"),
        ("addresses", "addresses"),
    ],
)
def test_json_is_as_documented(app: Cluster, path: str, command: str) -> None:
    row = re.search(rf"^\| `weft {command}` \| (.*) \|$", (PROJECT / "docs/cli.md").read_text(), re.M)
    assert row
    found = ask(app.h1, path)
    documented = set(re.findall(r"`(\w+)`", row[1])) - {"null", "daemon"}
    assert set(names(found)) == documented


def names(value: Any) -> Iterator[str]:
    """Those of all objects in it."""
    if isinstance(value, dict):
        yield from value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from names(one)


def test_endpoints_and_addresses_have_their_holders(app: Cluster) -> None:
    web1, web2 = ask(app.h1, "endpoints")
    assert (web1["addresses"], web1["host"], web1["network"]) == (["10.88.0.11"], "h1", "app")
    assert (web2["addresses"], web2["host"], web2["names"][:2]) == (["10.88.0.12"], "h2", ["web2", "web"])
    found = answer(app.h1, "addresses", "app")
    assert found["pools"] == [{"pool": SUBNET, "network": "app", "used": 3, "free": 251}]
    holders = {a["address"]: (a["holder"].split()[0], a["holder"][-6:], a["host"]) for a in found["addresses"]}
    assert holders["10.88.0.9"][0] == "gateway"
    assert holders["10.88.0.11"] == ("endpoint", "(web1)", "h1")
    assert "web2 web" in app.h1.ask_weft("endpoint", "ls")


def test_drift_is_repaired_counted_and_told(app: Cluster) -> None:
    assert "as it should be" in app.h1.ask_weft("plan")
    before = ask(app.h1, "status")["agent"]["repaired"]
    bridge = next(name for name in app.links(app.h1) if name.startswith("br"))
    app.h1.dataplane("ip", "neighbour", "delete", "10.88.0.12", "dev", bridge)
    eventually(lambda: ask(app.h1, "status")["agent"]["repaired"] > before, "the drift is repaired, and counted")
    texts = [event["text"] for event in ask(app.h1, "events")]
    assert any("drift repaired" in text and "10.88.0.12" in text for text in texts)


def test_events_tell_what_happened_on_all_hosts(app: Cluster) -> None:
    app.run(app.h2, "brief", "app", "--ip", "10.88.0.44")
    app.h2.docker("rm", "-f", "brief")

    def told(text: str) -> bool:
        return any(event["source"] == "cluster" and text in event["text"] for event in ask(app.h1, "events"))

    eventually(lambda: told("endpoint 10.88.0.44 on h2 is there"), "it came")
    eventually(lambda: told("endpoint 10.88.0.44 on h2 is gone"), "it went")
    assert len(app.h1.ask_weft("events", "--tail", "2").splitlines()) == 2


def test_a_network_goes_from_all_hosts_and_is_refused_while_in_use(app: Cluster) -> None:
    assert "in use on this host by web1: remove" in refused(app.h1, "network", "rm", "app").stderr
    app.h1.ask_weft("network", "create", "brief")
    assert "brief" in app.networks(app.h2)
    assert "is removed" in app.h2.ask_weft("network", "rm", "brief")
    assert "brief" not in app.networks(app.h1)


def test_what_docker_refuses_is_told(app: Cluster) -> None:
    assert "already exists" in refused(app.h1, "network", "create", "app").stderr


def test_each_line_of_the_log_is_an_object_if_wanted(app: Cluster) -> None:
    app.h1.stop_weft()
    before = len(app.h1.log("weft"))
    app.h1.start_weft({"WEFT_LOG_FORMAT": "json"})
    app.h1.stop_weft()
    lines = [json.loads(line) for line in app.h1.log("weft")[before:].splitlines()]
    app.h1.start_weft()
    assert any(line["logger"] == "weft" and f"weft {__version__} serves host h1 " in line["message"] for line in lines)
    assert all(line["time"] and line["level"] for line in lines)


def test_without_the_daemon_the_snapshot_and_the_kernel_are_shown(stopped: Cluster) -> None:
    h1 = stopped.h1
    for words, shown in {
        ("status",): " rows",
        ("host", "ls"): "h2",
        ("network", "ls"): SUBNET,
        ("endpoint", "ls", "--json"): '"web2",',
        ("addresses",): "10.88.0.12",
        ("plan",): "nothing",
    }.items():
        failed = refused(h1, *words)
        assert (failed.returncode, shown in failed.stdout) == (4, True), failed
        assert "no weft daemon runs on this host" in failed.stderr
        assert "snapshot.json" in failed.stderr


def test_other_hosts_see_that_a_daemon_is_silent(stopped: Cluster) -> None:
    eventually(lambda: "h1" in " ".join(ask(stopped.h2, "status")["problems"]), "h1 is silent", timeout=30)


def test_without_the_daemon_the_plan_is_what_its_start_would_do(stopped: Cluster) -> None:
    bridge = next(name for name in stopped.links(stopped.h1) if name.startswith("br"))
    stopped.h1.dataplane("ip", "link", "set", bridge, "down")
    assert f"update bridge {bridge} (down)" in refused(stopped.h1, "plan").stdout


def test_without_the_daemon_other_commands_say_so(stopped: Cluster) -> None:
    failed = refused(stopped.h1, "network", "create", "x")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "no weft daemon runs on this host" in failed.stderr
