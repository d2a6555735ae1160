"""The composition root: settings -> adapters -> driver, agent, app. `weft serve` runs it under gunicorn.

gunicorn forks one worker. Everything with a thread, a socket or a connection is made after that, in the worker; the
parent only holds the lock that keeps a second weft off this host, since two would fight over one kernel.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from socket import SOCK_STREAM, getaddrinfo
from typing import Any, NoReturn
from urllib.parse import urlsplit

from flask import Flask
from gunicorn.app.base import BaseApplication

from weft import __version__, cli, config, setup_dns
from weft.admin import create_admin
from weft.adoption import MARGIN_SECONDS, Adoption
from weft.agent import Agent
from weft.api import create_app
from weft.attachments import Attachments
from weft.cluster import Cluster
from weft.collector import Collector
from weft.config import SETTINGS, Settings
from weft.driver import Driver
from weft.encryption import Encryption
from weft.engine import DockerEngine
from weft.errors import ConfigError, KernelError, WeftError
from weft.garbage import Garbage
from weft.hosts import Hosts
from weft.identity import LocalHost, host_id, instance
from weft.ipam import Ipam
from weft.kernel import LinuxKernel
from weft.keys import KeyFile
from weft.mirror import Mirror
from weft.model import HOSTS, SCHEMA_KEY, Host
from weft.nameservice import NameService
from weft.presence import Presence
from weft.restarts import Restarts
from weft.sandboxes import ResolverRoutes
from weft.snapshot import SnapshotFile
from weft.store import Store
from weft.store.etcd import EtcdStore
from weft.store.gateway import Access
from weft.store.sqlite import SqliteStore
from weft.sweeper import Sweeper

log = logging.getLogger("weft")

HANDLER_PATIENCE = 1.3
"""Somebody waits for `docker run`: better a clear error soon."""
PATIENCE = 5.0
"""Background work may wait for an election whose first vote was split."""
GARBAGE = 50_000
"""New objects after which Python looks for cycles, of which records and rows have none. The default is 700."""
_THREADS = 32
"""Calls answered at once: the engine waits in parallel, and none of ours takes long."""
_LOCK_SECONDS = 10.0
"""A killed gunicorn's worker notices within two seconds and leaves."""
_BOOT_FAILED = 3
"""gunicorn's exit status for a worker that could not start: it does not try again (gunicorn arbiter.py)."""
_SAID = (f"exited with code {_BOOT_FAILED}.", "Shutting down: Master", "Worker failed to boot.")
"""Ends of what gunicorn then says, when the worker has already said why."""
_SOCKET_PATH_BYTES = 107
"""The most that fits into a sockaddr_un (unix(7))."""


@dataclass(slots=True)
class Weft:
    """All parts of one host's weft, running."""

    app: Flask
    stores: Sequence[Store]
    kernel: LinuxKernel
    agent: Agent
    presence: Presence
    sweeper: Sweeper | None
    names: NameService | None

    def stop(self) -> None:
        """Stop the control plane. The data plane stays."""
        if self.names:
            self.names.stop()
        if self.sweeper:
            self.sweeper.stop()
        self.presence.stop()
        self.agent.stop()
        self.kernel.close()
        for store in self.stores:
            store.close()


