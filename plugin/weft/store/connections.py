"""The HTTP clients of a process for etcd: each request has one for itself, and those that stay idle are closed.

So there are as many connections as there were requests at one time lately, and none before the first one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from weakref import WeakSet

import requests

_IDLE_SECONDS = 10.0
"""The signs of life come more often, so one is always open."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to be let in: certificates for TLS; a user, and the file that holds the password."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None


class Connections:
    """Any thread may call."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._lock = threading.Lock()
        self._idle: deque[tuple[float, requests.Session]] = deque()
        """With the moment since when; the one that was used last at the end."""
        self._open: WeakSet[requests.Session] = WeakSet()

    @contextmanager
    def one(self) -> Iterator[requests.Session]:
        """For one request; it is used again afterwards."""
        with self._lock:
            session = self._idle.pop()[1] if self._idle else None
        session = session or self.open()
        try:
            yield session
        finally:
            with self._lock:
                self._idle.append((monotonic(), session))
                stale = [self._idle.popleft()[1] for since, _ in [*self._idle] if monotonic() - since > _IDLE_SECONDS]
            for session in stale:
                session.close()

    def open(self) -> requests.Session:
        """One that is the caller's own."""
        session = requests.Session()
        session.trust_env = False  # no proxy, .netrc or CA bundle by accident
        session.verify = str(self._access.ca) if self._access.ca else True
        if self._access.cert:
            session.cert = (str(self._access.cert), str(self._access.key))
        with self._lock:
            self._open.add(session)
        return session

    def close(self) -> None:
        with self._lock:
            sessions = list(self._open)
        for session in sessions:
            session.close()
