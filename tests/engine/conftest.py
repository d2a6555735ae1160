"""Two real Docker Engines with weft, shared by the tests of a module; each test cleans up what it made."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from lab import CommandFailed, Host, Lab
from lab.plan import Plan
from lab.process import all_at_once, wait_until
from tests.engine.asking import Inside, askers
from tests.engine.managed import Builder, Built
from weft.model import ENCRYPTED_PROBE_VNI, PROBE_VNI

IMAGE = "weft-lab"

_PLUGIN = ("test_plugin", "test_swarm")


class _ByFile(LoadFileScheduling):  # type: ignore[misc]
    """Files run beside each other; a file's tests stay with its lab, and all that need the plugin with it."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "plugin" if Path(file).stem in _PLUGIN else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    return _ByFile(config, log)


class Cluster:
    """The two hosts, and short words for what tests do on them."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.h1, self.h2 = lab.hosts[:2]

    def network(self, name: str, *options: str, subnet: str = "", on: Host | None = None) -> None:
        """Create a network on one host (default: the first), and wait until all have it."""
        options = ("--subnet", subnet, *options) if subnet else options
        (on or self.h1).docker("network", "create", "-d", "weft", "--ipam-driver", "weft", *options, name)
        eventually(lambda: all(name in self.networks(host) for host in self.lab.hosts), f"{name} is on all hosts")

    def networks(self, host: Host) -> list[str]:
        """Names of the weft networks that an engine has."""
        return host.docker("network", "ls", "--filter", "driver=weft", "--format", "{{.Name}}").split()

    def run(self, host: Host, name: str, network: str, *options: str) -> str:
        """Start a container; return its IPv4 address on the network."""
        host.docker("run", "-d", "--name", name, "--network", network, *options, IMAGE)
        return self.address(host, name, network)

    def address(self, host: Host, name: str, network: str, *, field: str = "IPAddress") -> str:
        template = f'{{{{(index .NetworkSettings.Networks "{network}").{field}}}}}'
        return host.docker("inspect", "--format", template, name)

    def keys(self, prefix: str = "") -> list[str]:
        """The store's keys, read past weft."""
        return sorted(self.entries(prefix))

    def entries(self, prefix: str = "") -> dict[str, str]:
        """What the store has, by key, read past weft."""
        if self.lab.etcd.members:
            return self.lab.etcd.entries(prefix)
        with closing(sqlite3.connect(f"file:{self.lab.plan.data}/store.db?mode=ro", uri=True)) as database:
            query = "SELECT key, value FROM entries WHERE key >= ? AND key < ? ORDER BY key"
            return dict(database.execute(query, (prefix, prefix + "\U0010ffff")))

    def links(self, host: Host) -> list[str]:
        """Names of the links in a host's data plane that are there for containers."""
        shown = host.dataplane("ip", "-o", "link")
        probes = {f"{kind}{vni}" for kind in ("br", "vx") for vni in (PROBE_VNI, ENCRYPTED_PROBE_VNI)}
        return sorted({*re.findall(r"^\d+: ([^:@]+)", shown, re.MULTILINE)} - probes - {"lo"})

    def clean(self) -> None:
        """Remove all containers and weft networks."""
        all_at_once(self._remove_containers, self.lab.hosts)
        eventually(self._no_networks, "all networks are removed", timeout=30)

    def _remove_containers(self, host: Host) -> None:
        if containers := host.docker("ps", "-aq").split():
            host.docker("rm", "-f", *containers)

    def _no_networks(self) -> bool:
        all_at_once(self._remove_networks, self.lab.hosts)
        return not self.keys("topology/networks/") and not any(map(self.networks, self.lab.hosts))

    def _remove_networks(self, host: Host) -> None:
        if names := self.networks(host):
            host.docker("network", "rm", *names, check=False)  # another host's weft may be quicker


def reaches(host: Host, container: str, address: str, *options: str) -> bool:
    """One ping, one second."""
    command = ["exec", container, "ping", "-c", "1", "-W", "1", *options, address]
    return "1 packets received" in host.docker(*command, check=False)


def refusal(host: Host, *command: str) -> str:
    """What Docker says to somebody whose command fails."""
    with pytest.raises(CommandFailed) as caught:
        host.docker(*command)
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def arp_questions(lines: list[str]) -> list[tuple[str, str]]:
    """Who is asked for and by whom, of tcpdump's lines; announcements, which ask for themselves, are left out.

    Docker Engine 28 and newer make some when a container starts. For drivers like weft they say 0.0.0.0, as the engine
    takes the first four bytes of an address that has 16 (libnetwork/internal/l2disco).
    """
    asked = re.findall(r"ARP, Request who-has (\S+).* tell (\S+),", "\n".join(lines))
    return [(address, asker) for address, asker in asked if address != asker]


def eventually(condition: Callable[[], bool], what: str, timeout: float = 10) -> None:
    wait_until(condition, what, timeout=timeout)


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest, worker_id: str) -> Iterator[Cluster]:
    """A lab per module; `ENGINE_OPTIONS` and `SETTINGS` of the module are daemon.json's and weft's, `UNDERLAY` is the
    hosts' subnet, `STORE` the lab's."""
    options = getattr(request.module, "ENGINE_OPTIONS", None)
    underlay = getattr(request.module, "UNDERLAY", Plan.subnet)
    store = getattr(request.module, "STORE", Plan.store)
    # What is captured on the wire is told more easily without probes.
    settings = {"WEFT_GC_GRACE": "1", "WEFT_PROBE_INTERVAL": "0", **getattr(request.module, "SETTINGS", {})}
    name = f"engines-{worker_id}"
    with Lab(2, name, subnet=underlay, engine_options=options, settings=settings, store=store) as lab:
        cluster = Cluster(lab)
        eventually(lambda: len(cluster.keys("engines/")) == len(lab.hosts), "weft has seen the engines")
        yield cluster
        if request.session.testsfailed:
            for host in lab.hosts:
                print(f"--- weft on {host.name}\n{host.log('weft')[-6000:]}")


@pytest.fixture
def cluster(engines: Cluster) -> Iterator[Cluster]:
    yield engines
    engines.clean()


@pytest.fixture
def inside() -> Iterator[Inside]:
    """Asks from inside containers: `inside(host, name)("web1")`."""
    with askers() as made:
        yield made


@pytest.fixture(scope="session")
def builder() -> Iterator[Builder]:
    with Lab(hosts=1, name="build", weft=False) as lab:
        yield Builder(lab.hosts[0])


@pytest.fixture(scope="session")
def built(builder: Builder) -> Built:
    """The managed plugin, built once for all tests."""
    return builder.build()
