"""Deletes that the store could not take when the engine asked for them.

The engine ignores that a delete failed and never repeats it. So it is kept here, in order, until the store takes it;
what is forgotten when weft itself dies meanwhile, the collector finds by comparing with Docker.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from weft.errors import StoreError, Unreadable

log = logging.getLogger(__name__)

_RETRY_SECONDS = 2.0
"""Longer than a call to a store that is away may take."""


class Unfinished:
    """The queue. Any thread may call."""

    def __init__(self) -> None:
        self._work: deque[tuple[str, Callable[[], object]]] = deque()
        self._lock = threading.Lock()
        self._failed = -_RETRY_SECONDS
        """When the store last refused, and why."""
        self._why = ""

    def do(self, what: str, work: Callable[[], object]) -> None:
        """Do it now, after all that is still to be done; or later, if the store is away."""
        try:
            if self._work and monotonic() - self._failed < _RETRY_SECONDS:
                raise StoreError(self._why)
            self.settle()
            work()
        except StoreError as error:
            log.warning("%s waits for the store: %s", what, error)
            self._work.append((what, work))

    def settle(self) -> None:
        """Do what is to be done; `StoreError` if the store still cannot take it."""
        if not self._work:
            return
        began = monotonic()
        with self._lock:
            if self._failed >= began:  # somebody has tried while this one waited
                raise StoreError(self._why)
            while self._work:
                what, work = self._work[0]
                try:
                    work()
                except Unreadable as error:
                    log.error("%s cannot be done: %s", what, error)
                except StoreError as error:
                    self._failed, self._why = monotonic(), str(error)
                    raise
                except Exception:
                    log.exception("%s cannot be done any more; the collector will look after it", what)
                else:
                    log.info("%s is done at last", what)
                self._work.popleft()
