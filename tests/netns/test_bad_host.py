"""Hosts that are not as they should be: weft starts nevertheless, or says in one line what to do."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex
from subprocess import PIPE, CompletedProcess, Popen

import pytest

from tests.netns.docker_api import DockerApi
from tests.netns.plugin import Endpoint, Network, Plugin, wait_until
from weft.store import Put
from weft.store.sqlite import SCHEMA_VERSION, SqliteStore

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

READ_ONLY = "/run/read-only"


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Plugin]:
    """Not started yet, on a host with a read-only disk besides its own."""
    made = Plugin(tmp_path / "h1")
    made.host.run("mkdir", READ_ONLY)
    made.host.run("mount", "-t", "tmpfs", "-o", "ro", "none", READ_ONLY)
    try:
        yield made
    finally:
        made.close()
    if made.log.exists():
        assert "Traceback" not in made.log.read_text()


def processes(plugin: Plugin) -> list[int]:
    """The server and its worker."""
    assert plugin.process
    pid = plugin.process.pid
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def crash(plugin: Plugin, how_many: int) -> None:
    for pid in processes(plugin)[:how_many]:
        os.kill(pid, signal.SIGKILL)
    assert plugin.process
    plugin.process.wait(10)


def run_containers(plugin: Plugin, count: int = 1) -> tuple[Network, list[Endpoint]]:
    network = plugin.network()
    return network, [plugin.endpoint(network) for _ in range(count)]


# It starts nevertheless


@pytest.mark.parametrize("how_many", [1, 2], ids=["the server alone", "all of it"])
def test_after_kill_9_it_starts_over_the_socket_that_was_left(plugin: Plugin, how_many: int) -> None:
    plugin.start()
    network, (endpoint,) = run_containers(plugin)
    left = plugin.socket.stat().st_ino
    crash(plugin, how_many)
    plugin.spawn()

    def renewed() -> bool:
        try:
            return plugin.socket.stat().st_ino != left
        except FileNotFoundError:  # between the old one's removal and the new one's listening
            return False

    wait_until(renewed, "a new socket", timeout=15)
    wait_until(plugin.answers, "the answer of the new one", timeout=15)
    assert plugin.join(endpoint) in plugin.links()
    assert plugin.endpoint(network).address != endpoint.address


def test_a_missing_socket_folder_is_made_and_the_socket_is_for_root_alone(plugin: Plugin) -> None:
    plugin.host.run("rm", "-r", "/run/docker")
    plugin.start()
    assert plugin.socket.stat().st_mode & 0o777 == 0o600
    run_containers(plugin)


def test_200_calls_at_once_are_all_answered_with_different_addresses(plugin: Plugin) -> None:
    plugin.start()
    network = plugin.network()

    def run(_: int) -> Endpoint:
        endpoint = plugin.endpoint(network)
        plugin.join(endpoint)
        return endpoint

    with ThreadPoolExecutor(200) as pool:
        endpoints = list(pool.map(run, range(200)))
    assert len({endpoint.address for endpoint in endpoints}) == 200
    assert {endpoint.veth[1] for endpoint in endpoints} <= plugin.links().keys()
    assert {endpoint.veth[0] for endpoint in endpoints} <= plugin.overlay_links().keys()


def test_more_calls_than_there_are_addresses_get_a_clear_refusal(plugin: Plugin) -> None:
    plugin.start()
    network = plugin.network("10.99.0.0/28")
    body = {"PoolID": network.pool_id, "Address": "", "Options": None}
    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda _: plugin.call("IpamDriver.RequestAddress", body), range(40)))
    assert len({reply.body["Address"] for reply in replies if not reply.refusal}) == 13
    assert Counter(reply.refusal for reply in replies).most_common(1) == [
        ("pool 10.99.0.0/28 is full: 13 of 13 addresses in use; remove containers, or make a larger network", 27)
    ]


# It says what to do


def test_a_vxlan_port_that_another_program_has_is_named_and_used_once_it_is_free(plugin: Plugin) -> None:
    take = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 4789)); print(); input()"
    argv = plugin.host.enter([sys.executable, "-c", take])
    with Popen(argv, stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout
        other.stdout.readline()
        plugin.start()
        endpoint = plugin.addressed(plugin.network())
        assert "UDP port 4789 is used by another program" in plugin.refused("CreateEndpoint", **endpoint.request())
        assert not plugin.veth(endpoint)
        other.communicate("\n")
    assert plugin.ok("CreateEndpoint", **endpoint.request())
    assert plugin.join(endpoint) in plugin.links()


def test_a_full_disk_is_named_and_nothing_is_lost(plugin: Plugin) -> None:
    disk = "/run/small"
    plugin.host.run("mkdir", disk)
    plugin.host.run("mount", "-t", "tmpfs", "-o", "size=384k", "none", disk)
    plugin.settings["store"] = f"sqlite://{disk}/weft.db"
    plugin.start()
    network, (endpoint,) = run_containers(plugin)
    plugin.host.run("sh", "-c", f"cat /dev/zero > {disk}/ballast || true")
    body = {"PoolID": network.pool_id, "Address": "", "Options": None}
    refusals = {plugin.call("IpamDriver.RequestAddress", body).refusal for _ in range(250)} - {""}
    assert refusals == {
        f"store {disk}/weft.db cannot be used: database or disk is full; check the file, its folder and the disk"
    }
    assert plugin.join(endpoint) in plugin.links()
    plugin.host.run("rm", f"{disk}/ballast")
    plugin.remove(endpoint)
    plugin.remove_network(network)


def complaint(ended: CompletedProcess[str]) -> str:
    """The one line with which it gave up."""
    assert ended.returncode in (1, 3)
    assert not ended.stdout
    (line,) = ended.stderr.splitlines()
    return line


def test_a_second_one_on_the_host_gives_up_and_the_first_serves_on(plugin: Plugin) -> None:
    plugin.start()
    first, socket = processes(plugin), plugin.socket.stat().st_ino
    ended = plugin.run_to_end()
    assert ended.returncode == 1
    assert complaint(ended) == (
        f"weft serve: another weft serves this host already (process {first[0]}, driver weft): stop it first; "
        "a managed plugin by docker plugin disable -f NAME"
    )
    assert (processes(plugin), plugin.socket.stat().st_ino) == (first, socket)
    run_containers(plugin)


def test_another_driver_of_that_name_is_named_and_left_alone(plugin: Plugin) -> None:
    listen = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(); input()"
    argv = plugin.host.enter([sys.executable, "-c", listen, "/run/docker/plugins/weft.sock"])
    with Popen(argv, stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout
        other.stdout.readline()
        line = complaint(plugin.run_to_end())
        assert "another program is the driver weft of this engine and listens at /run/docker/plugins/weft.sock" in line
        assert "WEFT_SOCKET and WEFT_DRIVER" in line
        with plugin.connect():
            pass
        other.communicate("\n")
    plugin.start()
    run_containers(plugin)


def test_a_file_that_names_another_driver_is_named(plugin: Plugin) -> None:
    """It waits for weft to stop."""
    etc = "mount -t tmpfs etc /etc; mkdir -p /etc/docker/plugins; touch /etc/docker/plugins/weft.spec"
    plugin.start(["sh", "-ec", f'{etc}; exec "$@"', "sh"])
    says(plugin, "Docker takes /etc/docker/plugins/weft.spec for the driver weft whenever weft does not run")
    run_containers(plugin)


def test_a_data_plane_that_would_end_with_weft_is_refused(plugin: Plugin) -> None:
    """As in a container without :rshared, or in a unit with ProtectSystem=, whose mounts nobody else sees."""
    alone = ["unshare", "--mount", "--propagation", "slave"]
    line = complaint(plugin.run_to_end(alone))
    assert "/run/docker/weft/dp" in line
    assert all(part in line for part in ["do not reach the host", "/run/docker:rshared", "weft setup host"]), line
    assert not plugin.socket.exists()
    plugin.run_command("setup", "host")
    plugin.start(alone)
    network, (endpoint,) = run_containers(plugin)
    plugin.stop()
    assert {endpoint.veth[0], *plugin.devices(plugin.vni(network))} <= plugin.overlay_links().keys()


def says(plugin: Plugin, text: str, times: int = 1) -> None:
    """Its log comes to have that, so many times."""
    wait_until(lambda: plugin.log.read_text().count(text) == times, text)


def test_a_docker_that_does_not_answer_is_said_once_and_again_when_it_is_back(plugin: Plugin, tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    plugin.settings["docker"] = f"unix://{path}"
    plugin.start()
    run_containers(plugin)
    for times in (1, 2):
        says(plugin, "networks of other hosts and clean-up wait", times)
        api = DockerApi(path)
        says(plugin, "the Docker Engine answers again", times)
        api.close()
        path.unlink()
    assert plugin.answers()


def test_an_engine_that_is_too_old_is_named(plugin: Plugin, tmp_path: Path) -> None:
    api = DockerApi(tmp_path / "docker.sock")
    api.version = {"ApiVersion": "1.40", "Version": "19.03.15"}
    plugin.settings["docker"] = api.url
    plugin.start()
    says(plugin, "is too old for weft (API 1.40): upgrade it to 20.10 or newer")
    api.close()


def damaged(path: Path) -> None:
    """A page in the middle is overwritten."""
    store = SqliteStore(path)
    store.transact([], [Put(f"key/{number}", token_hex(500)) for number in range(100)])
    store.close()
    with path.open("r+b") as file:
        file.seek(5 * 4096)
        file.write(b"\xa5" * 4096)


def newer(path: Path) -> None:
    SqliteStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()


def text(path: Path) -> None:
    path.write_text("this is no database\n" * 500)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (damaged, ["is damaged", "restore it from a backup, or move it away"]),
        (text, ["is damaged (file is not a database)", "restore it from a backup, or move it away"]),
        (newer, [f"newer weft (schema {SCHEMA_VERSION + 1}, this one knows {SCHEMA_VERSION})", "install that version"]),
        (Path.mkdir, ["cannot be used: unable to open database file; check the file"]),
    ],
    ids=["damaged", "text", "newer", "folder"],
)
def test_a_store_that_cannot_be_used_is_left_alone(
    plugin: Plugin, spoil: Callable[[Path], None], says: list[str]
) -> None:
    spoil(plugin.store_path)
    before = plugin.store_path.read_bytes() if plugin.store_path.is_file() else b""
    line = complaint(plugin.run_to_end())
    assert all(part in line for part in [str(plugin.store_path), *says]), line
    assert (plugin.store_path.read_bytes() if plugin.store_path.is_file() else b"") == before
    check_nothing_half_made(plugin)


def test_all_settings_that_are_wrong_are_named_at_once(plugin: Plugin) -> None:
    wrong = {"port": "0", "store": "mysql://", "resync": "soon", "pools": "10.0.0.0/8", "docker": "yes", "colour": "1"}
    ended = plugin.run_to_end(**wrong)
    line = complaint(ended)
    assert ended.returncode == 1
    assert all(f"WEFT_{name.upper()}" in line for name in wrong)
    check_nothing_half_made(plugin)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("state", f"{READ_ONLY}/state", [f"{READ_ONLY}/state", "Read-only file system", "WEFT_STATE"]),
        ("state", "/etc/passwd", ["/etc/passwd", "must be a folder", "WEFT_STATE"]),
        ("store", f"sqlite://{READ_ONLY}/weft.db", [f"{READ_ONLY}/weft.db", "Read-only file system"]),
        ("run", f"{READ_ONLY}/weft", [f"{READ_ONLY}/weft", "Read-only file system", "root"]),
        ("socket", f"{READ_ONLY}/weft.sock", [READ_ONLY, "cannot be written", "root"]),
        ("socket", f"{READ_ONLY}/plugins/weft.sock", [f"{READ_ONLY}/plugins", "Read-only file system", "root"]),
        ("socket", "/etc/passwd", ["/etc/passwd", "is not a socket", "WEFT_SOCKET"]),
        ("socket", f"/run/{'x' * 107}/weft.sock", ["longer than 107 bytes", "WEFT_SOCKET"]),
        ("underlay", "192.0.2.1", ["192.0.2.1", "WEFT_UNDERLAY", "192.168.78.1 (eth0)"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_place_that_cannot_be_used_is_named(plugin: Plugin, setting: str, value: str, says: list[str]) -> None:
    line = complaint(plugin.run_to_end(**{setting: value}))
    assert all(part in line for part in says), line
    check_nothing_half_made(plugin, dp=setting == "underlay")


def check_nothing_half_made(plugin: Plugin, *, dp: bool = False) -> None:
    """Neither a socket, on which the engine would wait, nor devices; and it starts as soon as nothing is wrong."""
    assert not plugin.socket.exists()
    assert plugin.links().keys() == {"lo", "eth0", "cable"}
    assert (plugin.host.root / "run/docker/weft/dp").exists() == dp
    if plugin.store_path.exists():
        plugin.store_path.rename(plugin.store_path.with_suffix(".aside"))
    plugin.start()
    run_containers(plugin)
