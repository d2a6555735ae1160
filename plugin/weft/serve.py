"""`weft serve` under gunicorn: one worker with threads, on the driver's socket.

gunicorn forks the worker. Everything with a thread, a socket or a connection is made after that, in the worker; the
parent only holds the lock that keeps a second weft off this host, since two would fight over one kernel.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

from weft.config import Settings
from weft.errors import ConfigError, WeftError
from weft.watchdog import Manager

log = logging.getLogger(__name__)

_THREADS = 32
"""Calls answered at once: the engine waits in parallel, and none of ours takes long."""
_LOCK_SECONDS = 10.0
"""A killed gunicorn's worker notices within two seconds and leaves."""
_BOOT_FAILED = 3
"""gunicorn's exit status for a worker that could not start: it does not try again (gunicorn arbiter.py)."""
_SAID = (f"exited with code {_BOOT_FAILED}.", "Shutting down: Master", "Worker failed to boot.")
"""Ends of what gunicorn then says, when the worker has already said why."""
_KEEP_SECONDS = 24 * 3600
"""For which an idle connection stays. The engine keeps its own for ever, and what it sends while one is being closed it
sends again without the body (moby, pkg/plugins/client.go), which can only be refused."""
_PR_SET_PDEATHSIG = 1
_SPECS = (Path("/etc/docker/plugins"), Path("/usr/lib/docker/plugins"))
_SOCKET_PATH_BYTES = 107
"""The most that fits into a sockaddr_un (unix(7))."""


class Served(Protocol):
    """What runs behind the socket."""

    app: Flask

    def stop(self) -> None: ...


class _Log(Logger):  # type: ignore[misc]
    """gunicorn's messages in weft's log."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


class _Arbiter(Arbiter):  # type: ignore[misc]
    """gunicorn's parent process."""

    def stop(self, graceful: bool = True) -> None:
        self.app.manager.stopping()
        super().stop(graceful)


class _Server(BaseApplication):  # type: ignore[misc]
    """gunicorn with our settings instead of a command line."""

    def __init__(self, socket: Path, manager: Manager, build: Callable[[], Served]) -> None:
        self.manager = manager
        self._socket = socket
        self._build = build
        self._served: Served | None = None
        super().__init__()

    def load_config(self) -> None:
        options: dict[str, Any] = {
            "bind": f"unix:{self._socket}",
            "umask": 0o177,
            "workers": 1,
            "worker_class": "gthread",
            "threads": _THREADS,
            "control_socket_disable": True,
            "keepalive": _KEEP_SECONDS,
            "graceful_timeout": 5,
            "loglevel": "warning",
            "logger_class": _Log,
            "post_fork": lambda server, _worker: _die_with_parent(server.pid),
            "worker_exit": lambda _server, _worker: self._stop(),
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def run(self) -> None:
        _Arbiter(self).run()

    def load(self) -> Flask:
        try:
            self._served = self._build()
        except WeftError as error:
            _give_up(error)
        return self._served.app

    def _stop(self) -> None:
        if self._served:
            self._served.stop()


def serve(settings: Settings, manager: Manager, *, check: Callable[[], None], build: Callable[[], Served]) -> None:
    """Serve this host until told to stop.

    :param manager: is told when we stop; `build` sees to the rest.
    :param check: raises `WeftError` if it is in vain, before there is a socket.
    :param build: starts everything, in the worker.
    """
    _check_socket(settings.socket)
    for folder in (settings.run, settings.socket.parent):
        _make_folder(folder)
    logging.getLogger("gunicorn.error").addFilter(lambda record: not record.getMessage().endswith(_SAID))
    lock = _lock(settings.run / "lock", f"process {os.getpid()}, driver {settings.driver}")
    try:
        _check_rivals(settings.socket)
        check()
        _Server(settings.socket, manager, build).run()
    except WeftError as error:
        _give_up(error)
    finally:
        lock.close()


def _die_with_parent(parent: int) -> None:
    """A worker that hangs would go on holding the socket and the lock, and weft could not be started again."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os.kill(os.getpid(), signal.SIGKILL)


def _give_up(error: WeftError) -> NoReturn:
    log.error("weft cannot start: %s", " ".join(str(error).split()))  # SQLite's diagnoses have many lines
    sys.exit(_BOOT_FAILED)


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


def _check_rivals(path: Path) -> None:
    """Whoever else is a driver of our name. The lock is ours: no weft listens there."""
    with socket.socket(socket.AF_UNIX) as other, suppress(OSError):
        other.connect(str(path))
        raise ConfigError(
            f"another program is the driver {path.stem} of this engine and listens at {path} (see ss -lxp src {path}): "
            "stop it, or give weft another name with WEFT_SOCKET and WEFT_DRIVER"
        )
    for rival in rival_specs(path.stem, _SPECS):
        log.error("Docker takes %s for the driver %s whenever weft does not run: remove that file", rival, path.stem)


def rival_specs(name: str, folders: Iterable[Path]) -> list[Path]:
    """Files that tell an engine of another driver of that name (moby pkg/plugins/discovery.go)."""
    places = (folder / part for folder in folders for part in (".", name))
    files = (place / f"{name}.{kind}" for place in places for kind in ("spec", "json"))
    return [file for file in files if file.exists()]


def _lock(path: Path, holder: str) -> Any:
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
                other = file.read().strip() or "?"
                raise ConfigError(
                    f"another weft serves this host already ({other}): stop it first; a managed plugin by "
                    "docker plugin disable -f NAME"
                ) from None
            time.sleep(0.1)
    file.truncate(0)
    file.write(f"{holder}\n")
    file.flush()
    return file
