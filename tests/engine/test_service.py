"""weft as a systemd service: the unit as it is delivered, under a real systemd, with the wheel that users install."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import Host, Lab, systemd
from lab.daemon import answers
from lab.host import DATAPLANE, PLUGIN_SOCKET
from lab.plan import PROJECT
from tests import wheel
from tests.engine.conftest import IMAGE, Cluster, eventually, reaches
from tests.engine.traffic import pings

pytestmark = pytest.mark.skipif(not Path(systemd.PROGRAM).exists(), reason="systemd is not installed: run lab/setup.sh")

SUBNET = "10.77.0.0/24"
PATIENCE = 20
"""Seconds without a sign of life, less than the minute of the unit."""
DOCKER = """
[Service]
Type=notify
ExecStart=dockerd
Restart=always
KillMode=process
"""
# The host's own /opt and /var/lib: a layer above the machine's, and a folder with the lab's data in it.
OPT = """
mkdir -p "$DATA/opt" "$DATA/opt.work"
mount -n -t overlay overlay -o "lowerdir=/opt,upperdir=$DATA/opt,workdir=$DATA/opt.work" /opt
"""
VAR_LIB = """
mkdir -p "$DATA/weft" /run/lib
mount -n -t tmpfs tmpfs /run/lib
mkdir -p "/run/lib${LABS#/var/lib}" /run/lib/weft
mount -n --bind "$LABS" "/run/lib${LABS#/var/lib}"
mount -n --bind "$DATA/weft" /run/lib/weft
mount -n --move /run/lib /var/lib
"""


class Service:
    """The unit on one host."""

    def __init__(self, lab: Lab, host: Host) -> None:
        self.lab = lab
        self.host = host
        self.log = host.data / "service.log"

    def boot(self, wheels: Path | None = None) -> None:
        """With `wheels`, weft is installed first."""
        self.host.boot_alone()
        folders = {"DATA": str(self.host.data), "LABS": self.lab.plan.data_root}
        self.host.run("sh", "-ec", VAR_LIB, env=folders)
        furnish(self.host, wheels)
        self.host.run("sh", "-ec", "umount /run/docker; rmdir /run/docker")  # a machine's /run is empty at boot
        self.host.configure_engine()
        unit = (PROJECT / "deploy/weft.service").read_text()
        units = {"weft.service": unit, "weft.service.d/lab.conf": self._drop_in(), "docker.service": DOCKER}
        systemd.boot(self.host, units, "weft.service docker.service")

    def _drop_in(self) -> str:
        """The store of the lab is a file elsewhere, and nobody keeps a journal."""
        home = "ProtectHome=no\n" if _python().startswith(("/root/", "/home/")) else ""
        out = f"append:{self.log}"
        return (
            f"[Service]\nReadWritePaths={self.lab.plan.data}\nWatchdogSec={PATIENCE}\n{home}"
            f"StandardOutput={out}\nStandardError={out}\n"
        )

    def ctl(self, *arguments: str) -> str:
        return self.host.run("systemctl", *arguments, timeout=120)

    def shows(self, name: str, unit: str = "weft") -> str:
        return self.ctl("show", "--value", "--property", name, unit)

    @property
    def pid(self) -> str:
        return self.shows("MainPID")

    @property
    def worker(self) -> str:
        return self.host.run("pgrep", "--parent", self.pid)

    def is_up(self, unit: str = "weft") -> bool:
        return self.shows("ActiveState", unit) == "active"

    def kill_all(self) -> None:
        before = self.pid
        self.host.run("sh", "-c", f"kill -KILL {before} {self.worker}")
        eventually(lambda: self.pid != before and self.is_up(), "systemd starts weft again", timeout=60)

    def restart(self) -> None:
        self.ctl("restart", "weft")

    def stop_and_start(self) -> None:
        self.ctl("stop", "weft")
        assert self.host.dataplane("ip", "-o", "link")
        self.ctl("start", "weft")


def furnish(host: Host, wheels: Path | None) -> None:
    """What is there before weft starts: the program in /opt/weft, and the delivered settings with those of the lab."""
    host.run("sh", "-ec", OPT, env={"DATA": str(host.data)})
    if wheels:
        wheel.install(wheels, Path("/opt/weft"), python=_python(), enter=host.enter([]))
    names = ("WEFT_STORE", "WEFT_HOSTNAME", "WEFT_UNDERLAY", "WEFT_GC_GRACE")
    delivered = (PROJECT / "deploy/weft.env").read_text()
    host.write("etc/weft/weft.env", delivered + "".join(f"{name}={host.settings[name]}\n" for name in names))


def _python() -> str:
    """The distribution's, if it is the version that the wheels were made for."""
    version = "import sys; print(sys.version_info[:2])"
    for python in ("/usr/bin/python3", os.path.realpath(sys.executable)):
        if not Path(python).exists():
            continue
        told = subprocess.run([python, "-c", version], capture_output=True, text=True).stdout.strip()
        if told == str(sys.version_info[:2]):
            return python
    raise AssertionError("unreachable")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.wheelhouse(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def service(wheels: Path) -> Iterator[Service]:
    with Lab(hosts=2, name="service", settings={"WEFT_GC_GRACE": "1"}) as lab:
        service = Service(lab, lab.hosts[0])
        service.host.crash()
        service.boot(wheels)
        eventually(lambda: service.is_up() and service.is_up("docker"), "weft and Docker are up", timeout=60)
        yield service


@pytest.fixture
def cluster(service: Service, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    cluster = Cluster(service.lab)
    eventually(lambda: len(cluster.keys("engines/")) == 2, "weft has seen the engines", timeout=60)
    yield cluster
    if request.session.testsfailed:
        print(service.log.read_text()[-6000:])
    cluster.clean()


@pytest.fixture
def pair(cluster: Cluster) -> str:
    """The address of web1 on the service's host; web2 on the other one reaches it."""
    cluster.network("app", subnet=SUBNET)
    first = cluster.run(cluster.h1, "web1", "app", "--restart", "always")
    cluster.run(cluster.h2, "web2", "app")
    eventually(lambda: reaches(cluster.h2, "web2", first), "ping across")
    return first


def test_weft_is_ready_before_docker_starts(service: Service, cluster: Cluster) -> None:
    ready = int(service.shows("ActiveEnterTimestampMonotonic"))
    assert 0 < ready < int(service.shows("ExecMainStartTimestampMonotonic", "docker"))


def test_the_service_has_no_more_rights_than_it_needs(service: Service) -> None:
    status = (service.host.root / f"proc/{service.worker}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 1 << 12 | 1 << 13 | 1 << 21 | 1 << 10
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    log = service.log.read_text()
    assert "cannot write" not in log
    assert "not permitted" not in log


def test_the_data_plane_is_the_hosts_not_the_services(service: Service) -> None:
    inside = service.host.run("stat", "--format=%i", f"/proc/{service.worker}/root{DATAPLANE}")
    assert service.host.run("stat", "--format=%i", DATAPLANE) == inside
    mounts = (service.host.root / f"proc/{service.worker}/mountinfo").read_text()
    assert " master:" in next(
        line for line in mounts.splitlines() if " /run/docker " in line
    )  # none of its mounts would reach the host


@pytest.mark.parametrize("happens", [Service.restart, Service.kill_all, Service.stop_and_start])
def test_no_packet_is_lost(service: Service, cluster: Cluster, pair: str, happens: Callable[[Service], None]) -> None:
    with pings(cluster.h2, "web2", pair) as count:
        happens(service)
        cluster.h1.docker("run", "--rm", "--network", "app", IMAGE, "true")
    assert count.lost == 0
    assert count.sent > 10


def test_no_packet_of_an_encrypted_network_is_lost(service: Service, cluster: Cluster) -> None:
    """wireguard-go, where it is what encrypts, is the service's child and outlives it."""
    cluster.network("secret", "-o", "encrypted", subnet=SUBNET)
    address = cluster.run(cluster.h1, "web1", "secret")
    cluster.run(cluster.h2, "web2", "secret")
    eventually(lambda: reaches(cluster.h2, "web2", address), "ping across")
    encrypting = wireguard_go(cluster.h1)
    with pings(cluster.h2, "web2", address) as count:
        for happens in (Service.restart, Service.kill_all, Service.stop_and_start):
            happens(service)
            cluster.h1.docker("run", "--rm", "--network", "secret", IMAGE, "true")
    assert count.lost == 0
    assert wireguard_go(cluster.h1) == encrypting
    backend = "wireguard-go" if encrypting else "kernel"
    told = cluster.h1.run("/opt/weft/bin/weft", "network", "inspect", "secret")
    assert re.search(rf"^encrypted: +active \({backend}\)$", told, re.MULTILINE)


def wireguard_go(host: Host) -> list[str]:
    """Its processes on a host."""
    return host.run("pgrep", "-x", "wireguard-go", check=False).split()


def test_a_weft_that_hangs_is_restarted_and_no_packet_is_lost(service: Service, cluster: Cluster, pair: str) -> None:
    before = service.pid
    with pings(cluster.h2, "web2", pair) as count:
        service.host.run("kill", "-STOP", service.worker)
        eventually(lambda: service.pid != before and service.is_up(), "another weft", timeout=6 * PATIENCE)
        cluster.h1.docker("run", "--rm", "--network", "app", IMAGE, "true")
    assert count.lost == 0


def test_weft_version_tells_both_versions(service: Service) -> None:
    told = service.host.run("/opt/weft/bin/weft", "version")
    assert told.splitlines()[1].removeprefix("daemon: ") == told.splitlines()[0]


def test_containers_come_back_after_a_reboot_and_talk_by_name(service: Service, cluster: Cluster, pair: str) -> None:
    cluster.h1.docker("exec", "web1", "true")
    service.host.crash()
    service.boot()
    eventually(lambda: reaches(cluster.h2, "web2", "web1"), "web1 is back, and found by name", timeout=60)
    assert reaches(cluster.h1, "web1", "web2")
    eventually(lambda: len(cluster.keys("topology/endpoints/")) == 2, "nothing stale is left", timeout=30)


def test_systemd_finds_no_fault_in_the_unit(service: Service) -> None:
    assert service.host.run("systemd-analyze", "verify", f"{systemd.UNITS}/weft.service") == ""
    exposure = service.host.run("systemd-analyze", "security", "weft.service").splitlines()[-1]
    assert float(exposure.split(": ")[1].split()[0]) < 4, exposure


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is missing: run lab/setup.sh")
def test_weft_in_a_container(service: Service, cluster: Cluster, pair: str, wheels: Path, tmp_path: Path) -> None:
    """deploy/compose.yaml, with the host's Python in place of the image's."""
    host, lab = cluster.h2, service.lab
    host.stop_weft()
    host.run("mount", "--make-rshared", "/")  # as systemd does
    furnish(host, wheels)
    mine = tmp_path / "mine.yaml"
    folders = {"/usr", "/lib", "/lib64", "/opt/weft", sys.base_prefix, str(lab.plan.data)}
    there = [folder for folder in sorted(folders) if (host.root / folder[1:]).exists()]
    volumes = [f"{folder}:{folder}:rslave" for folder in there]  # containers' mounts below the lab's data come and go
    volumes.append(f"{host.data}/weft:/var/lib/weft")
    image = {
        "image": IMAGE,
        "entrypoint": ["/opt/weft/bin/weft", "serve"],
        "volumes": volumes,
        "environment": {"WEFT_DOCKER": "unix:///run/docker.sock"},  # the lab's image lacks the link /var/run
    }
    mine.write_text(json.dumps({"version": "3.7", "services": {"weft": image}}))
    files = ("--file", str(PROJECT / "deploy/compose.yaml"), "--file", str(mine))
    compose = ("docker-compose", *files, "--project-name", "weft")
    environment = {"DOCKER_HOST": host.docker_host}
    try:
        with pings(cluster.h1, "web1", cluster.address(host, "web2", "app")) as count:
            host.run(*compose, "up", "--detach", env=environment)
            eventually(lambda: _serves(host), "weft serves in its container")
            host.docker("restart", "weft")
            eventually(lambda: _serves(host), "weft serves again")
            host.docker("run", "--rm", "--network", "app", IMAGE, "true")
        log = host.docker("logs", "weft")
    finally:
        host.run(*compose, "down", env=environment)
        host.start_weft()
    assert count.lost == 0
    assert all("/proc/sys" in line for line in log.splitlines() if "cannot" in line), log


def _serves(host: Host) -> bool:
    return answers(host.root / PLUGIN_SOCKET[1:], "POST /Plugin.Activate")
