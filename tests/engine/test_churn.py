"""Containers come and go on three hosts at random, several at a time: nothing is leaked, doubled or forgotten.

CHURN is how many times a container starts (as many are stopped, killed, or removed as they run), SEED what is chosen.
The engines are asked by their API, which spares a docker program for each command.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from threading import Event, Thread

import docker
import pytest
from docker.errors import APIError

from lab import Host, Lab
from lab.process import all_at_once
from tests.engine.agreement import Records, differences
from tests.engine.conftest import IMAGE, eventually
from tests.engine.three import Three

pytestmark = pytest.mark.skipif(not shutil.which("etcd"), reason="etcd is not installed: run lab/setup.sh")

STARTS = int(os.environ.get("CHURN", "500"))
SEED = os.environ.get("SEED", "weft")
AT_ONCE = 2
"""Commands on each host."""
MOST = 4
"""Containers that one worker has, at most."""
NETWORKS = {"blue": ("--subnet", "10.77.0.0/24"), "green": ("--subnet", "10.78.0.0/24", "--internal")}


@pytest.fixture
def three() -> Iterator[Three]:
    with Lab(hosts=3, name="churn", store="etcd", settings={"WEFT_GC_GRACE": "5"}) as lab:
        three = Three(lab)
        three.repair()
        yield three


class Worker:
    """Does one thing after the other on one host, with containers of its own. What it does depends on the seed alone.

    A container is either running or stopped, and on the networks of which it is a member.
    """

    def __init__(self, host: Host, number: int, starts: int) -> None:
        self.done: Counter[str] = Counter()
        self._docker = docker.APIClient(host.docker_host, timeout=60)
        self._name = f"{host.name}-{number}"
        self._random = random.Random(f"{SEED} {self._name}")
        self._starts = starts
        self._numbers = count()
        self._running: dict[str, set[str]] = {}
        self._stopped: dict[str, set[str]] = {}

    def work(self) -> None:
        with closing(self._docker):
            self._work()

    def _work(self) -> None:
        while self.done["run"] + self.done["start"] < self._starts:
            step = self._random.choice(self._possible())
            try:
                step()
            except APIError as error:  # a busy machine keeps etcd waiting: that must leave nothing behind either
                if "etcd cannot be used" not in str(error):
                    raise
                self.done["refused"] += 1
            else:
                self.done[step.__name__.strip("_")] += 1

    def _possible(self) -> list[Callable[[], None]]:
        steps: list[Callable[[], None]] = []
        if len(self._running) + len(self._stopped) < MOST:
            steps += [self._run] * 2
        if self._stopped:
            steps += [self._start] * 3 + [self._remove_stopped]
        if self._running:
            steps += [self._stop, self._kill, self._remove_running, self._connect_or_disconnect]
        return steps

    def _run(self) -> None:
        name = f"{self._name}-{next(self._numbers)}"
        network = self._random.choice(sorted(NETWORKS))
        options = self._docker.create_host_config(network_mode=network, log_config={"Type": "none"})
        self._docker.create_container(IMAGE, name=name, host_config=options)
        self._stopped[name] = {network}  # it stays like that if it is refused
        self._begin(name)

    def _start(self) -> None:
        self._begin(self._any(self._stopped))

    def _begin(self, name: str) -> None:
        self._docker.start(name)
        self._running[name] = self._stopped.pop(name)

    def _stop(self) -> None:
        name = self._any(self._running)
        self._docker.stop(name, timeout=1)
        self._stopped[name] = self._running.pop(name)

    def _kill(self) -> None:
        name = self._any(self._running)
        self._docker.kill(name)
        self._stopped[name] = self._running.pop(name)

    def _remove_running(self) -> None:
        self._remove(self._running)

    def _remove_stopped(self) -> None:
        self._remove(self._stopped)

    def _remove(self, containers: dict[str, set[str]]) -> None:
        name = self._any(containers)
        self._docker.remove_container(name, force=True)
        del containers[name]

    def _connect_or_disconnect(self) -> None:
        name = self._any(self._running)
        networks = self._running[name]
        network = self._random.choice(sorted(NETWORKS))
        if network in networks:
            self._docker.disconnect_container_from_network(name, network)
        else:
            self._docker.connect_container_to_network(name, network)
        networks ^= {network}

    def _any(self, containers: dict[str, set[str]]) -> str:
        return self._random.choice(sorted(containers))


class Watcher:
    """Looks at the store again and again for what must not be at any moment."""

    def __init__(self, three: Three) -> None:
        self.looks = 0
        self.wrong: set[str] = set()
        self._three = three
        self._stop = Event()
        self._thread = Thread(target=self._loop)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(0.5):
            self.wrong |= Records(self._three.etcd.entries()).contradictions()
            self.looks += 1


def test_after_churn_kernel_store_and_docker_agree(
    three: Three, record_property: Callable[[str, object], None]
) -> None:
    for name, options in NETWORKS.items():
        three.network(name, *options)
    each = STARTS // (len(three.lab.hosts) * AT_ONCE) + 1
    workers = [Worker(host, number, each) for host in three.lab.hosts for number in range(AT_ONCE)]
    began = time.monotonic()
    with Watcher(three) as watcher:
        all_at_once(Worker.work, workers)
        _agree(three)
    done = sum((worker.done for worker in workers), Counter[str]())
    seconds = time.monotonic() - began
    for what, value in [*done.items(), ("seconds", round(seconds)), ("looks at the store", watcher.looks)]:
        record_property(what, value)
        print(f"{what}: {value}")
    assert done["run"] + done["start"] >= STARTS
    assert done["refused"] < STARTS / 20
    assert watcher.wrong == set()
    assert watcher.looks > 10
    three.clean()
    _nothing_is_left(three)


def _agree(three: Three) -> None:
    hosts = {known: host for host, known in three.ids.items()}
    found: set[str] = set()

    def calm() -> bool:
        found.clear()
        found.update(differences(hosts, three.etcd.entries()))
        return not found

    try:
        eventually(calm, "kernel, store and Docker agree", timeout=20)
    except Exception as error:
        for host in three.lab.hosts:
            print("NEIGH", host.name, host.dataplane("ip", "-s", "neigh"))
            print("LOG", host.log("weft")[-3000:])
            print("KEYS", [v for k, v in three.etcd.entries().items() if "endpoints" in k])
        raise AssertionError("\n".join([str(error), *sorted(found)])) from None


def _nothing_is_left(three: Three) -> None:
    lasting = ("schema", "engines/", "topology/hosts/", "topology/alive/", "probes/results/")
    eventually(lambda: all(key.startswith(lasting) for key in three.keys("")), "the store is empty", timeout=20)
    for host in three.lab.hosts:
        eventually(lambda h=host: three.links(h) == [], f"{host.name}'s data plane is empty", timeout=40)  # type: ignore[misc]
