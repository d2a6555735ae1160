"""Whether containers reach the resolver: a firewall of the host may filter what comes from docker_gwbridge.

Nothing else would tell: Docker waits four seconds for each question and goes on to the next server. So if no container
asks for a while, a question is sent from a container's own namespace, as its own would be. Sent to Docker's embedded
DNS instead, it shows whether Docker asks us at all, also where its configuration cannot be read.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Protocol

from weft.engine.containers import Engine
from weft.errors import EngineError, KernelError
from weft.names.askers import Askers

log = logging.getLogger(__name__)

PAUSE_SECONDS = 10.0
_QUIET_SECONDS = 60.0
_PATIENCE = 0.5
_TIMES = 3
PROBE = "weft.probe"
"""No container's name: the resolver answers it with its own address."""
_QUESTION = bytes.fromhex("77660100000100000000000004776566740570726f62650000010001")
"""That name, A."""
_EMBEDDED = "127.0.0.11"
_ASKED = 3
"""Containers: one may have servers of its own (`docker run --dns`), or let nothing out (a VPN's kill switch)."""


class Kernel(Protocol):
    """See `kernel.LinuxKernel`."""

    def work_in(self, namespace: Path, work: Callable[[], bytes]) -> bytes: ...


class Watchman:
    """
    :param address: the resolver's.
    :param folder: where the engine keeps the namespaces of sandboxes.
    """

    def __init__(self, kernel: Kernel, engine: Engine, askers: Askers, address: str, folder: Path) -> None:
        self._kernel = kernel
        self._engine = engine
        self._askers = askers
        self._address = address
        self._folder = folder
        self._filtered = False

    def look(self) -> None:
        """Ask, if there is a container to ask from and none has asked; say it once if there is no answer."""
        if monotonic() - self._askers.heard < _QUIET_SECONDS:
            self._conclude(True)
            return
        if (reached := self.reaches()) is not None:
            self._conclude(reached)

    def reaches(self) -> bool | None:
        """Whether a container of this host reaches the resolver now; None if there is none to ask from."""
        replies = self._replies(self._address)
        return any(replies) if replies else None

    def is_first(self) -> bool | None:
        """Whether Docker asks the resolver before others; None if no container gets an answer to tell it by."""
        replies = [reply for reply in self._replies(_EMBEDDED) if reply]
        own = socket.inet_aton(self._address)
        return any(reply.endswith(own) for reply in replies) if replies else None

    def _replies(self, server: str) -> list[bytes]:
        """What some containers of this host are answered, b"" for nothing. They ask at one time."""
        try:
            sandboxes = list(self._engine.gateways().values())[:_ASKED]
        except EngineError as error:
            log.debug("whether containers reach the resolver is not known: %s", error)
            return []
        with ThreadPoolExecutor(_ASKED, thread_name_prefix="names-ask") as pool:
            return [reply for reply in pool.map(partial(self._reply, server), sandboxes) if reply is not None]

    def _reply(self, server: str, sandbox: str) -> bytes | None:
        try:
            return self._kernel.work_in(self._folder / sandbox, partial(_ask, server))
        except KernelError as error:  # the container has ended, or its namespace is not for us to see
            log.debug("whether containers reach the resolver is not known: %s", error)
        return None

    def _conclude(self, reached: bool) -> None:
        if reached and self._filtered:
            log.info("containers reach the resolver again")
        if not reached and not self._filtered:
            log.error(
                "a firewall on this host filters what containers ask at %(at)s: names of other hosts are not answered. "
                "Let it in: iptables -I INPUT -i docker_gwbridge -d %(at)s -p udp --dport 53 -j ACCEPT, and the same "
                "with -p tcp (ufw: ufw allow in on docker_gwbridge to %(at)s port 53)",
                {"at": self._address},
            )
        self._filtered = not reached


def _ask(server: str) -> bytes:
    """The answer to a question from the calling thread's namespace; b"" if nothing answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(_PATIENCE)
        for _ in range(_TIMES):
            try:
                udp.connect((server, 53))  # there may be no route yet
                udp.send(_QUESTION)
                return udp.recv(512)
            except OSError:
                continue
    return b""
