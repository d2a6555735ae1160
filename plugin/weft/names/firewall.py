"""Whether containers reach the resolver: a firewall of the host may filter what comes from docker_gwbridge.

Nothing else would tell: Docker waits four seconds for each question and goes on to the next server. So if no container
asks for a while, a question is sent from a container's own namespace, as its own would be.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
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
_QUESTION = bytes.fromhex("77660100000100000000000004776566740570726f62650000010001")
"""weft.probe, A: nobody has that name, and a refusal is an answer."""


class Kernel(Protocol):
    """See `kernel.LinuxKernel`."""

    def work_in(self, namespace: Path, work: Callable[[], bool]) -> bool: ...


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
        try:
            sandbox = next(iter(self._engine.gateways().values()), None)
            if sandbox is not None:
                return self._kernel.work_in(self._folder / sandbox, partial(_ask, self._address))
        except (EngineError, KernelError) as error:  # the container has ended, or its namespace is not for us to see
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


def _ask(address: str) -> bool:
    """Whether anything answers a question from the calling thread's namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(_PATIENCE)
        for _ in range(_TIMES):
            try:
                udp.connect((address, 53))  # there may be no route yet
                udp.send(_QUESTION)
                return bool(udp.recv(512))
            except OSError:
                continue
    return False
