"""Asking the daemon on this host: JSON over the driver's socket."""

from __future__ import annotations

import json
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import Any

from weft.errors import ConfigError, WeftError

_TIMEOUT_SECONDS = 30.0
_PLUGINS = Path("/run/docker/plugins")


class NoDaemon(ConfigError):
    """No weft daemon runs on this host."""


class _Connection(HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("weft", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket(AF_UNIX, SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(socket_path: Path, method: str, path: str, body: Any = None, *, timeout: float = _TIMEOUT_SECONDS) -> Any:
    """The daemon's answer; `WeftError` with its message if it refuses, `NoDaemon` if there is none.

    The daemon is looked for at `socket_path`, then where the engine keeps the sockets of managed plugins.
    """
    for place in [socket_path, *sorted(_PLUGINS.glob("*/weft.sock"))]:
        connection = _Connection(place, timeout)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (FileNotFoundError, ConnectionRefusedError):
            continue
        except PermissionError as error:
            raise WeftError(f"the weft daemon at {place} answers root only: type sudo before the command") from error
        except (OSError, HTTPException, ValueError) as error:
            raise WeftError(f"the weft daemon at {place} does not answer: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise WeftError(answer["Err"])
        return answer
    raise NoDaemon(
        f"no weft daemon runs on this host: none listens at {socket_path} (systemctl start weft, or docker plugin "
        "enable weft)"
    )


def answers(socket_path: Path) -> bool:
    """Whether a daemon serves there."""
    try:
        ask(socket_path, "GET", "/weft/version")
    except WeftError:
        return False
    return True
