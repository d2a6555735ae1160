"""The managed plugin, as users get it: from a registry, upgraded, killed, removed; and what that costs: nothing."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import CommandFailed, Host, Lab
from lab.host import RESOLVER
from lab.plan import PROJECT
from tests.engine.asking import Inside
from tests.engine.conftest import Cluster, eventually, reaches
from tests.engine.managed import Builder, Built, processes, settings, weft
from tests.engine.traffic import pings
from weft import __version__
from weft.cli import WITHOUT_DAEMON
from weft.config import SETTINGS, variable

SUBNET = "10.77.0.0/24"
CREATE = ("network", "create", "-d", "weft:latest", "--ipam-driver", "weft:latest", "--subnet", SUBNET, "app")
SERVERS = [RESOLVER, "192.168.78.254"]
NEWER = "99.0.0"
MEGABYTES = 150
WEFT = str(PROJECT / ".venv/bin/weft")
DOCTOR = (WEFT, "doctor", "--json")


class Plugins:
    """A registry on h1 with two versions of the plugin, and the words to install them."""

    def __init__(self, lab: Lab, built: Built, scratch: Path) -> None:
        self._lab = lab
        self._host = lab.hosts[0]
        self._place = self._host.start_registry()
        self.publish(__version__, built.folder)
        newer = scratch / "newer"
        shutil.copytree(built.folder, newer, symlinks=True)
        package = next(newer.glob("rootfs/opt/weft/lib/*/site-packages/weft"))
        for compiled in package.glob("__pycache__/__init__.*"):
            compiled.unlink()
        (package / "__init__.py").write_text(f'__version__ = "{NEWER}"\n')
        self.publish(NEWER, newer)

    def name(self, version: str) -> str:
        return f"{self._place}/weft:{version}"

    def publish(self, version: str, folder: Path) -> None:
        self._host.docker("plugin", "create", self.name(version), str(folder), timeout=120)
        self._host.docker("plugin", "push", self.name(version), timeout=120)
        self._host.docker("plugin", "rm", self.name(version))

    def install(self, host: Host, version: str = __version__) -> None:
        given = settings(host, self._lab)
        options = ["--alias", "weft", "--grant-all-permissions"]
        host.docker("plugin", "install", *options, self.name(version), *given, timeout=120)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    subnet = "192.168.78.0/24"
    options = {"insecure-registries": [subnet], "dns": SERVERS}
    lab = Lab(hosts=2, name="plugin", weft=False, subnet=subnet, engine_options=options)
    lab.hosts[0].engine_options["live-restore"] = True
    with lab:
        yield lab


@pytest.fixture(scope="module")
def plugins(lab: Lab, built: Built, tmp_path_factory: pytest.TempPathFactory) -> Plugins:
    return Plugins(lab, built, tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="module")
def cluster(lab: Lab, plugins: Plugins, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """`web1` on h1 and `web2` on h2, on network `app`."""
    for host in lab.hosts:
        plugins.install(host)
    cluster = Cluster(lab)
    cluster.h1.docker(*CREATE)
    eventually(lambda: bool(cluster.h2.docker("network", "ls", "-q", "--filter", "name=app")), "app on h2")
    cluster.run(cluster.h1, "web1", "app", "--restart", "always")
    cluster.run(cluster.h2, "web2", "app", "--restart", "always")
    yield cluster
    if request.session.testsfailed:
        for host in lab.hosts:
            print(f"--- dockerd on {host.name}\n{host.log('dockerd')[-6000:]}")


def test_the_image_is_small_and_asks_for_two_capabilities(built: Built, cluster: Cluster) -> None:
    config = json.loads(cluster.h2.docker("plugin", "inspect", "--format", "{{json .Config}}", "weft"))
    assert config["Linux"]["Capabilities"] == ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]
    assert not any([config["PidHost"], config["IpcHost"], config["Linux"]["AllowAllDevices"]])
    assert built.megabytes <= MEGABYTES


def test_the_data_plane_has_its_switches_set(cluster: Cluster) -> None:
    """/proc/sys is read-only in a plugin, unless that is undone."""
    assert cluster.h1.dataplane("cat", "/proc/sys/net/ipv4/icmp_ratelimit") == "0"


def test_the_same_source_gives_the_same_plugin(built: Built, builder: Builder) -> None:
    assert builder.build("--no-cache").digest == built.digest


def test_containers_of_plugins_from_a_registry_reach_each_other_by_name(cluster: Cluster, inside: Inside) -> None:
    assert reaches(cluster.h2, "web2", cluster.address(cluster.h1, "web1", "app"))
    eventually(lambda: reaches(cluster.h2, "web2", "web1"), "web1 by its name")


def on_host(host: Host, *arguments: str) -> Any:
    """What `weft ARGUMENTS --json` says that is installed on the host itself, and knows no setting of the plugin's."""
    return json.loads(host.run(WEFT, *arguments, "--json", timeout=120))


