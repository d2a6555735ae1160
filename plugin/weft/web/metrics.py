"""What Prometheus is told of this host's weft. `FAMILIES` lists all of it.

Nearly everything is read when somebody asks, from memory, and from the same parts as `weft status`. Only what is over
by then is counted as it happens: calls of the engine, requests to the store, questions for names.

A cluster may have a thousand hosts that all tell their metrics, so each tells what is its own: of the networks and
pools that it uses, and of the peers that it measures. Of peers and networks it names the first fifty, faulty ones
before others, and sums up the rest: a host has some hundred series, however large the cluster is.
"""

from __future__ import annotations

import platform
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_network
from itertools import islice
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from weft import __version__
from weft.cluster import Cluster
from weft.errors import WeftError
from weft.ipam import usable_bounds
from weft.model import Network
from weft.probes.links import ProbeLink, merge
from weft.status import Status, host_name

MOST = 50
"""Peers, and networks, that have series of their own."""
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: `kind` is counter, gauge, histogram or summary."""

    name: str
    kind: str
    labels: Labels
    help: str


_CALLS = Family("weft_call_duration_seconds", "histogram", ("call",), "calls of the Docker Engine, and their time")
_CALL_FAILURES = Family("weft_call_failures_total", "counter", ("call", "reason"), "calls refused, or that met a bug")
_STORE = Family(
    "weft_store_request_duration_seconds", "histogram", ("request",), "requests to the store, and their time"
)
_STORE_FAILURES = Family(
    "weft_store_request_failures_total", "counter", ("request",), "requests that the store refused"
)
_QUESTIONS = Family(
    "weft_dns_questions_total", "counter", ("outcome",), "questions for names: answered, refused (not ours), or bad"
)

_BUILD = Family("weft_build_info", "gauge", ("version", "python", "driver"), "1, with what runs as labels")
_HOST = Family("weft_host_info", "gauge", ("host", "id", "underlay"), "1, with who this host is as labels")
_PROBLEMS = Family("weft_problems", "gauge", ("kind",), "what /healthz counts: stuck parts, and what hinders this host")
_HOSTS = Family("weft_hosts", "gauge", ("state",), "hosts of the cluster: alive, or silent")
_NETWORKS = Family("weft_networks", "gauge", (), "networks of the cluster")
_ENDPOINTS = Family("weft_endpoints", "gauge", (), "endpoints of the cluster")
_STORE_UP = Family("weft_store_up", "gauge", (), "1 if the store took this host's last sign of life")
_ENGINE_UP = Family(
    "weft_engine_up", "gauge", (), "1 if the Docker API can be followed; not there with WEFT_DOCKER=off"
)
_CONFLICTS = Family("weft_conflicts", "gauge", (), "networks of Docker that contradict the cluster's")
_DNS_UP = Family("weft_dns_up", "gauge", (), "1 if names are answered; not there with WEFT_DNS=off")
_ENCRYPTION_UP = Family("weft_encryption_up", "gauge", (), "0 if encrypted networks do not work here")

_WORK = Family(
    "weft_reconcile_duration_seconds", "summary", ("kind",), "comparing kernel and store: all (resync), or changes"
)
_RESYNCED = Family("weft_last_resync_timestamp_seconds", "gauge", (), "when everything was last compared")
_FAILING = Family("weft_reconcile_failing", "gauge", (), "1 if the kernel refused part of the last work")
_STEPS = Family(
    "weft_reconcile_steps_total", "counter", ("step",), "done to links (create, update, remove) and rows (put, delete)"
)
_REPAIRED = Family("weft_drift_repaired_total", "counter", (), "links and rows that somebody else had changed")
_LOSSES = Family("weft_kernel_event_losses_total", "counter", (), "times that kernel events were dropped")

_NETWORK_LABELS = ("network", "vni")
_NETWORK_ENDPOINTS = Family(
    "weft_network_endpoints", "gauge", (*_NETWORK_LABELS, "where"), "endpoints of a network used here: local, or remote"
)
_NETWORK_ROWS = Family(
    "weft_network_rows", "gauge", _NETWORK_LABELS, "FDB and neighbour entries of a network used here"
)
_POOL_SIZE = Family("weft_pool_size_addresses", "gauge", (*_NETWORK_LABELS, "pool"), "addresses that a pool has")
_POOL_USED = Family(
    "weft_pool_used_addresses", "gauge", (*_NETWORK_LABELS, "pool"), "of them, those of endpoints and gateways"
)

_LINKS = Family("weft_links", "gauge", ("kind", "state"), "ways to and from other hosts: sound, faulty, or unknown")
_LINK_LABELS = ("peer", "kind", "direction")
_LINK_LOSS = Family(
    "weft_link_loss_ratio", "gauge", (*_LINK_LABELS, "probe"), "lost probes, 0 to 1: small, full or offloaded ones"
)
_LINK_RTT = Family("weft_link_rtt_seconds", "gauge", _LINK_LABELS, "round trip of a probe")
_LINK_MTU = Family("weft_link_mtu_bytes", "gauge", _LINK_LABELS, "largest inner packet that passed")
_LINK_CORRUPT = Family(
    "weft_link_corrupt_probes", "gauge", _LINK_LABELS, "probes that arrived damaged, of the last ones"
)

_WG_PEERS = Family("weft_wireguard_peers", "gauge", (), "hosts that encrypted packets go to")
_WG_HANDSHAKE = Family(
    "weft_wireguard_last_handshake_timestamp_seconds",
    "gauge",
    ("peer",),
    "the last handshake; not there before the first",
)
_WG_RECEIVED = Family("weft_wireguard_received_bytes_total", "counter", ("peer",), "encrypted bytes from a host")
_WG_SENT = Family("weft_wireguard_sent_bytes_total", "counter", ("peer",), "encrypted bytes to a host")

COUNTED = (_CALLS, _CALL_FAILURES, _STORE, _STORE_FAILURES, _QUESTIONS)
READ = (
    *(_BUILD, _HOST, _PROBLEMS, _HOSTS, _NETWORKS, _ENDPOINTS),
    *(_STORE_UP, _ENGINE_UP, _CONFLICTS, _DNS_UP, _ENCRYPTION_UP),
    *(_WORK, _RESYNCED, _FAILING, _STEPS, _REPAIRED, _LOSSES),
    *(_NETWORK_ENDPOINTS, _NETWORK_ROWS, _POOL_SIZE, _POOL_USED),
    *(_LINKS, _LINK_LOSS, _LINK_RTT, _LINK_MTU, _LINK_CORRUPT),
    *(_WG_PEERS, _WG_HANDSHAKE, _WG_RECEIVED, _WG_SENT),
)
FAMILIES = (*COUNTED, *READ)
"""All but the process's own (`process_…`), which prometheus_client adds."""

