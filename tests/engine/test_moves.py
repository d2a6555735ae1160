"""A container stops on one host and starts on another with the same `--ip`."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator

import pytest

from lab import Host, Lab
from lab.process import all_at_once
from tests.engine.agreement import differences
from tests.engine.conftest import IMAGE, eventually, reaches
from tests.engine.three import SUBNET, Addresses, Three

pytestmark = pytest.mark.skipif(not shutil.which("etcd"), reason="etcd is not installed: run lab/setup.sh")

MOVING = "10.77.0.50"
MOVES = 5


@pytest.fixture(scope="module")
def three() -> Iterator[Three]:
    settings = {"WEFT_GC_GRACE": "1", "WEFT_PROBE_INTERVAL": "0"}
    with Lab(hosts=3, name="moves", store="etcd", settings=settings) as lab:
        yield Three(lab)


@pytest.fixture(scope="module")
def addresses(three: Three) -> Addresses:
    """Of the containers web-HOST; on each host there is also the container `moving`, made and not yet started."""
    three.network("app", subnet=SUBNET)
    found = Addresses({host: three.run(host, f"web-{host.name}", "app") for host in three.lab.hosts})
    for host in three.lab.hosts:
        host.docker("create", "--name", "moving", "--network", "app", "--ip", MOVING, IMAGE)
    found.all_reach()
    return found


def await_all(hosts: list[Host]) -> float:
    """Seconds until it is reached from all these hosts."""
    began = time.monotonic()
    wait = lambda host: eventually(lambda: reaches(host, f"web-{host.name}", MOVING), f"{host.name} reaches it")  # noqa: E731
    all_at_once(wait, hosts)
    return time.monotonic() - began


def nothing_stale(three: Three) -> None:
    """Kernel, store and Docker agree on every host, by each one's FDB and neighbours."""
    known = {three.ids[host]: host for host in three.lab.hosts}
    eventually(lambda: not differences(known, three.etcd.entries()), "nothing stale is left", timeout=20)


def test_it_is_reached_from_everywhere_at_once(three: Three, addresses: Addresses) -> None:
    seconds = []
    here = three.h1
    here.docker("start", "moving")
    await_all(three.lab.hosts)
    for move in range(MOVES):
        there = three.lab.hosts[(move + 1) % 3]
        here.docker("stop", "-t", "0", "moving")
        there.docker("start", "moving")
        seconds.append(await_all(three.lab.hosts))
        here = there
    print(f"reached from three hosts after, seconds: {statistics.median(seconds):.2f} of {sorted(seconds)}")
    assert statistics.median(seconds) < 5
    nothing_stale(three)
    here.docker("stop", "-t", "0", "moving")


def test_the_old_host_was_cut_off_meanwhile(three: Three, addresses: Addresses) -> None:
    """It cannot say that the container has stopped: somebody has to forget it, and it must not spoil it afterwards."""
    three.h3.docker("start", "moving")
    await_all([three.h1, three.h2])
    three.h3.cut_link()
    three.h3.docker("stop", "-t", "0", "moving")
    three.h1.ask_weft("host", "forget", "h3", "--force")
    three.h1.docker("start", "moving")
    await_all([three.h1, three.h2])
    three.h3.restore_link()
    addresses.all_reach(timeout=30)
    await_all(three.lab.hosts)
    nothing_stale(three)