def without_daemon(host: Host, *arguments: str) -> Any:
    """The same while the plugin does not run."""
    with pytest.raises(CommandFailed) as ended:
        on_host(host, *arguments)
    assert ended.value.returncode == WITHOUT_DAEMON
    assert "no weft daemon runs on this host" in ended.value.stderr
    return json.loads(ended.value.stdout)


def bundle(host: Host, file: Path) -> dict[str, str]:
    """The parts of a support bundle."""
    on_host(host, "support-bundle", "--output", str(file))
    with tarfile.open(file) as archive:
        found = {one.name.partition("/")[2]: archive.extractfile(one) for one in archive}
        return {name: part.read().decode() for name, part in found.items() if part}


def test_the_command_on_the_host_finds_the_plugin(cluster: Cluster, tmp_path: Path) -> None:
    host = cluster.h1
    status = on_host(host, "status")
    assert (status["host"]["driver"], status["agent"]["synced"], status["endpoints"]) == ("weft:latest", True, 2)
    assert [network["name"] for network in on_host(host, "network", "ls")] == ["app"]
    assert {endpoint["names"][0] for endpoint in on_host(host, "endpoint", "ls")} == {"web1", "web2"}
    assert {one["host"] for one in json.loads(host.run(*DOCTOR, check=False))["hosts"]} == {"h1", "h2"}
    parts = bundle(host, tmp_path / "running.tar.gz")
    assert json.loads(parts["daemon/status.json"])["host"] == status["host"]
    assert json.loads(parts["snapshot.json"])


def test_without_the_plugin_the_command_on_the_host_tells_what_it_last_knew(cluster: Cluster, tmp_path: Path) -> None:
    host = cluster.h1
    default = ("ls", "/var/lib/weft")
    before = host.run(*default, check=False)
    host.docker("plugin", "disable", "-f", "weft")
    try:
        status = without_daemon(host, "status")
        assert (status["host"]["name"], status["endpoints"]) == ("h1", 2)
        assert [network["name"] for network in without_daemon(host, "network", "ls")] == ["app"]
        assert {endpoint["names"][0] for endpoint in without_daemon(host, "endpoint", "ls")} == {"web1", "web2"}
        found = json.loads(host.run(*DOCTOR, check=False))["findings"]
        assert [one["command"] for one in found if one["cause"] == "weft does not run"]
        assert host.run(*default, check=False) == before
        parts = bundle(host, tmp_path / "stopped.tar.gz")
        assert json.loads(parts["daemon/networks.json"])[0]["name"] == "app"
        assert json.loads(parts["snapshot.json"])
    finally:
        host.docker("plugin", "enable", "weft")
    assert on_host(host, "status")["agent"]["synced"] is not None


def test_setup_dns_in_the_plugin_says_what_to_write_on_the_host(cluster: Cluster, lab: Lab) -> None:
    with pytest.raises(CommandFailed) as refused:
        weft(cluster.h2, "setup", "dns")
    assert f'"dns": ["{RESOLVER}", "{lab.plan.gateway}"]' in str(refused.value)
    assert "nothing was changed" in str(refused.value)
    cluster.h2.run("test", "!", "-e", f"/proc/{processes(cluster.h2)[0]}/root/etc/docker")


def test_the_doctor_tells_by_a_container_whether_docker_asks_weft(cluster: Cluster, lab: Lab) -> None:
    """The plugin cannot read daemon.json."""
    host = cluster.h2

    def complains() -> bool:
        command = ("nsenter", "-t", processes(host)[0], "-m", "/opt/weft/bin/weft", "doctor", "--json")
        findings = json.loads(host.run(*command, check=False))["findings"]
        return any("Docker does not ask weft" in one["cause"] for one in findings)

    try:
        for servers, found in ((SERVERS[1:], True), (SERVERS, False)):
            host.engine_options["dns"] = servers
            restart_engine(host)
            eventually(lambda: bool(cluster.address(host, "web2", "app")), "web2 is back", timeout=30)
            eventually(complains if found else lambda: not complains(), f"the doctor's word: {found}", timeout=60)
    finally:
        host.engine_options["dns"] = SERVERS


