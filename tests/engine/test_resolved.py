"""Beside systemd-resolved, the real one, which has the host's names at 127.0.0.53, where no container can ask."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lab import CommandFailed, Host
from lab.host import RESOLVER
from lab.resolved import STUB, resolved
from tests.engine.asking import Inside
from tests.engine.conftest import Cluster, eventually

DAEMON_JSON = "etc/docker/daemon.json"
NO_WAIT = 2.0
"""Seconds. Docker waits four for a server that says nothing before it asks the next."""


@pytest.fixture
def app(cluster: Cluster) -> Iterator[Cluster]:
    """web1 on h1; h2 has an engine without `dns` yet, as a host that is to be set up."""
    cluster.network("app", subnet="10.77.0.0/24")
    cluster.run(cluster.h1, "web1", "app")
    options = dict(cluster.h2.engine_options)
    yield cluster
    cluster.h2.engine_options = options
    restart_engine(cluster.h2)


def restart_engine(host: Host) -> None:
    host.stop_engine()
    host.start_engine()


def write_dns(host: Host, servers: list[str]) -> None:
    """Into daemon.json; none: no `dns` at all."""
    others = {name: value for name, value in host.engine_options.items() if name != "dns"}
    host.engine_options = {**others, "dns": servers} if servers else others
    host.configure_engine()


def doctor_finds(host: Host, *commands: str) -> None:
    """Exactly what these repair."""
    command = (*host._weft_command(), "doctor", "--json")

    def found() -> list[str]:
        findings = json.loads(host.run(*command, env=host._weft_environment(), check=False))["findings"]
        return [one["command"] for one in findings]

    eventually(lambda: found() == list(commands), f"the doctor names {commands}", timeout=45)


def test_set_up_by_one_command_and_not_missed_when_weft_stops(app: Cluster, inside: Inside) -> None:
    host, gateway = app.h2, app.lab.plan.gateway
    with resolved(host, [gateway]):
        assert f"nameserver {STUB}" in host.run("cat", "/etc/resolv.conf")
        assert gateway in host.run("getent", "ahostsv4", "gateway.lab")  # the host itself asks it
        write_dns(host, [])
        doctor_finds(host, "weft setup dns && systemctl restart docker")
        host.ask_weft("setup", "dns")
        host.engine_options = json.loads((host.root / DAEMON_JSON).read_text())
        assert host.engine_options["dns"] == [RESOLVER, gateway]  # the server behind it, and not 127.0.0.53
        restart_engine(host)
        app.run(host, "web2", "app")
        ask = inside(host, "web2")
        assert ask("web1", until="answered").answers == [app.address(app.h1, "web1", "app")]
        assert ask("gateway.lab").answers == [gateway]
        assert ask("nowhere.lab").code == "NXDOMAIN"
        doctor_finds(host)
        host.stop_weft()
        try:
            replies = [ask("gateway.lab") for _ in range(30)]
        finally:
            host.start_weft()
        assert all(reply.answers for reply in replies)
        assert max(reply.took for reply in replies) < NO_WAIT
        assert ask("web1", until="answered").answers


def test_what_cannot_work_beside_it_is_named(app: Cluster) -> None:
    host, gateway = app.h2, app.lab.plan.gateway
    setup = ("setup", "dns", "--dry-run")
    with resolved(host, []):
        write_dns(host, [])
        with pytest.raises(CommandFailed, match=r"names no DNS server that containers could ask.*--upstream ADDRESS"):
            host.ask_weft(*setup)
        assert f'["{RESOLVER}", "{gateway}"]' in host.ask_weft(*setup, "--upstream", gateway)
    write_dns(host, [RESOLVER, STUB])
    with pytest.raises(CommandFailed, match=rf"no container can ask {STUB}.*--upstream ADDRESS"):
        host.ask_weft(*setup)
    assert f'["{RESOLVER}", "{gateway}"]' in host.ask_weft(*setup, "--upstream", gateway)
    host.stop_weft()
    with resolved(host, [gateway], more="DNSStubListenerExtra=0.0.0.0\n"):
        host.start_weft()
        eventually(lambda: "another program listens on port 53" in host.ask_weft("status"), "who has the port is said")
    eventually(lambda: "port 53" not in host.ask_weft("status"), "names are answered again", timeout=40)
