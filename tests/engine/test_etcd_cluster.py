"""Two hosts that share nothing but a network and etcd."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from lab import CommandFailed
from lab.process import wait_until
from tests.engine.asking import Inside
from tests.engine.conftest import IMAGE, Cluster, eventually, reaches
from tests.engine.traffic import pings

SUBNET = "10.77.0.0/24"
PORT = 2379


@pytest.fixture
def etcd(cluster: Cluster) -> Iterator[subprocess.Popen[bytes]]:
    """One member on h1; weft on both hosts uses it."""
    url = f"http://{cluster.h1.address}:{PORT}"
    argv = ["etcd", "--data-dir", str(cluster.h1.data / "etcd"), "--log-level", "error"]
    argv += ["--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", "http://127.0.0.1:2380"]
    with subprocess.Popen(cluster.h1.enter(["setpriv", "--pdeathsig", "KILL", *argv])) as process:
        health = ["busybox", "wget", "-qO-", f"{url}/health"]
        wait_until(lambda: "true" in cluster.h1.run(*health, check=False), "etcd answers")
        for host in cluster.lab.hosts:
            host.settings["WEFT_STORE"] = f"etcd://{cluster.h1.address}:{PORT}"
            host.restart_weft()
        yield process
        cluster.clean()
        cluster.h1.run("pkill", "-KILL", "-x", "etcd", check=False)


def test_containers_reach_each_other_and_nothing_is_lost_while_etcd_is_away(
    cluster: Cluster, etcd: subprocess.Popen[bytes]
) -> None:
    cluster.network("app", subnet=SUBNET)
    first = cluster.run(cluster.h1, "web1", "app")
    second = cluster.run(cluster.h2, "web2", "app")
    eventually(lambda: reaches(cluster.h1, "web1", second), "ping across")
    run = ["run", "--rm", "--network", "app", IMAGE, "echo", "ran"]
    with pings(cluster.h2, "web2", first) as count:
        cluster.h1.run("pkill", "-STOP", "-x", "etcd")
        with pytest.raises(CommandFailed, match=f"{cluster.h1.address}:{PORT}"):
            cluster.h2.docker(*run)
        cluster.h1.run("pkill", "-CONT", "-x", "etcd")
        etcd.send_signal(signal.SIGCONT)  # nsenter stops along with its child, but does not go on with it
        eventually(lambda: cluster.h2.docker(*run, check=False) == "ran", "containers start again", timeout=30)
    assert count.lost == 0


def test_names_are_answered_while_etcd_is_away(cluster: Cluster, etcd: subprocess.Popen[bytes], inside: Inside) -> None:
    """Those that were known are, the user's own servers are asked as quickly as before."""
    cluster.network("app", subnet=SUBNET)
    first = cluster.run(cluster.h1, "web1", "app")
    cluster.run(cluster.h2, "web2", "app")
    ask = inside(cluster.h2, "web2")
    assert ask("web1", until="answered").answers == [first]
    cluster.h1.run("pkill", "-STOP", "-x", "etcd")
    try:
        for _ in range(20):  # a lease of ten seconds ends meanwhile
            known, foreign = ask("web1"), ask("gateway.lab")
            assert known.answers == [first]
            assert foreign.answers == [cluster.lab.plan.gateway]
            assert max(known.took, foreign.took) < 0.5
            time.sleep(0.7)
    finally:
        cluster.h1.run("pkill", "-CONT", "-x", "etcd")
        etcd.send_signal(signal.SIGCONT)
    eventually(lambda: cluster.h1.docker("rename", "web1", "fresh", check=False) == "", "docker goes on")
    assert ask("fresh", until="answered", patience=30).answers == [first]