_OTHERS = "(others)"
"""The label of what has no series of its own."""


class Metrics:
    """Counts from the beginning; `watch` adds what is read when somebody asks. Any thread may call.

    :param reuse: seconds for which an answer serves everybody, so that many who ask cost no more than one.
    """

    def __init__(self, reuse: float = 1.0) -> None:
        self._reuse = reuse
        self._lock = threading.Lock()
        self._text = b""
        self._until = 0.0
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._calls = self._histogram(_CALLS)
        self._call_failures = self._counter(_CALL_FAILURES)
        self._store = self._histogram(_STORE)
        self._store_failures = self._counter(_STORE_FAILURES)
        self._questions = self._counter(_QUESTIONS)
        self._by_outcome: dict[str, Counter] = {}

    def watch(self, status: Status, links: Callable[[], Iterable[ProbeLink]]) -> None:
        """:param links: what this host has measured lately, at once; may raise `WeftError`."""
        self._registry.register(_View(status, links))

    def note_call(self, call: str, seconds: float, failure: str) -> None:
        """:param failure: `refused`, `bug` or "", each of which, and each call, has a series of its own."""
        self._calls.labels(call).observe(seconds)
        if failure:
            self._call_failures.labels(call, failure).inc()

    def note_request(self, request: str, seconds: float, failed: bool) -> None:
        """A request to the store."""
        self._store.labels(request).observe(seconds)
        if failed:
            self._store_failures.labels(request).inc()

    def note_question(self, outcome: str) -> None:
        """A question for a name."""
        if (counter := self._by_outcome.get(outcome)) is None:  # labels() takes longer than the answer
            counter = self._by_outcome[outcome] = self._questions.labels(outcome)
        counter.inc()

    def expose(self) -> bytes:
        """All metrics, as Prometheus reads them (text format 0.0.4)."""
        with self._lock:
            if monotonic() >= self._until:
                self._text = generate_latest(self._registry)
                self._until = monotonic() + self._reuse
            return self._text

    def _histogram(self, family: Family) -> Histogram:
        return Histogram(family.name, family.help, family.labels, buckets=_BUCKETS, registry=self._registry)

    def _counter(self, family: Family) -> Counter:
        return Counter(family.name, family.help, family.labels, registry=self._registry)


