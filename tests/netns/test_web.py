"""The listener of a daemon that runs: what it tells of it, and that neither good nor bad clients hold up the driver."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.netns.plugin import Plugin, get, wait_until
from tests.netns.world import Namespace
from weft import cli

PLACE = "127.0.0.1:9789"

_ATTACK = """
import socket, sys, threading, time
host, port = sys.argv[1].rsplit(":", 1)
def connect():
    return socket.create_connection((host, int(port)), timeout=2)
def ask(path):
    while True:
        try:
            with connect() as client:
                client.sendall(b"GET " + path + b" HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
                client.recv(1 << 20)
        except OSError:
            pass
def dribble():
    clients = []
    while True:
        if len(clients) < 100:
            clients.append(connect())
        for client in list(clients):
            try:
                client.send(b"G")
            except OSError:
                clients.remove(client)
        time.sleep(0.01)
for work, arguments in [(ask, (b"/metrics",)), (ask, (b"/healthz",)), (ask, (b"/" + b"x" * 9000,)), (dribble, ())] * 2:
    threading.Thread(target=work, args=arguments, daemon=True).start()
print("attacking", flush=True)
sys.stdin.read()
"""


class Web:
    """What is behind the listener of a plugin."""

    def __init__(self, plugin: Plugin, place: str = PLACE) -> None:
        self._plugin = plugin
        self._place = place
        self._namespace = Namespace(Path(f"/proc/{plugin.host.pid}/ns/net"))

    def ask(self, path: str) -> tuple[int, str]:
        return self._namespace.do(lambda: get(self._place, path))

    def listens(self) -> bool:
        return f"{self._place} " in self._plugin.host.run("ss", "-Hltn")

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Values by the sample's name and its labels' values."""
        found = text_string_to_metric_families(self.ask("/metrics")[1])
        return {(s.name, *s.labels.values()): s.value for family in found for s in family.samples}

    @contextmanager
    def attacked(self) -> Iterator[None]:
        """By clients who ask without end, and by others who never end a request."""
        argv = self._plugin.host.enter([sys.executable, "-c", _ATTACK, self._place])
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as attacker:
            assert attacker.stdout
            assert attacker.stdout.readline() == "attacking\n"
            yield
            attacker.kill()


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plugin]:
    with closing(Plugin(tmp_path_factory.mktemp("web") / "h1", listen=PLACE)) as made:
        yield made.start()


@pytest.fixture
def web(plugin: Plugin) -> Web:
    made = Web(plugin)
    wait_until(made.listens, "the listener")
    return made


def test_what_the_engine_asked_is_counted(plugin: Plugin, web: Web) -> None:
    network = plugin.network()
    plugin.join(plugin.endpoint(network))
    vni, cidr = str(plugin.vni(network)), network.cidr
    wait_until(lambda: web.metrics().get(("weft_network_endpoints", "", vni, "local")) == 1, "the endpoint")
    found = web.metrics()
    assert found["weft_call_duration_seconds_count", "NetworkDriver.Join"] == 1
    assert found["weft_store_request_duration_seconds_count", "transact"] >= 4
    assert found["weft_reconcile_steps_total", "create"] + found["weft_reconcile_steps_total", "put"] >= 0
    assert found["weft_pool_size_addresses", "", cidr, vni] == 254
    assert found["weft_pool_used_addresses", "", cidr, vni] == 2
    assert found["weft_hosts", "alive"] == 1
    assert found["weft_store_up",] == 1
    assert found["process_resident_memory_bytes",] > 1e6
    refused = "CreateEndpoint", {"NetworkID": "0" * 64, "EndpointID": "1" * 64, "Interface": {}, "Options": {}}
    plugin.refused(refused[0], **refused[1])
    failures = ("weft_call_failures_total", "NetworkDriver.CreateEndpoint", "refused")
    wait_until(lambda: web.metrics().get(failures) == 1, "the refusal")