def test_with_systemd_resolved_questions_go_to_the_server_behind_it_while_weft_is_away(cluster: Cluster) -> None:
    host, behind = cluster.h2, "192.168.78.253"
    before = host.run("cat", "/etc/resolv.conf")
    host.write("etc/resolv.conf", "nameserver 127.0.0.53\n")
    host.run("mkdir", "-p", "/run/systemd/resolve")
    host.run("sh", "-c", f"echo nameserver {behind} > /run/systemd/resolve/resolv.conf")
    try:
        disable_and_enable(host, None)
        rules = ("nft", "list", "table", "ip", "weft_dns")
        eventually(lambda: f"dnat to {behind}" in host.run(*rules, check=False), "the rule", timeout=30)
    finally:
        host.run("rm", "-r", "/run/systemd")
        host.write("etc/resolv.conf", before)
        disable_and_enable(host, None)


def disable_and_enable(host: Host, _: Plugins | None) -> None:
    host.docker("plugin", "disable", "-f", "weft")
    host.docker("plugin", "enable", "weft")


def kill(host: Host, _: Plugins) -> None:
    before = processes(host)
    host.run("kill", "-9", *before)
    eventually(lambda: bool(set(processes(host)) - set(before)), "the engine starts the plugin again", timeout=30)


def upgrade(host: Host, plugins: Plugins) -> None:
    host.docker("plugin", "disable", "-f", "weft")
    options = ["--grant-all-permissions", "--skip-remote-check"]
    host.docker("plugin", "upgrade", *options, "weft", plugins.name(NEWER), timeout=120)
    host.docker("plugin", "enable", "weft")
    assert NEWER in weft(host, "host", "ls")


def restart_engine(host: Host, _: Plugins | None = None) -> None:
    host.stop_engine()
    host.start_engine()


def kill_engine(host: Host, _: Plugins) -> None:
    host.kill_engine()
    host.start_engine()


@pytest.mark.parametrize("change", [disable_and_enable, kill, upgrade, restart_engine, kill_engine])
def test_no_packet_is_lost(cluster: Cluster, plugins: Plugins, change: Callable[[Host, Plugins], None]) -> None:
    """On the host of the container that is asked, where the engine has live-restore."""
    with pings(cluster.h2, "web2", cluster.address(cluster.h1, "web1", "app")) as count:
        change(cluster.h1, plugins)
        cluster.run(cluster.h1, "web3", "app")
        eventually(lambda: reaches(cluster.h2, "web2", "web3"), "a new container by its name")
    cluster.h1.docker("rm", "-f", "web3")
    assert count.lost == 0
    assert count.sent > 10


def test_what_an_encrypted_network_needs_outlives_the_plugin_or_it_is_refused(cluster: Cluster) -> None:
    """wireguard-go would not, so the plugin takes the kernel's WireGuard only; its namespace stays."""
    host, place = cluster.h1, ("stat", "--format=%i", "/run/docker/weft/wg")
    create = [*CREATE[:-3], "--subnet", "10.78.0.0/24", "-o", "encrypted", "secret"]
    before = host.run(*place)
    if host.docker(*create, check=False):
        host.docker("network", "rm", "secret")
    else:
        assert "this kernel has no WireGuard" in host.log("dockerd")
        assert "the managed plugin does not take it" in host.log("dockerd")
        assert not cluster.keys("topology/networks/")[1:]
    disable_and_enable(host, None)
    assert host.run(*place) == before


def test_a_removed_plugin_that_is_installed_again_finds_everything(cluster: Cluster, plugins: Plugins) -> None:
    address = cluster.address(cluster.h1, "web1", "app")
    with pings(cluster.h2, "web2", address) as count:
        cluster.h1.docker("plugin", "rm", "-f", "weft")
        plugins.install(cluster.h1)
        added = cluster.run(cluster.h1, "web3", "app")
        eventually(lambda: reaches(cluster.h2, "web2", "web3"), "the new container by its name")
        eventually(lambda: reaches(cluster.h2, "web2", "web1"), "the old one by its name")
    assert count.lost == 0
    assert added not in (address, cluster.address(cluster.h2, "web2", "app"))
    assert weft(cluster.h1, "gc", "--dry-run") == "nothing to collect"
    cluster.h1.docker("rm", "-f", "web3")


