"""`FOLDER SIZE RATE SAMPLES HOSTS...`: growing numbers of hosts on one network, and how soon all know of an endpoint.

A simulated host is weft's agent with a store client, a watch and a kernel in memory; one host is `weft serve` with a
real one. Drivers of a few more hosts, which have no agent, make endpoints in turn at an even rate. etcd is real.
Prints, for each number of hosts, milliseconds from a driver's call until hosts have the entry, and what etcd did.
"""

import json
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from ipaddress import IPv4Address
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic, process_time, sleep
from typing import Any

from bench.inside.population import VNI, Population
from bench.inside.serving import ETCD_BATCH, ETCD_OPTIONS, RUN, STATE, Serving, fill
from bench.load import Load
from tests.etcd import Cluster as Etcd
from weft.agent import Agent
from weft.attachments import Attachments
from weft.cluster import Cluster
from weft.dataplane import Fdb, KernelEvent, Link, News, Row, RowEvent, pack_mac
from weft.driver import Driver, EndpointRequest
from weft.identity import LocalHost, host_id
from weft.ipam import LOCAL_SPACE, Ipam, PoolId
from weft.kernel import LinuxKernel
from weft.model import Binding, Host, IPNetwork, PoolClaim
from weft.networks import Networks
from weft.reconcile import Create, ObservedLink, Remove, RowPlan, Step
from weft.store import Put, Store
from weft.store.etcd import EtcdStore

_PROCESSES = 2
_CREATORS = 10
_PORT = 4789
_PATIENCE = 60.0
_IDLE = 4.0
_FIRST = IPv4Address("10.80.0.0")


