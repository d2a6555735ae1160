"""Part e: from CreateEndpoint on one host to the rows in the other's kernel, by store; and what a start asks of etcd.

We are the engine of the first host and call weft through its socket. Kernel events in the other host's data plane and a
watch of our own on the store tell when what has arrived. All have one clock, and nothing else goes on.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, mode
from time import monotonic, sleep
from typing import Self

from bench.engine import Engine
from bench.load import Load
from bench.measure import Results
from bench.metrics import WEFT
from bench.rig import VNI, Rig
from lab.host import DATAPLANE, PLUGIN_SOCKET
from lab.process import LabError
from lab.terminal import Terminal
from tests.etcd import Cluster, Place
from weft.dataplane import Fdb, Neighbour, Row, RowEvent, Station, bridge_name, pack_address, pack_mac, vxlan_name
from weft.driver import mac_of
from weft.kernel.monitor import Monitor, open_events
from weft.kernel.namespace import NamespaceThread, open_namespace
from weft.kernel.netlink import Rtnetlink, open_socket
from weft.store import Changes, Put, Store
from weft.store.etcd import EtcdStore
from weft.store.sqlite import SqliteStore

STORES = {"sqlite": "SQLite", "etcd1": "etcd, 1 member", "etcd3": "etcd, 3 members"}
STEPS = {
    "committed": "for comparison, from a bare transaction to its answer",
    "told": "… and to its event at a watch",
    "stored": "the endpoint at that watch",
    "forwarding": "its entry in the other kernel",
    "rows": "all its rows there",
    "answered": "the answer to the engine",
}
AT_START, AT_END = "docker run", "docker rm --force"

_PATIENCE = 10.0
_SETTLE = 0.02
_IDLE = 4.0
_RECEIVE_BUFFER = 1 << 20
_ADDRESSES = 150

Token = str | Row


@dataclass
class Convergence:
    """What does not fit into one figure per metric: milliseconds by store and step, and requests to etcd by call."""

    milliseconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    requests: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How often: endpoints, calls that are counted, containers that are started."""

    samples: int
    calls: int
    starts: int


def measure(rig: Rig, results: Results, found: Convergence, terminal: Terminal, effort: Effort) -> None:
    with _thread_in(Path(f"/proc/{rig.lab.underlay.pid}/ns/net")) as switch, ExitStack() as stores:
        for name, title in STORES.items():
            with terminal.step(f"both hosts, with {title}"):
                if name != "sqlite":
                    rig.empty()
                    stores.close()  # the next one serves at the same address
                etcd = stores.enter_context(_etcd(rig, switch, int(name[-1]))) if name != "sqlite" else None
                store = EtcdStore(etcd.endpoints) if etcd else SqliteStore(rig.lab.plan.data / "store.db")
                if etcd:
                    rig.change_store(",".join(etcd.endpoints).replace("http://", "etcd://", 1).replace("http://", ""))
            with terminal.step(f"convergence with {title}, {effort.samples} endpoints"):
                found.milliseconds[name] = _sample(rig, store, switch, effort.samples)
            for metric, step in (("converge", "forwarding"), ("transaction", "committed")):
                for milliseconds in found.milliseconds[name][step]:
                    results.add(f"{metric}_{name}_ms", WEFT, milliseconds)
            if etcd and name == "etcd1":
                with terminal.step("requests to etcd"):
                    load = partial(switch.run, partial(Load.of, etcd.endpoints[0]))
                    found.requests = _count_calls(rig, load, effort.calls) | _count_starts(rig, load, effort.starts)


def _sample(rig: Rig, store: Store, switch: NamespaceThread, times: int) -> dict[str, list[float]]:
    with _Sampler(rig, store, switch) as sampler:
        samples = [sampler.transact(number) | sampler.create(number) for number in range(times)]
    return {step: [sample[step] for sample in samples] for step in STEPS}


