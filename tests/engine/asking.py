"""Asking for names from inside a container's network namespace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from lab import Host
from tests.engine import asker

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
        order |= {"patience": patience, "timeout": timeout}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()
        return Reply(**json.loads(self._process.stdout.readline()))


Inside = Callable[[Host, str], Asking]


@contextmanager
def askers() -> Iterator[Inside]:
    """Makes `Asking` of a host and a container's name; they end with the block."""
    with ExitStack() as programs:

        def start(host: Host, container: str) -> Asking:
            pid = host.docker("inspect", "--format", "{{.State.Pid}}", container)
            argv = host.enter(["nsenter", "-t", pid, "-n", "--", sys.executable, asker.__file__])
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            programs.enter_context(process)
            assert process.stdin
            programs.callback(process.stdin.close)
            return Asking(process)

        yield start
