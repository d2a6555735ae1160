"""What a service manager is told (sd_notify(3)): ready, alive, stopping. Nothing, where none asks.

"Alive" means that weft works: every part that must go on answers. If one does not, nothing is said, and the manager
ends this process and starts another; containers do not notice.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress

log = logging.getLogger(__name__)

_TIMES = 4
"""Signs of life in the time after which the manager loses patience."""
_RETRY_SECONDS = 0.05
"""Until the first time that all parts answer."""

Checks = Mapping[str, Callable[[], bool]]
"""By the name of a part, whether it answers; may take seconds."""


class Manager:
    """The service manager that started this process, if any.

    :param address: its socket, `@` for an abstract one; "" if there is none.
    :param patience: seconds without a sign of life after which it ends us; 0: it does not.
    """

    def __init__(self, address: str = "", patience: float = 0.0) -> None:
        self._address = address
        self._pause = patience / _TIMES
        self._stopping = threading.Event()

    @classmethod
    def take(cls, variables: MutableMapping[str, str]) -> Manager:
        """Take out what it has set, for neither gunicorn nor a child is to speak for us."""
        address = variables.pop("NOTIFY_SOCKET", "")
        patience = variables.pop("WATCHDOG_USEC", "") or "0"
        variables.pop("WATCHDOG_PID", None)
        return cls(address, int(patience) / 1e6)

    def watch(self, checks: Checks) -> None:
        """From another thread, say that we are ready once all parts answer, and then that we are alive."""
        if self._address:
            threading.Thread(target=self._watch, args=(checks,), name="watchdog", daemon=True).start()

    def stopping(self) -> None:
        self._stopping.set()
        self._tell("STOPPING=1")

    def _watch(self, checks: Checks) -> None:
        while not all(check() for check in checks.values()):
            if self._stopping.wait(_RETRY_SECONDS):
                return
        self._tell("READY=1")
        while self._pause and not self._stopping.wait(self._pause):
            if stuck := [name for name, check in checks.items() if not check()]:
                log.error("%s: no answer; the service manager is not told that weft is alive", ", ".join(stuck))
            else:
                self._tell("WATCHDOG=1")

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, suppress(OSError):
            manager.connect(self._address.replace("@", "\0", 1) if self._address[0] == "@" else self._address)
            manager.send(state.encode())