class _Sampler:
    """Creates endpoints on the first host and waits for them on the second."""

    def __init__(self, rig: Rig, store: Store, switch: NamespaceThread) -> None:
        self._rig = rig
        self._switch = switch
        self._engine = _engine(rig)
        self._store = store
        self._watch = store.watch("")
        self._seen: queue.SimpleQueue[tuple[Token, bool, float]] = queue.SimpleQueue()
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            dataplane = resources.enter_context(_thread_in(self._rig.h2.root / DATAPLANE[1:]))
            opened = partial(dataplane.run, partial(open_socket, receive_buffer=_RECEIVE_BUFFER))
            find = resources.enter_context(closing(Rtnetlink(opened))).find
            monitor = resources.enter_context(closing(Monitor(dataplane.run(open_events), find)))
            threading.Thread(target=self._follow_kernel, args=[monitor], daemon=True).start()
            resources.enter_context(closing(self._watch))
            # A thread is born into the namespace of the one that starts it.
            self._switch.run(threading.Thread(target=self._follow_store, daemon=True).start)
            self._await({("snapshot", True)})
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def transact(self, number: int) -> dict[str, float]:
        """Milliseconds from a write of ours to its answer, and to its event."""
        name = f"sample{number}"
        began = monotonic()
        self._switch.run(partial(self._store.transact, [], [Put(f"bench/{name}", "")]))
        committed = monotonic()
        told = self._await({(name, True)})[name]
        return {"committed": (committed - began) * 1000, "told": (told - began) * 1000}

    def create(self, number: int) -> dict[str, float]:
        """Milliseconds from the engine's call to each step."""
        address = self._engine.request_address(self._rig.address(WEFT, number % _ADDRESSES))
        forwarding, *others = self._rows(address)
        began = monotonic()
        endpoint = self._engine.create_endpoint(address)
        answered = monotonic()
        seen = self._await({(endpoint, True), (forwarding, True), *((row, True) for row in others)})
        self._engine.delete_endpoint(endpoint)
        self._engine.release_address(address)
        self._await({(forwarding, False)})
        sleep(_SETTLE)  # the last thing that both agents do
        moments = {
            "stored": seen[endpoint],
            "forwarding": seen[forwarding],
            "rows": max(seen[row] for row in (forwarding, *others)),
            "answered": answered,
        }
        return {step: (moment - began) * 1000 for step, moment in moments.items()}

    def _rows(self, address: str) -> tuple[Row, Row, Row]:
        """What the second host will have."""
        bridge, tunnel, mac = bridge_name(VNI), vxlan_name(VNI), pack_mac(mac_of(address))
        vtep = pack_address(self._rig.h1.address)
        return Fdb(tunnel, mac, vtep), Station(tunnel, mac), Neighbour(bridge, pack_address(address), mac)

    def _await(self, wanted: set[tuple[Token, bool]]) -> dict[Token, float]:
        """When each of these came or went."""
        seen: dict[Token, float] = {}
        while wanted:
            try:
                token, present, moment = self._seen.get(timeout=_PATIENCE)
            except queue.Empty:
                raise LabError(f"not within {_PATIENCE:g} s: {', '.join(str(token) for token, _ in wanted)}") from None
            if (token, present) in wanted:
                wanted.remove((token, present))
                seen[token] = moment
        return seen

    def _follow_kernel(self, monitor: Monitor) -> None:
        for event in monitor:
            if isinstance(event, RowEvent):
                self._seen.put((event.row, event.present, monotonic()))

    def _follow_store(self) -> None:
        for news in self._watch:
            moment = monotonic()
            if isinstance(news, Changes):
                for key, value in news.events:
                    self._seen.put((key.rpartition("/")[2], value is not None, moment))
            else:
                self._seen.put(("snapshot", True, moment))


def _count_calls(rig: Rig, load: Callable[[], Load], times: int) -> dict[str, float]:
    """Round trips of each call; what most of the times show, since somebody's heartbeat may fall into one."""
    engine = _engine(rig)
    counted: dict[str, list[float]] = {}

    def count(name: str, call: Callable[[], str | None]) -> str:
        before = load().round_trips
        answer = call()
        counted.setdefault(name, []).append(load().round_trips - before)
        return answer or ""

    for _ in range(times):
        address = count("RequestAddress", engine.request_address)
        endpoint = count("CreateEndpoint", partial(engine.create_endpoint, address))
        count("Join", partial(engine.join, endpoint))
        count("DeleteEndpoint", partial(engine.delete_endpoint, endpoint))
        count("ReleaseAddress", partial(engine.release_address, address))
    return {name: mode(counts) for name, counts in counted.items()}


def _count_starts(rig: Rig, load: Callable[[], Load], times: int) -> dict[str, float]:
    """Round trips of both hosts and their agents while a container is started or removed, but for heartbeats."""
    before = load()
    sleep(_IDLE)
    heartbeats = (load().round_trips - before.round_trips) / _IDLE
    counted: dict[str, list[float]] = {AT_START: [], AT_END: []}

    def count(name: str, work: Callable[[], str | None]) -> str:
        before, began = load().round_trips, monotonic()
        answer = work()
        sleep(_SETTLE)
        counted[name].append(load().round_trips - before - heartbeats * (monotonic() - began))
        return answer or ""

    for _ in range(times):
        container = count(AT_START, partial(rig.start, WEFT))
        count(AT_END, partial(rig.remove, container))
    return {name: median(counts) for name, counts in counted.items()} | {"heartbeats per second": heartbeats}


def _engine(rig: Rig) -> Engine:
    return Engine(rig.h1.root / PLUGIN_SOCKET[1:], rig.network_id(WEFT, rig.h1), rig.subnet(WEFT))


@contextmanager
def _thread_in(namespace: Path) -> Iterator[NamespaceThread]:
    fd = open_namespace(namespace)
    with open(fd, "rb"), closing(NamespaceThread("bench", fd)) as thread:
        yield thread


@contextmanager
def _etcd(rig: Rig, switch: NamespaceThread, members: int) -> Iterator[Cluster]:
    """The first member in the switch, further ones on the hosts; all on the machine's disk."""
    with_us = ("setpriv", "--pdeathsig", "KILL")  # what we end is nsenter
    switch_place = Place(rig.lab.plan.gateway, (*rig.lab.underlay.enter([]), *with_us))
    host_places = [Place(host.address, (*host.enter([]), *with_us)) for host in (rig.h1, rig.h2)]
    places = [switch_place, *host_places][:members]
    folder = rig.lab.plan.data / f"etcd{members}"
    etcd = switch.run(lambda: Cluster(folder, places=places, options=["--log-level=error"]))
    try:
        yield etcd
    finally:
        etcd.kill()
