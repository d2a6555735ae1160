"""Asking for names from inside a container's network namespace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from lab import Host
from tests.engine import asker, flooder

EMBEDDED = "127.0.0.11"
"""Docker's own resolver, in each container."""


class Reply(NamedTuple):
    code: str
    answers: list[str]
    truncated: bool
    took: float
    at: float


class Asking:
    """A program inside a container's namespace; see `asker`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(
        self,
        name: str,
        kind: str = "A",
        *,
        server: str = EMBEDDED,
        tcp: bool = False,
        until: str = "",
        patience: float = 10,
        timeout: float = 5,
    ) -> Reply:
        order = {"name": name, "kind": kind, "server": server, "tcp": tcp, "until": until}
        return Reply(**self._obey({**order, "patience": patience, "timeout": timeout}))

    def raw(self, wire: bytes, *, server: str, tcp: bool = False, timeout: float = 5) -> bytes:
        """What comes back; b"" if nothing does."""
        return bytes.fromhex(self._obey({"wire": wire.hex(), "server": server, "tcp": tcp, "timeout": timeout}))

    def _obey(self, order: dict[str, object]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


Inside = Callable[[Host, str], Asking]


@contextmanager
def flood(host: Host, container: str, server: str) -> Iterator[None]:
    """The container asks the server as fast as it can while the block runs."""
    argv = _inside(host, container, flooder.__file__, server)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "begins\n"
        with process.stdin:
            yield
            assert process.poll() is None


def _inside(host: Host, container: str, *program: str) -> list[str]:
    """A command that runs a program of ours in a container's network namespace."""
    pid = host.docker("inspect", "--format", "{{.State.Pid}}", container)
    return host.enter(["nsenter", "-t", pid, "-n", "--", sys.executable, *program])


@contextmanager
def askers() -> Iterator[Inside]:
    """Makes `Asking` of a host and a container's name; they end with the block."""
    with ExitStack() as programs:

        def start(host: Host, container: str) -> Asking:
            argv = _inside(host, container, asker.__file__)
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            programs.enter_context(process)
            assert process.stdin
            programs.callback(process.stdin.close)
            return Asking(process)

        yield start
