"""The resolver's sockets: receive a question, find out who asks, have it answered; floods stay outside.

A known asker is answered in the loop that reads the sockets. One that is not known yet (a container that has just
started) waits elsewhere, so that the others do not. Over UDP each source has its turn and a rate, and one that asks
more is kept out (see `queues`); over TCP it has a few connections.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from time import monotonic
from typing import Protocol

from weft.bucket import TokenBucket
from weft.names.dns import Responder
from weft.names.lookup import Asker
from weft.names.queues import Queue

log = logging.getLogger(__name__)

_TICK = 0.25
"""Seconds: how often a loop looks whether it shall end."""
_TURN = 16
"""Questions of one queue before the next has its turn: so many share the cost of looking which queues have any."""


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
    _MOST_CONNECTIONS = 128
    """Of all. The oldest gives way: sources can be forged, and each takes a thread and a file of weft's."""
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
        self._connections: dict[socket.socket, str] = {}
        """Those that are served, the oldest first, and whose they are."""
        self._admitting = threading.Lock()
        self._finding = ThreadPoolExecutor(8, "dns-unknown")

    def start(self) -> None:
        udp = [one for one in self._sockets if one.type == socket.SOCK_DGRAM]
        self._threads.append(threading.Thread(target=self._serve_udp, args=(udp,), name="dns", daemon=True))
        for one in self._sockets:
            if one.type == socket.SOCK_STREAM:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, int(_TICK * 1e6)))
                self._threads.append(threading.Thread(target=self._serve_tcp, args=(one,), name="dns", daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=5)
        self._finding.shutdown(wait=False, cancel_futures=True)
        for one in self._sockets:
            one.close()

    def _serve_udp(self, sockets: Iterable[socket.socket]) -> None:
        """A few questions of each queue that has some, and again: so no source waits for all of another's."""
        limiter = Limiter(*self._rates)
        queues = {one.fileno(): Queue(one) for one in sockets}
        looked = monotonic()
        with closing(select.epoll()) as ready:
            for number in queues:
                ready.register(number, select.EPOLLIN)
            while not self._stopping.is_set():
                for number, _ in ready.poll(_TICK):
                    self._serve_turn(queues[number], limiter)
                if (now := monotonic()) - looked >= _TICK:
                    looked = now
                    for queue in queues.values():
                        queue.open(now)

    def _serve_turn(self, queue: Queue, limiter: Limiter) -> None:
        now = monotonic()
        try:
            for _ in range(_TURN):
                if (taken := queue.take()) is None:
                    continue
                wire, peer = taken
                if limiter.allows(peer[0], now):
                    self._serve_datagram(queue.udp, wire, peer)
                else:
                    queue.shut(peer[0], now)
            queue.judge(now)
        except BlockingIOError:
            pass  # it is empty
        except OSError as error:
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
        if reply := self._responder.respond(wire, asker):
            try:
                udp.sendto(reply, peer)
            except OSError as error:  # the asker is gone, or the server
                log.debug("an answer about a name: %s", error)

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
            if not self._admit(connection, peer[0]):
                connection.close()
                continue
            work = self._serve_connection
            threading.Thread(target=work, args=(connection, peer[0], limiter), name="dns-tcp", daemon=True).start()

    def _admit(self, connection: socket.socket, source: str) -> bool:
        with self._admitting:
            if list(self._connections.values()).count(source) >= self._CONNECTIONS:
                return False
            if len(self._connections) >= self._MOST_CONNECTIONS:
                oldest = next(iter(self._connections))
                del self._connections[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread finds that, and closes it
            self._connections[connection] = source
        return True

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
            with self._admitting:
                self._connections.pop(connection, None)
