"""The resolver's sockets: receive a question, find out who asks, have it answered; floods stay outside.

A known asker is answered in the loop that reads its socket. One that is not known yet (a container that has just
started) waits elsewhere, so that the others do not. Over UDP a source that asks too much is kept out by a filter in
the kernel; over TCP a source has a few connections.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import monotonic
from typing import Protocol

from weft.bucket import TokenBucket
from weft.names.dns import Responder
from weft.names.lookup import Asker

log = logging.getLogger(__name__)

_IP_FREEBIND = 15
_BACKLOG = 64
_TICK = struct.pack("ll", 0, 250_000)
"""A struct timeval: how often a loop looks whether it shall end. A timeout of Python's own would cost a system call
for each packet."""


class Directory(Protocol):
    """Who asks, by source address; see `askers.Askers`."""

    def known(self, source: str) -> Asker | None:
        """At once."""
        ...

    def find(self, source: str) -> Asker | None:
        """After asking Docker, if need be."""
        ...


class Limiter:
    """A token bucket for each source.

    :param rate: questions per second in the long run.
    :param burst: questions at once.
    """

    _SOURCES = 10_000

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: dict[str, TokenBucket] = {}

    def allows(self, source: str, now: float) -> bool:
        bucket = self._buckets.get(source)
        if bucket is None:
            if len(self._buckets) >= self._SOURCES:  # forged ones; forgetting all is what takes no time
                self._buckets.clear()
            bucket = self._buckets[source] = TokenBucket(self._rate, self._burst, now)
        return bucket.take(now)


class DnsServer:
    """Serves on sockets that it is given, from `start()` to `stop()`, which closes them.

    :param sockets: bound ones, UDP and TCP alike; of IPv4.
    """

    RATE, BURST = 2_000, 4_000
    _CONNECTIONS = 16
    """Of a source, at once."""
    _IDLE_SECONDS = 5.0
    _UNKNOWN = 256
    """Questions of unknown askers that may wait; any more are refused at once."""

    def __init__(
        self,
        responder: Responder,
        directory: Directory,
        sockets: Iterable[socket.socket],
        *,
        rate: float = RATE,
        burst: float = BURST,
    ) -> None:
        self._responder = responder
        self._directory = directory
        self._sockets = list(sockets)
        self._rates = rate, burst
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._unknown = threading.Semaphore(self._UNKNOWN)
        self._connections: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._finding = ThreadPoolExecutor(8, "dns-unknown")

    def start(self) -> None:
        for one in self._sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TICK)
            serve = self._serve_udp if one.type == socket.SOCK_DGRAM else self._serve_tcp
            self._threads.append(threading.Thread(target=serve, args=(one,), name="dns", daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=5)
        self._finding.shutdown(wait=False, cancel_futures=True)
        for one in self._sockets:
            one.close()

    def _serve_udp(self, udp: socket.socket) -> None:
        limiter, gate = Limiter(*self._rates), _Gate(udp)
        while not self._stopping.is_set():
            try:
                wire, peer = udp.recvfrom(4096)
                now = monotonic()
                if limiter.allows(peer[0], now):
                    self._serve_datagram(udp, wire, peer)
                else:
                    gate.shut(peer[0], now)
                gate.open(now)
            except (BlockingIOError, InterruptedError):
                gate.open(monotonic())
            except OSError as error:  # of a packet before: unreachable, no route
                log.debug("a question for names: %s", error)
            except Exception:
                log.exception("serving a question for names met a bug")

    def _serve_datagram(self, udp: socket.socket, wire: bytes, peer: tuple[str, int]) -> None:
        asker = self._directory.known(peer[0])
        if asker is None and self._unknown.acquire(blocking=False):
            self._finding.submit(self._serve_unknown, udp, wire, peer)
            return
        self._reply(udp, wire, peer, asker)

    def _serve_unknown(self, udp: socket.socket, wire: bytes, peer: tuple[str, int]) -> None:
        """Somewhere else, so that those who are known do not wait."""
        try:
            self._reply(udp, wire, peer, self._directory.find(peer[0]))
        except Exception:
            log.exception("finding out who asks for names met a bug")
        finally:
            self._unknown.release()

    def _reply(self, udp: socket.socket, wire: bytes, peer: tuple[str, int], asker: Asker | None) -> None:
        reply = self._responder.respond(wire, asker)
        if reply is not None:
            with suppress(OSError):  # the asker is gone, or the server
                udp.sendto(reply, peer)

    def _serve_tcp(self, tcp: socket.socket) -> None:
        limiter = Limiter(*self._rates)
        while not self._stopping.is_set():
            try:
                connection, peer = tcp.accept()
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                log.warning("no TCP connection for names: %s", error)
                self._stopping.wait(1)
                continue
            if self._count(peer[0], 1) > self._CONNECTIONS:
                self._count(peer[0], -1)
                connection.close()
                continue
            work = self._serve_connection
            threading.Thread(target=work, args=(connection, peer[0], limiter), name="dns-tcp", daemon=True).start()

    def _count(self, source: str, change: int) -> int:
        """Connections of a source after this change."""
        with self._counting:
            self._connections[source] += change
            count = self._connections[source]
            if not count:
                del self._connections[source]
            return count

    def _serve_connection(self, connection: socket.socket, source: str, limiter: Limiter) -> None:
        try:
            connection.settimeout(self._IDLE_SECONDS)
            with connection, connection.makefile("rb") as stream:
                while not self._stopping.is_set() and limiter.allows(source, monotonic()):
                    size = stream.read(2)
                    wire = stream.read(int.from_bytes(size, "big"))
                    asker = self._directory.known(source) or self._directory.find(source)
                    reply = self._responder.respond(wire, asker, stream=True)
                    if reply is None:
                        return
                    connection.sendall(len(reply).to_bytes(2, "big") + reply)
        except OSError as error:
            log.debug("a TCP connection for names: %s", error)
        except Exception:
            log.exception("serving names over TCP met a bug")
        finally:
            self._count(source, -1)


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filters", ctypes.POINTER(_Filter)))


class _Gate:
    """Keeps a source that asks too much away from a socket for a while, in the kernel.

    Reading its packets only to drop them would leave the others' in an overflowing queue.
    """

    _SECONDS = 1.0
    _MOST = 64
    _SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
    _LOAD, _IS, _RETURN = 0x20, 0x15, 0x06
    """BPF_LD+BPF_W+BPF_ABS, BPF_JMP+BPF_JEQ+BPF_K, BPF_RET+BPF_K (linux/bpf_common.h)."""
    _SOURCE = 0xFFF00000 + 12
    """SKF_NET_OFF: from the IPv4 header on, in which the source is at 12."""

    def __init__(self, udp: socket.socket) -> None:
        self._udp = udp
        self._until: dict[str, float] = {}
        self._next = float("inf")

    def shut(self, source: str, now: float) -> None:
        if source in self._until or len(self._until) >= self._MOST:
            return
        log.warning("container at %s asks for names too often: nothing of it is read for a second", source)
        self._until[source] = now + self._SECONDS
        self._apply()

    def open(self, now: float) -> None:
        if now >= self._next:
            self._until = {source: until for source, until in self._until.items() if until > now}
            self._apply()

    def _apply(self) -> None:
        self._next = min(self._until.values(), default=float("inf"))
        if not self._until:
            with suppress(OSError):  # there was none
                self._udp.setsockopt(socket.SOL_SOCKET, self._SO_DETACH_FILTER, 0)
            return
        code = [(self._LOAD, 0, 0, self._SOURCE)]
        for source in self._until:
            code += [(self._IS, 0, 1, int.from_bytes(socket.inet_aton(source), "big")), (self._RETURN, 0, 0, 0)]
        code.append((self._RETURN, 0, 0, 0xFFFFFFFF))
        filters = (_Filter * len(code))(*(_Filter(*instruction) for instruction in code))
        program = bytes(_Program(len(code), filters))
        with suppress(OSError):
            self._udp.setsockopt(socket.SOL_SOCKET, self._SO_ATTACH_FILTER, program)


def bind(address: str, port: int = 53) -> list[socket.socket]:
    """A UDP and a TCP socket on an address, which need not exist yet, in the namespace of the calling thread."""
    udp, tcp = (socket.socket(socket.AF_INET, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM))
    try:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        for one in (udp, tcp):
            one.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            one.bind((address, port))
        tcp.listen(_BACKLOG)
    except OSError:
        udp.close()
        tcp.close()
        raise
    return [udp, tcp]