def build(settings: Settings) -> Weft:
    """Wire everything up and start it."""
    gc.set_threshold(GARBAGE)
    identity = host_id(settings.state)
    store, patient = open_store(settings), open_store(settings, patience=PATIENCE)
    snapshot = _snapshot(settings)
    restored = snapshot.load()
    cluster = Cluster()
    cluster.load(restored or patient.list(HOSTS).entries, certain=False)
    kernel = LinuxKernel(settings.run)
    kernel.open()

    def locate(present: str) -> str:
        others = (host.underlay for host in list(cluster.hosts.values()) if host.id != identity)
        towards = chain(others, store_addresses(settings))
        return kernel.underlay_address(settings.underlay, present=present, towards=towards)

    before = cluster.hosts.get(identity)
    underlay = locate(before.underlay if before else "")
    me = LocalHost(Host(id=identity, name=settings.hostname, underlay=underlay, version=__version__))
    if before:
        me.encrypt(before.wg_key, before.wg_address, before.wg_port)
    encryption = Encryption(
        kernel,
        cluster,
        me,
        KeyFile(settings.state / "wireguard.key"),
        port=settings.wg_port,
        refusal=settings.encryption_refusal,
        publish=lambda: presence.publish(),
        rotation=settings.key_rotation,
    )
    ipam = Ipam(store, me.id, ranges=settings.pools, host_routes=kernel.routes)
    attachments = Attachments(kernel, me, port=settings.port, resolver=settings.dns, encryption=encryption)
    driver = Driver(store, me.host, ipam, attachments, cluster, name=settings.driver, mirror=settings.mirror)
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
    )
    hosts = Hosts(patient, cluster, driver, ipam)
    presence = Presence(
        hosts,
        cluster,
        me,
        snapshot,
        instance=instance(),
        locate=locate,
        is_here=kernel.has_address,
        moved=agent.refresh,
        grace=settings.host_grace,
    )
    sweeper = collector = names = None
    if settings.docker != "off":
        collector = Collector(patient, me.host, cluster, driver, ipam, grace=settings.gc_grace)
        sweeper = _sweeper(settings, patient, me.host, agent, driver, ipam, presence, collector)
        names = NameService(
            patient,
            me.host,
            cluster,
            DockerEngine(settings.docker, settings.driver),
            kernel,
            address=settings.dns,
            sandboxes=settings.run.parent / "netns",
        )
    presence.start(restored=bool(restored))
    _check_kernel(attachments)
    agent.start(restored=bool(restored))
    if sweeper:
        sweeper.start()
    if names:
        names.start()
    log.info("weft %s serves host %s (%s) with VTEP %s", __version__, me.host.name, me.id[:12], me.host.underlay)
    app = create_app(driver, ipam, presence, ResolverRoutes(cluster, me.id, settings.dns, settings.run / "routes"))
    app.register_blueprint(create_admin(hosts, cluster, Garbage(presence, sweeper, collector), driver, me, encryption))
    return Weft(app, [store, patient], kernel, agent, presence, sweeper, names)


def _sweeper(
    settings: Settings,
    store: Store,
    host: Host,
    agent: Agent,
    driver: Driver,
    ipam: Ipam,
    presence: Presence,
    collector: Collector,
) -> Sweeper:
    """What compares this host's Docker Engine with the store."""
    engine, cluster = DockerEngine(settings.docker, settings.driver), agent.cluster
    patience = 2 * settings.gc_grace + MARGIN_SECONDS  # twice: a collector looks after every half of its grace
    adoption = Adoption(store, host, cluster, driver, ipam, patience=patience)
    mirror = Mirror(store, host, cluster, driver, engine, enabled=settings.mirror)
    sweeper = Sweeper(engine, store, host, cluster, [collector, adoption, mirror, Restarts(engine, presence, adoption)])
    agent.listeners.append(lambda touched: sweeper.wake() if mirror.concerns(touched) else None)
    return sweeper


def open_store(settings: Settings, *, patience: float = HANDLER_PATIENCE) -> Store:
    """The store that the settings name. Hosts begin with different members of an etcd cluster, to share its load.

    :param patience: seconds that one call may take while etcd is away.
    """
    endpoints = settings.etcd_endpoints
    if not endpoints:
        return SqliteStore(settings.sqlite_path)
    access = Access(
        ca=settings.store_ca,
        cert=settings.store_cert,
        key=settings.store_key,
        user=settings.store_user,
        password_file=settings.store_password_file,
    )
    return EtcdStore(
        random.sample(endpoints, len(endpoints)), root=settings.etcd_root, access=access, patience=patience
    )


def store_addresses(settings: Settings) -> Iterator[str]:
    """Addresses of etcd's members, as far as their names can be resolved."""
    for endpoint in settings.etcd_endpoints:
        with suppress(OSError):
            yield from (str(found[4][0]) for found in getaddrinfo(urlsplit(endpoint).hostname, None, type=SOCK_STREAM))


