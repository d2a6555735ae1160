"""The composition root of `weft serve`: settings -> adapters -> driver, agent, app."""

from __future__ import annotations

import gc
import logging
import platform
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from time import monotonic

from flask import Flask

from weft import __version__, cli, config, topology
from weft.admin import Parts, create_admin
from weft.agent import Agent
from weft.api import create_app
from weft.attachments import Attachments
from weft.cluster import Cluster
from weft.config import Settings
from weft.doctor import checkup
from weft.doctor.checkup import Checkup, Place
from weft.doctor.examination import Doctor
from weft.driver import Driver
from weft.encryption import Encryption
from weft.engine.adoption import MARGIN_SECONDS, Adoption
from weft.engine.client import DockerEngine
from weft.engine.collector import Collector
from weft.engine.mirror import Mirror
from weft.engine.restarts import Restarts
from weft.engine.sweeper import Sweep, Sweeper
from weft.errors import ConfigError, KernelError, StoreError
from weft.foreign import Foreign
from weft.garbage import Garbage
from weft.health import STUCK_SECONDS, Health
from weft.hosts import Hosts
from weft.identity import LocalHost, host_id, instance
from weft.ipam import Ipam
from weft.journal import Journal
from weft.kernel import Inspection, LinuxKernel
from weft.keys import KeyFile
from weft.model import ALIVE, HOSTS, SCHEMA_KEY, WIREGUARD_POOL, Host
from weft.names.sandboxes import ResolverRoutes
from weft.names.service import NameService
from weft.networks import Networks
from weft.presence import Presence
from weft.probes.measurements import Probes
from weft.probes.prober import Prober
from weft.serve import serve
from weft.snapshot import SnapshotFile
from weft.status import Status
from weft.store import Store
from weft.store.measured import MeasuredStore
from weft.store.opening import HANDLER_PATIENCE, open_store, open_stores, store_addresses
from weft.watchdog import Manager
from weft.web.listener import Listener, Streams, create_web
from weft.web.metrics import Metrics
from weft.web.page import Feed, create_page, parts_of

log = logging.getLogger("weft")

PATIENCE = 5.0
"""Background work may wait for an election whose first vote was split."""
NAME_SERVERS = "timeout:1 attempts:2"
"""For the C library, which waits for 5 s by default: a call to the store may have to look up names (resolv.conf(5))."""
_GARBAGE = 50_000
"""New objects after which Python looks for cycles, of which records and rows have none. The default is 700."""
_TURN_SECONDS = 0.001
"""A thread that computes, as the agent's does with a large network, lets another go on after so long. Which waits anew
after every system call: with the default, 0.005, each answer about a name would come so much later."""


@dataclass(slots=True)
class Weft:
    """All parts of one host's weft, running."""

    app: Flask
    stores: Sequence[Store]
    kernel: LinuxKernel
    inspection: Inspection
    agent: Agent
    presence: Presence
    sweeper: Sweeper | None
    names: NameService | None
    doctor: Doctor
    listener: Listener | None
    probes: Probes

    def stop(self) -> None:
        """Stop the control plane. The data plane stays."""
        if self.listener:
            self.listener.stop()
        self.doctor.stop()
        if self.names:
            self.names.stop()
        if self.sweeper:
            self.sweeper.stop()
        self.probes.stop()
        self.presence.stop()
        self.agent.stop()
        self.kernel.close()
        self.inspection.close()
        for store in self.stores:
            store.close()


def tune() -> None:
    """Set Python's dials for many records and a few threads."""
    gc.set_threshold(_GARBAGE)
    sys.setswitchinterval(_TURN_SECONDS)


def run(settings: Settings, manager: Manager) -> None:
    """Serve this host until told to stop."""
    serve(settings, manager, check=lambda: _check_store(settings), build=lambda: build(settings, manager))


