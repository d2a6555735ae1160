"""The managed plugin: built from the Dockerfile without a network, created, enabled, and used by real containers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import CommandFailed, Host, Lab
from lab.plan import PROJECT
from lab.process import run
from tests.engine.conftest import Cluster, eventually, reaches
from tests.engine.traffic import pings

SUBNET = "10.77.0.0/24"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(hosts=2, name="plugin", weft=False) as lab:
        yield lab


@pytest.fixture(scope="module")
def plugin(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build on h1, on a Debian that debootstrap makes: no registry is needed."""
    base = tmp_path_factory.mktemp("base")
    release = run(["sh", "-c", '. /etc/os-release && echo "$VERSION_CODENAME"'])
    packages = "python3,python3-venv"
    run(["debootstrap", "--variant=minbase", f"--include={packages}", release, str(base / "root")], timeout=600)
    run(["tar", "-C", str(base / "root"), "-cf", str(base / "base.tar"), "."], timeout=120)
    host = lab.hosts[0]
    host.docker("import", str(base / "base.tar"), "base", timeout=120)
    environment = {**os.environ, "BASE": "base", "DOCKER_HOST": host.docker_host}
    subprocess.run([PROJECT / "deploy/build-plugin.sh"], check=True, env=environment, timeout=600)
    return PROJECT / "build/plugin"


def install(host: Host, plugin: Path, store: Path) -> None:
    state = host.data / "weft"
    state.mkdir(exist_ok=True)
    host.docker("plugin", "create", "weft:latest", str(plugin), timeout=300)
    settings = {
        "WEFT_HOSTNAME": host.name,
        "WEFT_UNDERLAY": "eth0",
        "WEFT_STORE": "sqlite:///store/weft.db",
        "WEFT_GC_GRACE": "1",
        "state.source": str(state),
        "store.source": str(store),
    }
    host.docker("plugin", "set", "weft", *(f"{name}={value}" for name, value in settings.items()))
    host.docker("plugin", "enable", "weft")


@pytest.fixture(scope="module")
def cluster(lab: Lab, plugin: Path) -> Cluster:
    store = lab.plan.data / "store"
    store.mkdir()
    for host in lab.hosts:
        install(host, plugin, store)
    return Cluster(lab)


def test_containers_reach_each_other_and_a_restarted_plugin_loses_no_packet(cluster: Cluster) -> None:
    create = ["network", "create", "-d", "weft:latest", "--ipam-driver", "weft:latest", "--subnet", SUBNET, "app"]
    cluster.h1.docker(*create)
    eventually(lambda: bool(cluster.h2.docker("network", "ls", "-q", "--filter", "name=app")), "app on h2")
    first = cluster.run(cluster.h1, "web1", "app")
    cluster.run(cluster.h2, "web2", "app")
    eventually(lambda: reaches(cluster.h2, "web2", first), "ping across")
    with pings(cluster.h2, "web2", first) as count:
        cluster.h1.docker("plugin", "disable", "-f", "weft")
        cluster.h1.docker("plugin", "enable", "weft")
        cluster.h1.docker("run", "--rm", "--network", "app", "weft-lab", "true")
    assert count.lost == 0
    assert count.sent > 10


def test_a_store_that_cannot_be_used_is_said_and_the_plugin_is_not_enabled(cluster: Cluster) -> None:
    host = cluster.h2
    host.docker("plugin", "disable", "-f", "weft")
    host.docker("plugin", "set", "weft", "WEFT_STORE=etcd://127.0.0.1:1")
    with pytest.raises(CommandFailed):  # the engine shows no more than that nobody listens
        host.docker("plugin", "enable", "weft")
    assert "etcd cannot be used: 127.0.0.1:1 (Connection refused); check" in host.log("dockerd")
