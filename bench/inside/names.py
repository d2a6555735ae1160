"""`SIZE RATE SECONDS`: weft's resolver on one processor, asked by dnsperf on another for so many names, at that rate.

The resolver is weft's own, from the socket to the table; only Docker is not there, and one source may ask more than a
container may. RATE 0 is as fast as it goes. Prints seconds of each answer (of 1,000, percentiles) and losses.

At a rate, a bare echo is asked first, in the same way and on the same processor: what its answers take is not the
resolver's doing.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar

from bench.inside.echo import answer
from bench.inside.population import VNI, Population
from weft.cluster import Cluster
from weft.daemon import tune
from weft.engine.containers import Attachment, Container
from weft.model import ENDPOINTS, Endpoint, EndpointNames
from weft.names.askers import Askers
from weft.names.dns import Responder
from weft.names.lookup import Asker, Kind, lookup
from weft.names.queues import bind
from weft.names.resolver import DnsServer
from weft.web.metrics import Metrics

HOST_ID = "e" * 32
ADDRESS = "127.0.0.1"
QUESTIONS = Path("/run/questions")
OUTPUT = Path("/run/dnsperf")
_KINDS = ("A", "A", "A", "AAAA")
_ANSWER = re.compile(r"^> NOERROR .* ([\d.]+)$", re.MULTILINE)
_COUNT = re.compile(r"Queries (sent|completed|lost): +(\d+)")
_UNLIMITED = 1e9

T = TypeVar("T")


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

    responder = Responder(resolve, lambda: cluster.version, Metrics().note_question)
    server = DnsServer(responder, _askers(cluster), bind(ADDRESS), rate=_UNLIMITED, burst=_UNLIMITED)
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


def _askers(cluster: Cluster) -> Askers:
    """Who asks is a container of this host, at that address on docker_gwbridge."""
    engine: Any = SimpleNamespace(gateways=lambda: {ADDRESS: "sandbox"})
    (network_id,) = (
        network_id for (host, network_id), vni in cluster.bindings.items() if (host, vni) == (HOST_ID, VNI)
    )
    (endpoint,) = cluster.endpoints_of(HOST_ID)
    askers = Askers(cluster, HOST_ID, engine)
    askers.follow(None, Container("", "", "", "sandbox", (Attachment(network_id, "large0", endpoint.id, (), ()),)))
    if askers.find(ADDRESS) is None:
        raise SystemExit("the resolver does not know who asks")
    return askers


def _ask_echo(ask: Callable[[], T]) -> T:
    """Of a process of its own, so that it has nothing of ours to do."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((ADDRESS, 53))
    process = get_context("fork").Process(target=answer, args=(udp,), daemon=True)
    process.start()
    udp.close()
    try:
        return ask()
    finally:
        process.kill()
        process.join()


def _ask(rate: int, seconds: int, processor: int) -> dict[str, object]:
    limit = ["-Q", str(rate)] if rate else []
    dnsperf = ["dnsperf", "-s", ADDRESS, "-d", str(QUESTIONS), "-l", str(seconds), "-v", "-t", "2", *limit]
    prepare = partial(os.sched_setaffinity, 0, [processor])
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