@dataclass(frozen=True, slots=True, eq=False)
class _View(Collector):
    """What is read when somebody asks. What cannot be read is left out."""

    status: Status
    links: Callable[[], Iterable[ProbeLink]]

    def collect(self) -> Iterator[Metric]:
        yield from self._cluster()
        yield from self._parts()
        yield from self._agent()
        yield from self._networks()
        with suppress(WeftError):
            yield from self._links()
        with suppress(WeftError):
            yield from self._wireguard()

    def _cluster(self) -> Iterator[Metric]:
        cluster, me = self.status.cluster, self.status.me.host
        yield _metric(_BUILD, [((__version__, platform.python_version(), self.status.driver), 1)])
        yield _metric(_HOST, [((me.name, me.id, me.underlay), 1)])
        alive = len(cluster.alive & cluster.hosts.keys())
        yield _metric(_HOSTS, [(("alive",), alive), (("silent",), len(cluster.hosts) - alive)])
        yield _one(_NETWORKS, len(cluster.networks))
        yield _one(_ENDPOINTS, sum(map(len, list(cluster.endpoints.values()))))

    def _parts(self) -> Iterator[Metric]:
        status, health = self.status, self.status.health
        counts = {"stuck": health.stuck(), "hindered": health.hindered()}
        yield _metric(_PROBLEMS, [((kind,), len(list(found))) for kind, found in counts.items()])
        yield _one(_STORE_UP, not status.presence.problem)
        if status.sweeper:
            yield _one(_ENGINE_UP, not status.sweeper.problem)
            yield _one(_CONFLICTS, len(status.sweeper.conflicts))
        if status.names and status.resolver:
            yield _one(_DNS_UP, status.names.answers)
        yield _one(_ENCRYPTION_UP, not status.encryption.problem)

    def _agent(self) -> Iterator[Metric]:
        agent = self.status.agent
        work = SummaryMetricFamily(_WORK.name, _WORK.help, labels=_WORK.labels)
        for kind, (times, seconds) in list(agent.work.items()):
            work.add_metric([kind], times, seconds)
        yield work
        if agent.resynced:
            yield _one(_RESYNCED, agent.resynced)
        yield _one(_FAILING, bool(agent.problem))
        steps = {**agent.links.steps, **agent.rows.steps}
        yield _metric(_STEPS, [((step,), count) for step, count in steps.items()])
        yield _one(_REPAIRED, agent.repaired)
        yield _one(_LOSSES, agent.losses)

    def _networks(self) -> Iterator[Metric]:
        """Of the networks that this host uses. The largest have series of their own; the others are added up."""
        cluster, me = self.status.cluster, self.status.me.id
        rows = self.status.agent.rows.counts
        used = [cluster.networks[vni] for vni in rows if vni in cluster.networks]
        used.sort(key=lambda network: (-len(cluster.endpoints.get(network.vni, ())), network.vni))
        named = {network.vni: (network.name, str(network.vni)) for network in used[:MOST]}
        labels = defaultdict(lambda: (_OTHERS, ""), named)
        local = {network.vni: len(cluster.local_endpoints(network.vni, me)) for network in used}
        remote = {vni: len(cluster.endpoints.get(vni, ())) - count for vni, count in local.items()}
        counts = {"local": local, "remote": remote}
        yield _metric(
            _NETWORK_ENDPOINTS,
            [((*labels[vni], where), count) for where, of in counts.items() for vni, count in of.items()],
        )
        yield _metric(_NETWORK_ROWS, [(labels[network.vni], rows[network.vni]) for network in used])
        pools = [(labels[network.vni], pool) for network in used[:MOST] for pool in pool_use(cluster, network)]
        yield _metric(_POOL_SIZE, [((*of, cidr), size) for of, (cidr, size, _) in pools])
        yield _metric(_POOL_USED, [((*of, cidr), used) for of, (cidr, _, used) in pools])

    def _links(self) -> Iterator[Metric]:
        me = self.status.me.id
        ours = merge(link for link in self.links() if me in (link.sender, link.receiver))
        yield _metric(_LINKS, [((link.kind, _state(link)), 1) for link in ours])
        shown = list(islice(self._named(ours), 4 * MOST))  # two directions, two kinds
        losses = ("small", "full", "offloaded")
        yield _metric(_LINK_LOSS, [((*of, probe), getattr(link, probe)) for of, link in shown for probe in losses])
        yield _metric(_LINK_RTT, [(of, link.rtt) for of, link in shown])
        yield _metric(_LINK_MTU, [(of, link.mtu) for of, link in shown])
        yield _metric(_LINK_CORRUPT, [(of, link.corrupt) for of, link in shown])

    def _named(self, links: Iterable[ProbeLink]) -> Iterator[tuple[Labels, ProbeLink]]:
        """Links with their labels, faulty ones first."""
        me, name = self.status.me.id, partial(host_name, self.status.cluster)
        named = []
        for link in links:
            peer, direction = (link.receiver, "out") if link.sender == me else (link.sender, "in")
            named.append(((name(peer), link.kind, direction), link))
        yield from sorted(named, key=lambda one: (not one[1].faulty, one[0]))

    def _wireguard(self) -> Iterator[Metric]:
        tunnel = self.status.encryption.observe()
        if tunnel is None:
            return
        hosts = {host.wg_key: host.name for host in list(self.status.cluster.hosts.values())}
        peers = sorted((hosts.get(key, key), contact) for key, contact in tunnel.contacts.items())
        named = [(name if number < MOST else _OTHERS, contact) for number, (name, contact) in enumerate(peers)]
        yield _one(_WG_PEERS, len(peers))
        greeted = [((name,), contact.handshake) for name, contact in named[:MOST] if contact.handshake]
        yield _metric(_WG_HANDSHAKE, greeted)
        yield _metric(_WG_RECEIVED, [((name,), contact.received) for name, contact in named])
        yield _metric(_WG_SENT, [((name,), contact.sent) for name, contact in named])