def test_drift_that_is_repaired_is_counted(plugin: Plugin, web: Web) -> None:
    network = plugin.network()
    plugin.join(plugin.endpoint(network))
    device = f"vx{plugin.vni(network)}"
    wait_until(lambda: device in plugin.overlay_links(), "the tunnel device")
    wait_until(lambda: ("weft_network_rows", "", device[2:]) in web.metrics(), "the network in the metrics")
    before = web.metrics()["weft_drift_repaired_total",]
    plugin.host.run("nsenter", "--net=/run/docker/weft/dp", "ip", "link", "del", device)
    wait_until(lambda: web.metrics()["weft_drift_repaired_total",] > before, "the repair")


def test_it_is_well(web: Web) -> None:
    wait_until(lambda: web.ask("/readyz")[0] == 200, "readiness")
    status, body = web.ask("/healthz")
    assert status == 200
    assert json.loads(body) == {"status": "ok", "stuck": [], "hindered": []}


def test_attackers_do_not_hold_up_the_driver(plugin: Plugin, web: Web) -> None:
    """The figures are shown by -s: how long the engine waits for its calls, at rest and under attack."""
    network = plugin.network()

    def times() -> list[float]:
        found = []
        for _ in range(10):
            began = monotonic()
            plugin.remove(plugin.endpoint(network))
            found.append(monotonic() - began)
        return sorted(found)

    at_rest = times()
    with web.attacked():
        attacked = times()
        assert web.ask("/healthz")[0] == 200
    for what, found in (("at rest", at_rest), ("attacked", attacked)):
        print(f"a container's calls, {what}: median {found[5] * 1000:.0f} ms, most {found[-1] * 1000:.0f} ms")
    assert "Traceback" not in plugin.log.read_text()
    threads = len(list(Path(f"/proc/{worker(plugin)}/task").iterdir()))
    assert threads < 64


def worker(plugin: Plugin) -> int:
    """Process id of gunicorn's worker."""
    assert plugin.process
    pids = subprocess.run(["pgrep", "-f", "-P", str(plugin.process.pid), "weft"], capture_output=True, text=True)
    children = [int(pid) for pid in pids.stdout.split()]
    return children[0] if children else plugin.process.pid


def test_without_the_setting_nobody_listens(tmp_path: Path) -> None:
    with closing(Plugin(tmp_path / "h1")) as plugin:
        plugin.start()
        assert not plugin.host.run("ss", "-Hltn").strip()


def test_a_port_that_is_taken_is_said_and_had_when_it_is_free(tmp_path: Path) -> None:
    """The driver works meanwhile; an address that others reach is warned of."""
    place = "192.168.78.1:9789"
    with closing(Plugin(tmp_path / "h1", listen=place)) as plugin:
        code = "import socket, sys; s = socket.create_server(('', 9789)); print('ready', flush=True); sys.stdin.read()"
        argv = plugin.host.enter([sys.executable, "-c", code])
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout
            assert other.stdout.readline() == "ready\n"
            plugin.start()
            plugin.network()
            wait_until(
                lambda: f"cannot listen on {place} (WEFT_LISTEN): Address" in plugin.log.read_text(), "the error"
            )
            problem = f"cannot listen on {place} (WEFT_LISTEN): Address already in use"
            assert f"health and metrics: {problem}" in cli.ask(plugin.socket, "GET", "/weft/status")["problems"]
            found = cli.ask(plugin.socket, "GET", "/weft/doctor")["findings"]
            warnings = [one for one in found if one["evidence"] == problem]
            assert [(one["check"], one["severity"]) for one in warnings] == [("host", "warning")]
            other.kill()
        assert "can read, without a password, health, metrics, and the page" in plugin.log.read_text()
        wait_until(Web(plugin, place).listens, "the listener", 20)


def test_a_bad_address_is_refused_at_the_start(tmp_path: Path) -> None:
    with closing(Plugin(tmp_path / "h1")) as plugin:
        refused = plugin.run_to_end(listen="localhost")
        assert refused.returncode == 1
        assert "WEFT_LISTEN='localhost': must be ADDRESS:PORT, such as 127.0.0.1:9789" in refused.stderr
