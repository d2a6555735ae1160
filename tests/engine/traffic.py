"""Traffic between containers that counts what was lost. Run as a program inside a container's network namespace."""

from __future__ import annotations

import json
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lab import Host

INTERVAL = 0.02
"""Seconds between pings."""
_PATIENCE = 1.0


@dataclass
class Pings:
    """Filled in when the traffic has ended."""

    sent: int = 0
    lost: int = 0


@contextmanager
def pings(host: Host, container: str, address: str) -> Iterator[Pings]:
    """Ping an address from a container every 20 ms for as long as the block runs."""
    pid = host.docker("inspect", "--format", "{{.State.Pid}}", container)
    argv = host.enter(["nsenter", "-t", pid, "-n", "--", sys.executable, __file__, address])
    counted = Pings()
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "answered\n", f"{address} does not answer {container}"
        try:
            yield counted
        finally:
            output, _ = process.communicate(timeout=30)
            counted.sent, counted.lost = json.loads(output)


def _main(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.connect((address, 0))
        sent, answered, running = 0, set[int](), True
        due = stop = time.monotonic()
        while running or (time.monotonic() < stop and len(answered) < sent):
            if running and time.monotonic() >= due:
                icmp.send(_echo_request(sent))
                sent, due = sent + 1, due + INTERVAL
            wait = max(0.0, (due if running else stop) - time.monotonic())
            ready, _, _ = select.select([icmp, sys.stdin] if running else [icmp], [], [], wait)
            if icmp in ready:
                kind, _, _, identifier, number = struct.unpack_from("!BBHHH", icmp.recv(2048), 20)
                if (kind, identifier) == (0, 77):
                    if not answered:
                        print("answered", flush=True)
                    answered.add(number)
            if sys.stdin in ready:
                running, stop = False, time.monotonic() + _PATIENCE
    # Numbers wrap at 16 bits: nobody pings for 20 minutes here.
    print(json.dumps([sent, sent - len(answered)]))


def _echo_request(number: int) -> bytes:
    head = struct.pack("!BBHHH", 8, 0, 0, 77, number)
    total = sum(struct.unpack("!4H", head))
    return struct.pack("!BBHHH", 8, 0, ~(total + (total >> 16)) & 0xFFFF, 77, number)


if __name__ == "__main__":
    _main(sys.argv[1])
