"""pyroute2 in one namespace, for what is rare: links, addresses, routes.

pyroute2's sockets belong to threads, so all requests run in the thread that lives in the namespace. Errors become
`KernelError` here, and a socket that broke is replaced at the next request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from errno import EBADF, ECOMM, ECONNRESET, EINTR
from typing import Any, TypeVar

from pyroute2 import IPRoute, NetlinkError

from weft.errors import KernelError
from weft.kernel.namespace import NamespaceThread

T = TypeVar("T")

_BROKEN = {EBADF, ECOMM, ECONNRESET}
"""What pyroute2 calls the loss of its socket."""
_DUMP_INTERRUPTED = 0x10
_ATTEMPTS = 10


def _no_hint(errno: int) -> str:
    return ""


class Connection:
    """One pyroute2 socket; any thread may call.

    :param opened: makes it: an `IPRoute`, or another of its kind.
    """

    def __init__(self, thread: NamespaceThread, opened: Callable[[], Any] = IPRoute) -> None:
        self._thread = thread
        self._open = opened
        self._route: Any = None

    def close(self) -> None:
        self._thread.run(self._drop)

    def call(self, what: str, request: Callable[[Any], T], hint: Callable[[int], str] = _no_hint) -> T:
        """Do `request` with the socket; `what` and `hint` (of an errno) are for its error."""
        try:
            return self._thread.run(lambda: self._call(request))
        except NetlinkError as error:
            raise KernelError(what, error.code, hint(error.code)) from error
        except OSError as error:
            raise KernelError(what, error.errno or 0) from error

    def dump(self, what: str, request: Callable[[Any], Iterable[Any]]) -> list[Any]:
        """All messages of a dump; asked again if the kernel says that they do not fit together."""
        for _ in range(_ATTEMPTS):
            answer = self.call(what, lambda route: list(request(route)))
            if not any(message["header"]["flags"] & _DUMP_INTERRUPTED for message in answer):
                return answer
        raise KernelError(what, EINTR, "it changes all the time")

    def _call(self, request: Callable[[Any], T]) -> T:
        try:
            if self._route is None:
                self._route = self._open()
            return request(self._route)
        except NetlinkError as error:
            if error.code in _BROKEN:
                self._drop()
            raise
        except OSError:
            self._drop()
            raise

    def _drop(self) -> None:
        route, self._route = self._route, None
        if route is not None:
            with suppress(OSError):  # it may be broken
                route.close()