def _check_kernel(attachments: Attachments) -> None:
    """Say at once what would otherwise come up with the first network; until then weft can do all else."""
    try:
        attachments.check()
    except KernelError as error:
        log.error("no network can be made on this host: %s", error)


class _Server(BaseApplication):  # type: ignore[misc]
    """gunicorn with our settings instead of a command line."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._weft: Weft | None = None
        super().__init__()

    def load_config(self) -> None:
        options: dict[str, Any] = {
            "bind": f"unix:{self._settings.socket}",
            "umask": 0o177,
            "workers": 1,
            "worker_class": "gthread",
            "threads": _THREADS,
            "control_socket_disable": True,
            "graceful_timeout": 5,
            "loglevel": "warning",
            "worker_exit": lambda _server, _worker: self._stop(),
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        try:
            self._weft = build(self._settings)
        except WeftError as error:
            _give_up(error)
        return self._weft.app

    def _stop(self) -> None:
        if self._weft:
            self._weft.stop()


def serve(settings: Settings) -> None:
    """Serve this host until told to stop."""
    _check_socket(settings.socket)
    for folder in (settings.run, settings.socket.parent):
        _make_folder(folder)
    logging.getLogger("gunicorn.error").addFilter(lambda record: not record.getMessage().endswith(_SAID))
    lock = _lock(settings.run / "lock")
    try:
        _check_store(settings)
        _Server(settings).run()
    finally:
        lock.close()


def _check_store(settings: Settings) -> None:
    """Before the socket is there: `docker plugin enable` succeeds as soon as somebody listens."""
    if _snapshot(settings).load():
        return
    try:
        store = open_store(settings, patience=PATIENCE)
        store.get(SCHEMA_KEY)
        store.close()  # gunicorn forks, and nothing that is open may go along
    except WeftError as error:
        _give_up(error)


def _give_up(error: WeftError) -> NoReturn:
    log.error("weft cannot start: %s", " ".join(str(error).split()))  # SQLite's diagnoses have many lines
    sys.exit(_BOOT_FAILED)


def _snapshot(settings: Settings) -> SnapshotFile:
    return SnapshotFile(settings.state / "snapshot.json", settings.store_origin)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder {folder} cannot be made: {error.strerror}; weft must run as root") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"folder {folder} cannot be written: weft must run as root, and not on a read-only disk")


def _check_socket(path: Path) -> None:
    """What gunicorn would not explain."""
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the socket's path {path} is longer than {_SOCKET_PATH_BYTES} bytes: choose another WEFT_SOCKET"
        )
    if path.exists() and not path.is_socket():
        raise ConfigError(f"{path} is not a socket: move it away, or choose another WEFT_SOCKET")


def _lock(path: Path) -> Any:
    """Hold the host's lock; the kernel frees it when the last process that inherited it has gone."""
    try:
        file = path.open("a+")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; weft must run as root") from error
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "?"
                raise ConfigError(f"another weft serves this host already (process {holder}): stop it first") from None
            time.sleep(0.1)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """The `weft` command. Exit codes: 0 done, 1 it failed, 2 the command line is wrong, 3 the server did not start."""
    options = _parser().parse_args(arguments)
    try:
        settings = config.from_environment(os.environ)
        logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s", force=True)
        log.setLevel(settings.log.upper())  # of weft alone: pyroute2 writes pages per request
        if options.command == "serve":
            serve(settings)
        else:
            cli.run(options, settings.socket)
    except WeftError as error:
        print(f"weft {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    settings = "\n".join(
        f"  {config.variable(name):24} {setting.meaning} [{setting.default}]" for name, setting in SETTINGS.items()
    )
    parser = argparse.ArgumentParser(
        prog="weft",
        description="Multi-host networks for plain Docker Engines.",
        epilog=f"settings, from the environment:\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"weft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="serve this host's Docker Engine (in the foreground)")
    cli.add_commands(commands)
    setup_dns.add_commands(commands)
    return parser
