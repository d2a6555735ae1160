"""`SIZE RATE SECONDS`: weft's resolver on one processor, asked by dnsperf on another for so many names, at that rate.

The resolver is weft's own, from the socket to the table; only who asks is known beforehand, and one source may ask more
than a container may. RATE 0 is as fast as it goes. Prints seconds of each answer (of 1,000, percentiles) and losses.

At a rate, a bare echo is asked first, in the same way and on the same processor: what its answers take is not the
resolver's doing. And both ends have real-time priority, where that is allowed, so that a processor is theirs alone, as
far as the machine has it.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import TypeVar

from bench.inside.echo import answer
from bench.inside.population import VNI, Population
from weft.cluster import Cluster
from weft.daemon import tune
from weft.model import ENDPOINTS, Endpoint, EndpointNames
from weft.names.dns import Responder
from weft.names.lookup import Asker, Kind, lookup
from weft.names.queues import bind
from weft.names.resolver import DnsServer

HOST_ID = "e" * 32
ADDRESS = "127.0.0.1"
QUESTIONS = Path("/run/questions")
OUTPUT = Path("/run/dnsperf")
_KINDS = ("A", "A", "A", "AAAA")
_ANSWER = re.compile(r"^> NOERROR .* ([\d.]+)$", re.MULTILINE)
_COUNT = re.compile(r"Queries (sent|completed|lost): +(\d+)")
_UNLIMITED = 1e9
_PRIORITY = 10

T = TypeVar("T")


class _Everybody:
    """A directory in which every source is on the network."""

    def known(self, source: str) -> Asker | None:
        return Asker.on({VNI: "large0"})

    find = known


def main(size: int, rate: int, seconds: int) -> dict[str, object]:
    tune()
    random = Random(size)
    QUESTIONS.write_text("".join(f"web{random.randrange(size)} {random.choice(_KINDS)}\n" for _ in range(10 * size)))
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, processors[:1])
    ask = partial(_ask, rate, seconds, processors[-1])
    echo = _ask_echo(ask) if rate else {}
    cluster = _cluster(size)

    def resolve(asker: Asker, question: str, kind: Kind, turn: int) -> list[str] | None:
        return lookup(cluster, asker, HOST_ID, question, kind, turn)

    responder = Responder(resolve, lambda: cluster.version)
    server = DnsServer(responder, _Everybody(), bind(ADDRESS), rate=_UNLIMITED, burst=_UNLIMITED)
    if rate:
        _prefer(0)
    server.start()
    try:
        return {"weft": ask(), "echo": echo}
    finally:
        server.stop()


def _cluster(size: int) -> Cluster:
    cluster = Cluster()
    records = list(Population(size).records(HOST_ID))
    cluster.apply((put.key, put.value) for put in records)
    endpoints = (Endpoint.decode(put.value) for put in records if put.key.startswith(ENDPOINTS))
    for number, endpoint in enumerate(endpoints):
        names = EndpointNames(VNI, endpoint.id, endpoint.host, f"web{number}", (f"alias{number}",))
        cluster.apply([(names.key, names.encode())])
    return cluster


def _ask_echo(ask: Callable[[], T]) -> T:
    """Of a process of its own, so that it has nothing of ours to do."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((ADDRESS, 53))
    process = get_context("fork").Process(target=answer, args=(udp,), daemon=True)
    process.start()
    _prefer(process.pid or 0)
    udp.close()
    try:
        return ask()
    finally:
        process.kill()
        process.join()


def _prefer(pid: int) -> None:
    """Over all that has no real-time priority."""
    with suppress(PermissionError):
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(_PRIORITY))


def _ask(rate: int, seconds: int, processor: int) -> dict[str, object]:
    limit = ["-Q", str(rate)] if rate else []
    dnsperf = ["dnsperf", "-s", ADDRESS, "-d", str(QUESTIONS), "-l", str(seconds), "-v", "-t", "2", *limit]

    def prepare() -> None:
        os.sched_setaffinity(0, [processor])
        if rate:
            _prefer(0)

    with OUTPUT.open("w") as output:  # reading along would take the resolver's processor
        subprocess.run(dnsperf, check=True, stdout=output, preexec_fn=prepare)
    said = OUTPUT.read_text()
    counts = {what: int(count) for what, count in _COUNT.findall(said)}
    times = sorted(map(float, _ANSWER.findall(said)))
    if len(times) != counts["completed"]:
        raise SystemExit(f"{counts['completed'] - len(times)} questions were refused:\n{said[-2000:]}")
    return {**counts, "rate": counts["completed"] / seconds, "seconds": times[:: max(1, len(times) // 1000)]}


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
