"""Sending probes and answering those of others, on the two networks that are there for it.

All that comes in may be forged by whoever reaches the VXLAN port, so it can do little: an answer needs the random
number of a measurement under way, a question has to come from the MAC of a known host and is answered to that host's
own address, and both the frames that are read and the answers to one host are bounded.
"""

from __future__ import annotations

import logging
import select
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from errno import ENODEV
from itertools import zip_longest
from time import monotonic, time
from typing import Protocol

from weft import topology
from weft.bucket import TokenBucket
from weft.cluster import Cluster
from weft.dataplane import pack_mac, vxlan_name
from weft.errors import KernelError
from weft.identity import LocalHost
from weft.model import ENCRYPTED_PROBE_VNI, PROBE_VNI
from weft.probes import echo
from weft.probes.echo import SMALL_SIZE, Arrival, Counts, Probe, Purpose
from weft.probes.links import Kind, ProbeLink
from weft.probes.rounds import Heard, Round

log = logging.getLogger(__name__)

NETWORKS: dict[Kind, int] = {"plain": PROBE_VNI, "encrypted": ENCRYPTED_PROBE_VNI}

_TICK_SECONDS = 0.5
_PAUSE_SECONDS = 0.005
"""Between probes to one host: a queue on the way shall not overflow for our sake."""
_ANSWER_SECONDS = 2.0
_REST_SECONDS = 0.5
_MOST_LADDERS = 6
_HEARD_SECONDS = 120.0
_READ_RATE, _READ_BURST = 2000.0, 6000.0
"""Frames a second: about a fifth of a processor."""
_ANSWER_RATE, _ANSWER_BURST = 100.0, 400.0


class Frame(Protocol):
    """:param pending: see `echo.decode`."""

    @property
    def data(self) -> bytes: ...
    @property
    def pending(self) -> bool: ...


class Socket(Protocol):
    """On one device. An `OSError` means that it is gone, or was down."""

    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def send(self, frame: bytes, checksum: tuple[int, int] = (0, 0)) -> None: ...
    def receive(self) -> Frame | None: ...


