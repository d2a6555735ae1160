"""Traffic between containers that counts what was lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lab import Host
from tests.engine import pinger


@dataclass
class Pings:
    """Filled in when the traffic has ended."""

    sent: int = 0
    lost: int = 0
    gap: float = 0.0
    """Seconds without an answer, at most."""


@contextmanager
def pings(host: Host, container: str, address: str) -> Iterator[Pings]:
    """Ping an address from a container every 20 ms for as long as the block runs."""
    pid = host.docker("inspect", "--format", "{{.State.Pid}}", container)
    argv = host.enter(["nsenter", "-t", pid, "-n", "--", sys.executable, pinger.__file__, address])
    counted = Pings()
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "answered\n", f"{address} does not answer {container}"
        try:
            yield counted
        finally:
            output, _ = process.communicate(timeout=30)
            counted.sent, counted.lost, run = json.loads(output)
            counted.gap = run * pinger.INTERVAL