def build(settings: Settings, manager: Manager) -> Weft:
    """Wire everything up and start it."""
    tune()
    journal = Journal()
    log.addHandler(journal)
    identity = host_id(settings.state)
    metrics = Metrics()
    stores = open_stores(settings, HANDLER_PATIENCE, PATIENCE)
    store, patient = (MeasuredStore(one, metrics.note_request) for one in stores)
    snapshot = _snapshot(settings)
    restored = snapshot.load()
    cluster = Cluster(identity)
    cluster.load(restored or [entry for kind in (HOSTS, ALIVE) for entry in patient.list(kind).entries], certain=False)
    _update(cluster, store, identity)
    kernel = LinuxKernel(settings.run)
    kernel.open()

    locate = partial(_underlay, settings, kernel, cluster, identity)
    before = cluster.hosts.get(identity)
    underlay = locate(before.underlay if before else "")
    me = LocalHost(
        Host(
            id=identity,
            name=settings.hostname,
            underlay=underlay,
            version=__version__,
            probes=True,
            wg_pool=str(settings.wg_pool or WIREGUARD_POOL),
        )
    )
    encryption = Encryption(
        kernel,
        cluster,
        me,
        KeyFile(settings.state / "wireguard.key"),
        port=settings.wg_port,
        refusal=settings.encryption_refusal,
        publish=lambda: presence.publish(),
        rotation=settings.key_rotation,
        occupied=kernel.route_within if settings.wg_pool else None,
    )
    encryption.resume(before or me.host)
    ipam = Ipam(store, me.id, ranges=settings.pools, host_routes=kernel.routes)
    attachments = Attachments(kernel, cluster, me, port=settings.port, resolver=settings.dns, encryption=encryption)
    networks = Networks(
        store, me.host, ipam, attachments, cluster, driver_name=settings.driver, mirror=settings.mirrors
    )
    driver = Driver(store, me.host, ipam, attachments, cluster, networks)
    agent = Agent(
        patient,
        cluster,
        kernel,
        me,
        attachments,
        monitor=kernel.monitor,
        resync=settings.resync,
        encryption=encryption,
        tunnel_monitor=kernel.tunnel_monitor,
        probes=True,
    )
    hosts = Hosts(patient, cluster, driver, ipam)
    inspection = Inspection(settings.run)
    presence = Presence(
        hosts,
        cluster,
        me,
        snapshot,
        instance=instance(),
        locate=locate,
        is_here=kernel.has_address,
        reached=lambda addresses: inspection.reached(addresses, me.host.underlay),
        measure=attachments.refresh_mtu,
        moved=agent.refresh,
        grace=settings.host_grace,
    )
    prober = Prober(
        cluster,
        me,
        size=lambda kind: attachments.limit(encrypted=kind == "encrypted").mtu,
        open_socket=kernel.open_probe,
    )
    probes = Probes(patient, cluster, me, prober, interval=settings.probe_interval)
    agent.listeners.append(probes.follow)
    engine = DockerEngine(settings.docker, settings.driver) if settings.docker != "off" else None
    sweeper = collector = names = None
    if engine:
        collector = Collector(patient, me.host, cluster, driver, ipam, grace=settings.gc_grace)
        sweeper = _sweeper(settings, patient, me.host, agent, driver, ipam, presence, collector, engine)
        names = NameService(
            patient,
            me.host,
            cluster,
            engine,
            kernel,
            address=settings.dns,
            sandboxes=settings.run.parent / "netns",
            note=metrics.note_question,
        )
    agent.listeners.append(journal.follow(cluster))
    attachments.refresh_mtu()
    presence.start(restored=bool(restored))
    _check_kernel(attachments)
    agent.start(restored=bool(restored))
    probes.start()
    if sweeper:
        sweeper.start()
    if names:
        names.start()
    log.info("weft %s serves host %s (%s) with VTEP %s", __version__, me.host.name, me.id[:12], me.host.underlay)
    routes = ResolverRoutes(cluster, me.id, settings.dns, settings.run / "routes")
    app = create_app(driver, ipam, presence, routes, scope=settings.scope, note_call=metrics.note_call)
    foreign = Foreign(patient, cluster)
    status = Status(
        me,
        cluster,
        agent,
        presence,
        encryption,
        Health(cluster, agent, presence, encryption),
        sweeper,
        names,
        driver=settings.driver,
        origin=settings.store,
        resolver=settings.dns if names else "",
        foreign=foreign,
    )
    garbage = Garbage(presence, sweeper, collector)
    daemon = checkup.of_daemon(settings, kernel, agent, presence, encryption, garbage, sweeper, names)
    looks = [*daemon, checkup.of_store(store), lambda: {"listener": status.unheard}]
    look = Checkup(settings, inspection, lambda: _place(cluster, me), looks)
    tunnel, port = encryption.observe, settings.port
    doctor = Doctor(patient, cluster, me, look, probes, tunnel=tunnel, foreign=foreign.look, port=port)
    agent.listeners.append(doctor.notice)
    doctor.start()
    parts = Parts(
        hosts,
        cluster,
        garbage,
        foreign,
        networks,
        me,
        encryption,
        agent,
        status,
        journal,
        probes,
        doctor,
        store,
        engine,
        mirrors=settings.mirrors,
        settings=config.view(settings),
    )
    app.register_blueprint(create_admin(parts))
    manager.watch(
        {
            "the driver's socket": lambda: cli.answers(settings.socket),
            "the agent": lambda: agent.responds(STUCK_SECONDS),
            "signs of life": lambda: monotonic() - presence.turned < STUCK_SECONDS,
        }
    )
    listener = None
    if settings.listen:
        feed = Feed(parts_of(status, journal, probes.links, doctor.latest), doctor.renew)
        agent.listeners.append(lambda _: feed.wake())
        metrics.watch(status, prober.links)
        status.listener = listener = Listener(_web(settings, status, metrics, feed), settings.listen)
        listener.start()
    return Weft(app, [store, patient], kernel, inspection, agent, presence, sweeper, names, doctor, listener, probes)