def pool_use(cluster: Cluster, network: Network) -> Iterator[tuple[str, int, int]]:
    """The pools of a network: CIDR, how many addresses containers can have of it, and how many are taken.

    Counted by the endpoints in memory: the store would have to list every address.
    """
    endpoints = list(cluster.endpoints.get(network.vni, {}).values())
    for pool in network.pools:
        net = ip_network(pool.cidr)
        rivals = [other for other in network.pools if (":" in other.cidr) == (net.version == 6)]
        addresses = (address for endpoint in endpoints for address in endpoint.addresses)
        if len(rivals) == 1:
            used = sum((":" in address) == (net.version == 6) for address in addresses)
        else:
            used = sum(network.cidr_of(address) == pool.cidr for address in addresses)
        first, last = usable_bounds(net)
        yield pool.cidr, last - first + 1, used + bool(pool.gateway) + len(pool.auxiliary)


def _state(link: ProbeLink) -> str:
    return "faulty" if link.faulty else "unknown" if link.small is None else "sound"


def _metric(family: Family, rows: Iterable[tuple[Labels, float | None]]) -> Metric:
    """What is not known (None) is left out; values of equal labels are added up."""
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = make(family.name, family.help, labels=family.labels)
    sums: dict[Labels, float] = defaultdict(float)
    for labels, value in rows:
        if value is not None:
            sums[labels] += value
    for labels, value in sums.items():
        metric.add_metric(labels, value)
    return metric


def _one(family: Family, value: float) -> Metric:
    return _metric(family, [((), value)])