def test_without_live_restore_containers_come_back_and_talk(cluster: Cluster) -> None:
    restart_engine(cluster.h2)
    eventually(lambda: bool(cluster.address(cluster.h2, "web2", "app")), "web2 is back", timeout=30)
    first = cluster.address(cluster.h1, "web1", "app")
    eventually(lambda: reaches(cluster.h2, "web2", first), "and reaches web1")
    eventually(lambda: reaches(cluster.h1, "web1", "web2"), "and web1 finds it by name")


def test_containers_come_back_after_a_reboot_and_talk_by_name(cluster: Cluster) -> None:
    host = cluster.h2
    host.crash()
    host.boot()
    eventually(lambda: bool(cluster.address(host, "web2", "app")), "web2 is back", timeout=30)
    eventually(lambda: reaches(host, "web2", "web1"), "it reaches web1 by name", timeout=30)
    eventually(lambda: reaches(cluster.h1, "web1", "web2"), "and web1 finds it", timeout=30)
    eventually(lambda: len(cluster.keys("topology/endpoints/")) == 2, "nothing stale is left", timeout=30)


def test_every_setting_can_be_set(cluster: Cluster, lab: Lab) -> None:
    host = cluster.h2
    file = host.data / "weft/unused"
    file.touch()
    given = dict(one.split("=", 1) for one in settings(host, lab))
    given |= {
        "WEFT_STORE_CA": "",
        "WEFT_STORE_CERT": "",
        "WEFT_STORE_KEY": "",
        "WEFT_STORE_USER": "",
        "WEFT_STORE_PASSWORD_FILE": "",
        "WEFT_HOSTNAME": "another-name",
        "WEFT_UNDERLAY_FAMILY": "ipv4",
        "WEFT_PORT": "4789",
        "WEFT_WG_PORT": "51820",
        "WEFT_WG_POOL": "100.64.0.0/10",
        "WEFT_ALLOW_PLAIN_STORE": "off",
        "WEFT_KEY_ROTATION": "30",
        "WEFT_POOLS": "10.96.0.0/16:24",
        "WEFT_DOCKER": "unix:///host/api/docker.sock",
        "WEFT_DRIVER": "weft:latest",
        "WEFT_SCOPE": "local",
        "WEFT_DNS": RESOLVER,
        "WEFT_MIRROR": "on",
        "WEFT_RESYNC": "20",
        "WEFT_HOST_GRACE": "900",
        "WEFT_LISTEN": "127.0.0.1:9789",
        "WEFT_LISTEN_NAMES": "monitor.example.com",
        "WEFT_PROBE_INTERVAL": "20",
        "WEFT_LOG": "debug",
        "WEFT_LOG_FORMAT": "json",
    }
    assert {variable(name) for name in SETTINGS} - given.keys() == {"WEFT_SOCKET", "WEFT_RUN"}
    host.docker("plugin", "disable", "-f", "weft")
    host.docker("plugin", "set", "weft", *(f"{name}={value}" for name, value in given.items()))
    host.docker("plugin", "enable", "weft")
    assert "another-name" in weft(host, "host", "ls")


def test_a_store_that_cannot_be_used_is_said_and_the_plugin_is_not_enabled(cluster: Cluster, lab: Lab) -> None:
    host = cluster.h2
    host.docker("plugin", "disable", "-f", "weft")
    host.docker("plugin", "set", "weft", "WEFT_STORE=etcd://127.0.0.1:1")
    with pytest.raises(CommandFailed):  # the engine shows no more than that nobody listens
        host.docker("plugin", "enable", "weft")
    assert "etcd cannot be used: 127.0.0.1:1 (Connection refused); check" in host.log("dockerd")
    host.docker("plugin", "set", "weft", f"WEFT_STORE={lab.plan.store_url}")
    eventually(lambda: enables(host), "enabling it again", timeout=30)


def enables(host: Host) -> bool:
    """An engine that is not done yet with what it has refused says `id already in use`."""
    host.docker("plugin", "enable", "weft", check=False)
    return host.docker("plugin", "inspect", "--format", "{{.Enabled}}", "weft") == "true"
