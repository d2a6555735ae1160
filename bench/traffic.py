"""Part a: throughput, packet rate and round trip between the hosts, the variants one after the other in each round.

Who runs where matters more than any variant on a machine of few cores. Bulk traffic has its sender on one CPU and its
receiver on another; a ping-pong has both on one, so that no wake-up of a sleeping CPU is in it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from subprocess import DEVNULL
from typing import Any

from bench.inside import echo
from bench.measure import Results, in_turn
from bench.metrics import OVERLAY, RAW, WEFT
from bench.rig import Place, Rig
from lab.process import run, wait_until
from lab.terminal import Terminal

VARIANTS = [RAW, OVERLAY, WEFT]

_IPERF_PORT = 5201  # iperf3's own
_ECHO_PORT = 5202
_CPUS = sorted(os.sched_getaffinity(0))
_SENDER, _RECEIVER = str(_CPUS[0]), str(_CPUS[1 % len(_CPUS)])
_ECHO = [sys.executable, "-I", str(Path(echo.__file__))]
# Not the machine's default: one that paces (bbr) measures its timers.
_TCP = ["--congestion", "cubic"]
_UDP64 = ["--udp", "--bitrate", "0", "--length", "64"]

Measure = Callable[[Place, Place], list[float]]


def measure(rig: Rig, results: Results, terminal: Terminal, *, rounds: int, seconds: int, trips: int) -> None:
    measures: dict[str, Measure] = {
        "tcp_1stream_gbps": partial(tcp, streams=1, seconds=seconds),
        "tcp_4stream_gbps": partial(tcp, streams=4, seconds=seconds),
        "udp64_kpps": partial(_udp64, seconds=seconds),
        "rtt_us": partial(round_trips, trips=trips),
    }
    compare(rig, results, terminal, VARIANTS, measures, rounds)


def compare(
    rig: Rig,
    results: Results,
    terminal: Terminal,
    variants: Sequence[str],
    measures: Mapping[str, Measure],
    rounds: int,
) -> None:
    with _servers(rig.far[variant] for variant in variants):
        for number in range(rounds):
            with terminal.step(f"traffic, round {number + 1} of {rounds}"):
                for metric, take in measures.items():
                    for variant in in_turn(variants, number):
                        samples = take(rig.near[variant], rig.far[variant])
                        results.add(metric, variant, median(samples), samples)


def tcp(near: Place, far: Place, *, streams: int, seconds: int) -> list[float]:
    end = _iperf(near, far, *_TCP, "--parallel", str(streams), "--time", str(seconds))
    return [end["sum_received"]["bits_per_second"] / 1e9]


def _udp64(near: Place, far: Place, *, seconds: int) -> list[float]:
    """Packets that arrived, not those sent."""
    total = _iperf(near, far, *_UDP64, "--time", str(seconds))["sum"]
    return [(total["packets"] - total["lost_packets"]) / total["seconds"] / 1e3]


def round_trips(near: Place, far: Place, *, trips: int) -> list[float]:
    argv = _pinned(_SENDER, *_ECHO, "ask", far.address, str(_ECHO_PORT), str(trips))
    return [nanoseconds / 1e3 for nanoseconds in json.loads(run(near.command(*argv)))]


def _iperf(near: Place, far: Place, *options: str) -> dict[str, Any]:
    argv = _pinned(_SENDER, "iperf3", "--client", far.address, "--json", *options)
    end: dict[str, Any] = json.loads(run(near.command(*argv)))["end"]
    return end


def _pinned(cpu: str, *argv: str) -> list[str]:
    return ["taskset", "--cpu-list", cpu, *argv]


@contextmanager
def _servers(places: Iterable[Place]) -> Iterator[None]:
    """At each far end. What we end here is nsenter; the servers themselves end with the lab."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for place in places:
            for argv in (
                _pinned(_RECEIVER, "iperf3", "--server", "--port", str(_IPERF_PORT)),
                _pinned(_SENDER, *_ECHO, "serve", str(_ECHO_PORT)),
            ):
                processes.append(subprocess.Popen(place.command(*argv), stdout=DEVNULL, stderr=DEVNULL))
            wait_until(partial(_listens, place), f"the servers at {place.address}")
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _listens(place: Place) -> bool:
    sockets = run(place.command("ss", "--no-header", "--listening", "--tcp", "--udp", "--numeric"))
    return all(f":{port} " in sockets for port in (_IPERF_PORT, _ECHO_PORT))
