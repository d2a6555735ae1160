"""Traffic between containers that counts what was lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from lab import Host
from lab.process import wait_until
from tests.engine import pinger

_PORT = 7000
BYTES = 2_000_000


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


def send(sender: Host, container: str, receiver: Host, other: str, address: str) -> float:
    """`BYTES` by TCP from one container to another; each has to arrive. Return how many seconds that took."""
    # Without an input, nc would end at once.
    receiver.docker("exec", "-d", other, "sh", "-c", f"sleep 60 | nc -l -p {_PORT} | wc -c > /tmp/received")
    wait_until(lambda: f":{_PORT} " in receiver.docker("exec", other, "netstat", "-ltn"), f"{other} listens")
    began = monotonic()
    sender.docker("exec", container, "sh", "-c", f"head -c {BYTES} /dev/zero | nc {address} {_PORT}")

    def received() -> bool:
        return receiver.docker("exec", other, "cat", "/tmp/received").strip() == str(BYTES)

    wait_until(received, f"{BYTES} bytes at {other}", timeout=30)
    return monotonic() - began