class Prober:
    """Any thread may call.

    :param size: MTU of the networks of a kind on this host; may raise `KernelError`.
    :param open_socket: on a device of the data plane; may raise `KernelError`.
    """

    def __init__(
        self,
        cluster: Cluster,
        me: LocalHost,
        *,
        size: Callable[[Kind], int],
        open_socket: Callable[[str], Socket],
    ) -> None:
        self.on_heard: Callable[[str], None] = lambda host: None
        """Called, quickly, with a host that begins to probe this one, although it did not answer when probed last."""
        self._cluster = cluster
        self._me = me
        self._size = size
        self._open_socket = open_socket
        self._sockets: dict[Kind, Socket] = {}
        self._opening = threading.Lock()
        self._problem = ""
        self._changed = threading.Condition()
        """Also guards what follows."""
        self._asking: dict[bytes, Round] = {}
        self._done: dict[tuple[str, Kind], Round] = {}
        self._heard: dict[tuple[str, Kind], Heard] = {}
        self._macs: dict[bytes, str] = {}
        self._reading = TokenBucket(_READ_RATE, _READ_BURST, monotonic())
        self._answering: dict[str, TokenBucket] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="probe-receive", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The devices stay, and nobody answers on them."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        for sock in self._sockets.values():
            sock.close()

    def measure(self, hosts: Collection[str], seconds: float) -> None:
        """Measure the ways to and from these hosts, all at once, in about so many seconds at most.

        A measurement that somebody else has begun counts as well.
        """
        end = monotonic() + seconds
        self._open_missing()
        ways = [(host, kind) for kind in list(self._sockets) for host in self._reachable(kind, hosts)]
        with self._changed:
            busy = {one.nonce for one in self._asking.values() if (one.peer, one.kind) in ways}
            present = {(self._asking[nonce].peer, self._asking[nonce].kind) for nonce in busy}
            rounds = [self._round(host, kind) for host, kind in ways if (host, kind) not in present]
            self._asking.update((one.nonce, one) for one in rounds)
        try:
            self._ask([(one, one.probes()) for one in rounds], min(_ANSWER_SECONDS, seconds))
            for _ in range(_MOST_LADDERS):
                with self._changed:
                    ladders = [(one, probes) for one in rounds if (probes := one.ladder())]
                if not ladders or monotonic() + _REST_SECONDS > end:
                    break
                self._ask(ladders, 0)
        finally:
            with self._changed:
                for one in rounds:
                    del self._asking[one.nonce]
                    self._done[one.peer, one.kind] = one
                self._changed.notify_all()
                self._changed.wait_for(lambda: busy.isdisjoint(self._asking), max(0.0, end - monotonic()))

    def links(self) -> list[ProbeLink]:
        """What this host knows of the ways to and from others."""
        with self._changed:
            self._forget()
            found = [link for one in self._done.values() for link in one.links()]
            unanswered = [one for one in self._done.values() if not one.answered]
            for one in unanswered:
                heard = self._heard.get((one.peer, one.kind))
                if heard and heard.when > one.when - _HEARD_SECONDS:
                    found.append(heard.link(one.peer, self._me.id, one.kind, one.size))
        return found

    def suspects(self) -> set[str]:
        """Hosts with which something was wrong when they were last probed."""
        return {link.receiver if link.sender == self._me.id else link.sender for link in self.links() if link.faulty}

    def _forget(self) -> None:
        """What concerns hosts that are gone."""
        hosts = self._cluster.hosts
        self._done = {key: one for key, one in self._done.items() if key[0] in hosts}
        self._heard = {key: one for key, one in self._heard.items() if key[0] in hosts}
        self._answering = {host: one for host, one in self._answering.items() if host in hosts}

    # Asking

    def _round(self, host: str, kind: Kind) -> Round:
        return Round(self._me.id, host, kind, self._size(kind), time())

    def _reachable(self, kind: Kind, hosts: Collection[str]) -> list[str]:
        able = topology.probe_peers(self._cluster, NETWORKS[kind], self._me.host)
        return [host for host in hosts if host in able and self._cluster.hosts[host].probes]

    def _ask(self, probes: Sequence[tuple[Round, Sequence[Probe]]], seconds: float) -> None:
        """Send to all hosts in turn, and wait until all is answered or the time is up."""
        for wave in zip_longest(*(some for _, some in probes)):
            for (one, _), probe in zip(probes, wave, strict=True):
                if probe:
                    with self._changed:
                        one.sent(probe, monotonic())
                    self._send(one.kind, one.peer, probe)
            if self._stopping.wait(_PAUSE_SECONDS):
                return
        with self._changed:
            self._changed.wait_for(lambda: all(one.settled for one, _ in probes), seconds)
            self._changed.wait_for(lambda: all(one.complete for one, _ in probes), _REST_SECONDS)

    def _send(self, kind: Kind, host: str, probe: Probe) -> None:
        frame = echo.encode(probe, self._mac(self._me.id), self._mac(host))
        with suppress(OSError, KeyError):  # it counts as lost; whoever reads the socket sees what is wrong with it
            self._sockets[kind].send(frame, echo.checksum_place(probe.protocol))

    @staticmethod
    def _mac(host: str) -> bytes:
        return pack_mac(topology.probe_mac(host))

    # Answering

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                self._open_missing()
                ready = self._wait()
                for kind in ready:
                    self._read(kind)
            except Exception:
                log.exception("answering probes met a bug; going on")
                self._stopping.wait(_TICK_SECONDS)

    def _open_missing(self) -> None:
        with self._opening:
            for kind, vni in NETWORKS.items():
                if kind not in self._sockets and vni in topology.probe_networks(self._cluster, self._me.host):
                    try:
                        self._sockets[kind] = self._open_socket(vxlan_name(vni))
                        self._problem = ""
                    except KernelError as error:
                        self._note(error)

    def _note(self, error: KernelError) -> None:
        """Once; of a device that is not there the agent says why."""
        if error.errno != ENODEV and str(error) != self._problem:
            log.error("no probes: %s; weft needs the capability CAP_NET_RAW", error)
            self._problem = str(error)

    def _wait(self) -> list[Kind]:
        if not self._sockets:
            self._stopping.wait(_TICK_SECONDS)
            return []
        ready, _, _ = select.select(list(self._sockets.values()), [], [], _TICK_SECONDS)
        return [kind for kind, sock in self._sockets.items() if sock in ready]

    def _read(self, kind: Kind) -> None:
        try:
            while frame := self._sockets[kind].receive():
                if not self._reading.take(monotonic()):
                    self._stopping.wait(_TICK_SECONDS / 10)
                    return
                arrival = echo.decode(frame.data, pending=frame.pending)
                host = self._host(arrival.source) if arrival else None
                if arrival and host:
                    self._take(kind, host, arrival)
        except OSError:
            self._sockets.pop(kind).close()
            self._stopping.wait(_TICK_SECONDS / 10)

    def _host(self, mac: bytes) -> str | None:
        """The other host that has a MAC."""
        if mac not in self._macs and set(self._macs.values()) != set(self._cluster.hosts):
            self._macs = {self._mac(host): host for host in list(self._cluster.hosts)}
        host = self._macs.get(mac)
        return host if host in self._cluster.hosts and host != self._me.id else None

    def _take(self, kind: Kind, host: str, arrival: Arrival) -> None:
        probe = arrival.probe
        if not probe.answer:
            self._answer(kind, host, arrival)
            return
        with self._changed:
            one = self._asking.get(probe.nonce)
            if one and (one.peer, one.kind) == (host, kind):
                one.receive(probe, arrival.intact, monotonic())
                if one.settled:
                    self._changed.notify_all()

    def _answer(self, kind: Kind, host: str, arrival: Arrival) -> None:
        probe = arrival.probe
        with self._changed:
            heard = self._heard.setdefault((host, kind), Heard())
            first = not heard.knows(probe.nonce)
            counts = heard.take(probe, arrival.intact, time())
            last = self._done.get((host, kind))
            now = monotonic()
            allowance = self._answering.setdefault(host, TokenBucket(_ANSWER_RATE, _ANSWER_BURST, now))
        if first and last and not last.answered:
            self.on_heard(host)
        if not allowance.take(now):
            return
        large = probe.purpose in (Purpose.FULL, Purpose.LADDER)
        if large or not arrival.intact:
            self._send(kind, host, _answer_to(probe, Purpose.REPORT, SMALL_SIZE, counts))
        if arrival.intact:
            size = min(probe.size, self._size(kind)) if large else SMALL_SIZE
            self._send(kind, host, _answer_to(probe, probe.purpose, size, counts))


def _answer_to(probe: Probe, purpose: Purpose, size: int, counts: Counts) -> Probe:
    protocol = echo.Protocol.ICMP if purpose is Purpose.REPORT else probe.protocol
    return Probe(True, purpose, probe.nonce, probe.number, size, counts, protocol)
