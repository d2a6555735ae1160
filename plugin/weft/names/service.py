"""Names of containers on one host: what is published for the others, and the resolver that answers this one's.

The resolver's address stays on the host's loopback and on the bridges when weft stops. Then a rule sends its questions
to the user's server, and where that is not possible the kernel says that nobody listens, and Docker goes on to that
server; without the address the questions would go out by the default route, and each name would cost four seconds.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from weft.cli import setup_dns
from weft.cluster import Cluster
from weft.engine.containers import Containers, Engine
from weft.errors import ConfigError, KernelError
from weft.model import Host
from weft.names import firewall
from weft.names.askers import Askers
from weft.names.dns import Responder
from weft.names.lookup import Asker, Kind, lookup
from weft.names.publisher import Publisher
from weft.names.queues import bind
from weft.names.resolver import DnsServer
from weft.store import Store

log = logging.getLogger(__name__)

_RETRY_SECONDS = 15.0
_MARK_SECONDS = 25
"""So long a resolver counts as alive that has a socket and does nothing. Renewed every ten seconds."""


class Kernel(firewall.Kernel, Protocol):
    """See `kernel.LinuxKernel`."""

    def own(self, address: str) -> None: ...
    def open_detour(self, address: str, server: str, seconds: int) -> None: ...
    def keep_shut(self, address: str, seconds: int) -> None: ...
    def let_pass(self, address: str) -> None: ...
    def open_sockets(self, make: Callable[[], Sequence[socket.socket]]) -> list[socket.socket]: ...


class NameService:
    """One per host.

    :param address: the resolver's; "" if this host shall have none, as when another program does that.
    :param sandboxes: where the engine keeps the network namespaces of containers.
    :param note: told what became of each question.
    """

    def __init__(
        self,
        store: Store,
        host: Host,
        cluster: Cluster,
        engine: Engine,
        kernel: Kernel,
        *,
        address: str,
        sandboxes: Path,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        askers = Askers(cluster, host.id, engine)
        self.problem = ""
        """Why names are not answered; "" if they are, or shall not be."""
        self._publisher = Publisher(store, host, cluster)
        self._containers = Containers(engine, [askers.follow, self._publisher.follow])
        self._publisher.running = self._containers.running
        self._kernel = kernel
        self._address = address
        self._askers = askers
        self._responder = Responder(partial(_resolve, cluster, host.id, address), lambda: cluster.version, note)
        self._watchman = firewall.Watchman(kernel, engine, askers, address, sandboxes)
        self._server: DnsServer | None = None
        self._told = False
        self._stopping = threading.Event()
        self._serving = threading.Thread(target=self._serve, name="dns-start", daemon=True)

    def start(self) -> None:
        self._containers.start()
        self._publisher.start()
        if self._address:
            self._serving.start()

    def stop(self) -> None:
        self._stopping.set()
        self._containers.stop()
        self._publisher.stop()
        if self._address:
            self._serving.join(timeout=5)
        if self._server:
            self._server.stop()

    @property
    def answers(self) -> bool:
        """Whether this host's containers get names of other hosts."""
        return self._server is not None

    def reached(self) -> bool | None:
        """Whether a container of this host reaches the resolver now; None if that cannot be told."""
        return self._watchman.reaches() if self._address else None

    def is_first(self) -> bool | None:
        """Whether Docker asks the resolver before others; None if that cannot be told."""
        return self._watchman.is_first() if self._address else None

    def _serve(self) -> None:
        """Until it is possible: another program may have to be told first to leave the port."""
        failing = False
        while not self._stopping.is_set():
            try:
                sockets = self._open()
            except KernelError as error:
                if not failing:
                    log.error("names of other hosts are not answered: %s", error)
                failing = True
                self.problem = str(error)
                self._stopping.wait(_RETRY_SECONDS)
                continue
            self.problem = ""
            server = self._server = DnsServer(self._responder, self._askers, sockets)
            server.start()
            log.info("names are answered at %s", self._address)
            break
        has_detour = self._open_detour()
        while not self._stopping.wait(firewall.PAUSE_SECONDS):
            try:
                self._kernel.own(self._address)  # who flushes lo takes it away, and the sockets do not tell
                self._watchman.look()
                has_detour = self._shut_detour() if has_detour else self._open_detour()
            except KernelError as error:
                log.warning("containers may not reach the resolver: %s", error)
            except Exception:
                log.exception("watching over the resolver met a bug")
        if has_detour:
            with suppress(KernelError):
                self._kernel.let_pass(self._address)

    def _open_detour(self) -> bool:
        """For the time when we do not answer; `kernel.detour` has the reason. Without it that time is just worse."""
        try:
            servers = setup_dns.plan(setup_dns.DAEMON_JSON, self._address).servers
            server = next(server for server in servers[1:] if ":" not in server)
            self._kernel.open_detour(self._address, server, _MARK_SECONDS)
        except (ConfigError, KernelError, StopIteration) as error:
            if not self._told:
                log.warning("with weft stopped, some names outside will take Docker seconds to find: %s", error)
            self._told = True
            return False
        return True

    def _shut_detour(self) -> bool:
        try:
            self._kernel.keep_shut(self._address, _MARK_SECONDS)
        except KernelError as error:  # somebody has flushed all rules
            log.debug("%s", error)
            return self._open_detour()
        return True

    def _open(self) -> list[socket.socket]:
        self._kernel.own(self._address)
        try:
            return self._kernel.open_sockets(partial(bind, self._address))
        except OSError as error:
            hint = "another program listens on port 53 of every address (see ss -lnp 'sport = 53'): have it leave "
            hint += f"{self._address} alone, or choose another WEFT_DNS"
            in_use = error.errno == errno.EADDRINUSE
            raise KernelError(f"listen on {self._address} port 53", error.errno or 0, hint if in_use else "") from error


def _resolve(
    cluster: Cluster, me: str, address: str, asker: Asker, question: str, kind: Kind, turn: int
) -> list[str] | None:
    if question == firewall.PROBE and kind is Kind.A:
        return [address]
    return lookup(cluster, asker, me, question, kind, turn)