def _underlay(settings: Settings, kernel: LinuxKernel, cluster: Cluster, identity: str, present: str) -> str:
    """This host's VTEP address, found anew.

    :param present: the one that it has, which is kept as long as it fits; or "".
    """
    others = [host for host in list(cluster.hosts.values()) if host.id != identity]

    def asked(family: int) -> str:
        # The names of the store's members come last: to resolve them may take half a minute.
        towards = chain((host.underlay for host in others), store_addresses(settings))
        return kernel.underlay_address(settings.underlay, family=family, present=present, towards=towards)

    if settings.underlay_family:
        return asked(settings.underlay_family)
    with suppress(ConfigError):  # a host without an address of the others' family is refused by name
        return asked(topology.family([h for h in others if h.id in cluster.alive] or others))
    return asked(0)


def _web(settings: Settings, status: Status, metrics: Metrics, feed: Feed) -> Flask:
    """What answers about this host over HTTP."""
    names_of_host = {settings.hostname.lower(), platform.node().lower(), *settings.listen_names}
    web = create_web(status.health, metrics.expose, names_of_host)
    web.register_blueprint(create_page(feed, Streams().respond))
    return web


def _place(cluster: Cluster, me: LocalHost) -> Place:
    others = [host.underlay for host in list(cluster.hosts.values()) if host.id != me.id]
    named: dict[int, list[str]] = defaultdict(list)
    used = set()
    for network in list(cluster.networks.values()):
        if network.port and not network.encrypted:
            named[network.port].append(network.name or str(network.vni))
            used |= {network.port} if me.id in cluster.hosts_of(network.vni) else set()
    networks = {port: ", ".join(sorted(names)) for port, names in named.items()}
    return Place(me.host.underlay, others, bool(me.host.wg_key), networks, used)


def _update(cluster: Cluster, store: Store, identity: str) -> None:
    """This host's own record is newer in the store, if that answers, than in what was last known."""
    with suppress(StoreError):
        if entry := store.get(HOSTS + identity):
            cluster.apply([(entry.key, entry.value)])


def _sweeper(
    settings: Settings,
    store: Store,
    host: Host,
    agent: Agent,
    driver: Driver,
    ipam: Ipam,
    presence: Presence,
    collector: Collector,
    engine: DockerEngine,
) -> Sweeper:
    """What compares this host's Docker Engine with the store."""
    cluster = agent.cluster
    patience = 2 * settings.gc_grace + MARGIN_SECONDS  # twice: a collector looks after every half of its grace
    adoption = Adoption(store, host, cluster, driver, ipam, patience=patience)
    mirror = Mirror(store, host, cluster, driver.networks, engine, enabled=settings.mirrors)
    sweeps: list[Sweep] = [collector, adoption, mirror, Restarts(engine, presence, adoption)]

    def pruned() -> None:
        presence.finish("what was pruned", partial(driver.networks.spare_used, monotonic()))

    sweeper = Sweeper(engine, store, host, cluster, sweeps, pruned=pruned)
    agent.listeners.append(lambda touched: sweeper.wake() if mirror.concerns(touched) else None)
    return sweeper


def _check_kernel(attachments: Attachments) -> None:
    """Say at once what would otherwise come up with the first network; until then weft can do all else."""
    try:
        attachments.check()
    except KernelError as error:
        log.error("no network can be made on this host: %s", error)


def _check_store(settings: Settings) -> None:
    """Before the socket is there: `docker plugin enable` succeeds as soon as somebody listens."""
    if not _snapshot(settings).load():
        store = open_store(settings, patience=PATIENCE)
        store.get(SCHEMA_KEY)
        store.close()  # gunicorn forks, and nothing that is open may go along


def _snapshot(settings: Settings) -> SnapshotFile:
    return SnapshotFile(settings.state / "snapshot.json", settings.store_origin)