class Arrivals:
    """When which MAC got its forwarding entry on one host."""

    def __init__(self) -> None:
        self.moments: dict[bytes, float] = {}
        self._changed = threading.Condition()

    def add(self, rows: Iterable[Row]) -> None:
        now = monotonic()
        with self._changed:
            self.moments.update((row.mac, now) for row in rows if isinstance(row, Fdb))
            self._changed.notify_all()

    def wait(self, macs: set[bytes]) -> dict[bytes, float]:
        """Those of these MACs; an empty set means any."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.moments and macs <= self.moments.keys(), _PATIENCE):
                raise SystemExit(f"a host got {len(macs & self.moments.keys())} of {len(macs)} endpoints")
            return {mac: self.moments[mac] for mac in macs}


class LightKernel:
    """A data plane that takes everything at once. See `reconcile.Kernel`."""

    def __init__(self) -> None:
        self.arrivals = Arrivals()
        self._links: dict[str, Link] = {}
        self._rows: set[Row] = set()
        self._closed = threading.Event()

    def check(self) -> None: ...

    def observe_links(self, names: Iterable[str] | None = None) -> dict[str, ObservedLink]:
        wanted = self._links.keys() if names is None else names
        return {name: ObservedLink(self._links[name]) for name in wanted if name in self._links}

    def perform(self, step: Step) -> None:
        if isinstance(step, Remove):
            self._links.pop(step.name, None)
        elif isinstance(step, Create):
            self._links[step.link.name] = step.link

    def has_links(self, names: Iterable[str]) -> bool:
        return all(name in self._links for name in names)

    def observe_rows(self, devices: Iterable[str]) -> set[Row]:
        return set(self._rows)

    def write_rows(self, plan: RowPlan) -> None:
        self._rows.update(plan.put)
        self._rows.difference_update(plan.delete)
        self.arrivals.add(plan.put)

    def routes(self) -> list[IPNetwork]:
        return []

    def has_free_port(self, address: str, port: int) -> bool:
        return True

    def underlay_mtu(self, address: str, towards: Iterable[str] = ()) -> int:
        return 1500

    def monitor(self, news: News) -> "LightKernel":
        return self

    def __iter__(self) -> Iterator[KernelEvent]:
        self._closed.wait()
        yield from ()

    def close(self) -> None:
        self._closed.set()


def serve_hosts(endpoints: list[str], connection: Connection) -> None:
    """A process of simulated hosts: takes lists of hosts to start, and sets of MACs to wait for."""
    kernels: list[LightKernel] = []
    while True:
        asked = connection.recv()
        if isinstance(asked, list):
            for host in asked:
                kernel, store = LightKernel(), EtcdStore(endpoints)
                me = LocalHost(host)
                cluster = Cluster()
                attachments = Attachments(kernel, cluster, me, port=_PORT)
                Agent(store, cluster, kernel, me, attachments, monitor=kernel.monitor, resync=3600).start()
                kernels.append(kernel)
            asked = set()
        connection.send(([kernel.arrivals.wait(asked) for kernel in kernels], process_time()))


class Crowd:
    """All hosts, in a few processes."""

    def __init__(self, endpoints: list[str]) -> None:
        self._connections: list[Connection] = []
        spawn = get_context("spawn")
        for _ in range(_PROCESSES):
            ours, theirs = spawn.Pipe()
            spawn.Process(target=serve_hosts, args=(endpoints, theirs), daemon=True).start()
            self._connections.append(ours)

    def start(self, hosts: list[Host]) -> None:
        """Returns when all have the network."""
        for number, connection in enumerate(self._connections):
            connection.send(hosts[number::_PROCESSES])
        self._answers()

    def wait(self, macs: set[bytes]) -> tuple[list[dict[bytes, float]], float]:
        """When each host got each MAC, and the seconds of a processor that all used so far."""
        for connection in self._connections:
            connection.send(macs)
        answers = self._answers()
        return [host for hosts, _ in answers for host in hosts], sum(seconds for _, seconds in answers)

    def _answers(self) -> list[Any]:
        return [connection.recv() for connection in self._connections]


def main(folder: Path, size: int, rate: float, samples: int, stages: list[int]) -> list[dict[str, Any]]:
    population = Population(size, max(stages) + _CREATORS)
    peers = population.peers()
    with ExitStack() as resources:
        etcd = Etcd(folder, options=ETCD_OPTIONS)
        resources.callback(etcd.kill)
        store = resources.enter_context(closing(EtcdStore(etcd.endpoints)))
        fill(store, population, host_id(STATE), batch=ETCD_BATCH)
        store.transact([], list(_for_drivers(population, peers[-_CREATORS:])))
        drivers = [_driver(store, host) for host in peers[-_CREATORS:]]
        Serving(etcd.endpoints[0].replace("http", "etcd")).await_sync(population)
        real = resources.enter_context(_real_arrivals())
        crowd = Crowd(etcd.endpoints)
        found = []
        for before, hosts in zip([0, *stages], stages, strict=False):
            began = monotonic()
            crowd.start(peers[before:hosts])
            started = monotonic() - began
            sleep(1)
            stage = _Stage(etcd.endpoints[0], population, crowd, real, drivers)
            found.append({"hosts": hosts, "start_s": started, **stage.run(rate, samples, hosts)})
        return found


class _Stage:
    def __init__(
        self, etcd: str, population: Population, crowd: Crowd, real: Arrivals, drivers: list[tuple[Driver, Ipam]]
    ) -> None:
        self._etcd = etcd
        self._population = population
        self._crowd = crowd
        self._real = real
        self._drivers = drivers

    def run(self, rate: float, samples: int, offset: int) -> dict[str, Any]:
        rest = Load.of(self._etcd)
        sleep(_IDLE)
        before = Load.of(self._etcd)
        _, used = self._crowd.wait(set())
        began: dict[bytes, float] = {}
        start = monotonic()
        for number in range(samples):
            sleep(max(0.0, start + number / rate - monotonic()))
            mac, moment = self._create(number, IPv4Address(_FIRST + (offset << 12) + number + 1))
            began[mac] = moment
        hosts, used_then = self._crowd.wait(set(began))
        real = self._real.wait(set(began))
        seconds, after = monotonic() - start, Load.of(self._etcd)
        delays = {mac: [(host[mac] - moment) * 1000 for host in hosts] for mac, moment in began.items()}
        return {
            "each_ms": [delay for one in delays.values() for delay in one],
            "all_ms": [max(one) for one in delays.values()],
            "real_ms": [(real[mac] - moment) * 1000 for mac, moment in began.items()],
            "rate": samples / seconds,
            "host_cpu_ms": (used_then - used) * 1000 / samples / len(hosts),
            "etcd_cpu_ms": (after.cpu - before.cpu) * 1000 / samples,
            "sent_kb": (after.sent - before.sent) / 1000 / samples,
            "writes_per_s": (after.writes - before.writes) / seconds,
            "round_trips_per_s": (after.round_trips - before.round_trips) / seconds,
            "idle_round_trips_per_s": (before.round_trips - rest.round_trips) / _IDLE,
            "watches": after.watches,
            "etcd_mb": after.memory,
        }

    def _create(self, number: int, address: IPv4Address) -> tuple[bytes, float]:
        """An endpoint on the next host; returns its MAC and when it was asked for."""
        driver, ipam = self._drivers[number % len(self._drivers)]
        ipam.request_address(_pool_id(self._population), address)
        request = EndpointRequest("b" * 64, f"{int(address):012x}".ljust(64, "0"), (str(address),), "")
        moment = monotonic()
        return pack_mac(driver.create_endpoint(request).mac), moment


def _for_drivers(population: Population, hosts: Iterable[Host]) -> Iterator[Put]:
    """What the drivers of these hosts need besides what agents do."""
    network = population.network()
    claim = PoolClaim(network.pools[0].cidr, VNI, network.pools[0].gateway)
    binding = Binding(VNI, "b" * 64)
    yield Put(claim.key, claim.encode())
    yield from (Put(binding.key(host.id), binding.encode()) for host in hosts)


def _driver(store: Store, host: Host) -> tuple[Driver, Ipam]:
    ipam = Ipam(store, host.id, ranges=(), host_routes=list)
    cluster = Cluster()
    attachments = Attachments(LightKernel(), cluster, LocalHost(host), port=_PORT)
    parts = store, host, ipam, attachments, cluster
    return Driver(*parts, Networks(*parts)), ipam


def _pool_id(population: Population) -> PoolId:
    return PoolId.parse(f"{LOCAL_SPACE}/{population.network().pools[0].cidr}")


@contextmanager
def _real_arrivals() -> Iterator[Arrivals]:
    """Those of `weft serve`."""
    arrivals, kernel = Arrivals(), LinuxKernel(RUN)
    kernel.open()
    with closing(kernel), closing(kernel.monitor()) as monitor:

        def follow() -> None:
            for event in monitor:
                if isinstance(event, RowEvent) and event.present:
                    arrivals.add([event.row])

        threading.Thread(target=follow, daemon=True).start()
        yield arrivals


if __name__ == "__main__":
    size, rate, samples, *stages = map(int, sys.argv[2:])
    print(json.dumps(main(Path(sys.argv[1]), size, rate, samples, stages)))
