"""The opt-in listener: health, metrics and the page over HTTP, read-only and without a password.

It lives in the daemon's process and must not cost the driver anything. waitress fits: one thread of its own reads and
writes all sockets, so a client that is slow, at either, holds a socket and no thread; a few threads answer; what waits
for them, and how much of a request is read, is bounded. What it lacks is added here: a connection has a longest life
(by itself it lives on as long as a byte comes now and then), one whose receiver has stopped reading is ended, and if
there are too many the oldest makes room, so that those who hold many keep out nobody.

A browser may be led here by a page of somebody else's. Such a page can have its own name point to this address ("DNS
rebinding"), but not send another name than its own: so a request must name this host. An address is no name, and cannot
be rebound.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from ipaddress import ip_address
from time import monotonic, sleep
from typing import Any, Protocol
from urllib.parse import urlsplit

from flask import Flask, Response, jsonify, request
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import TcpWSGIServer
from waitress.wasyncore import close_all
from werkzeug.exceptions import HTTPException, MethodNotAllowed, MisdirectedRequest, ServiceUnavailable

from weft.config import Place
from weft.errors import WeftError

log = logging.getLogger(__name__)

STREAMS = 6
"""Streams of events at once: each has a thread while it lasts."""
_THREADS = STREAMS + 2
_CONNECTIONS = 100
_PER_SECOND = 100
_REST, _REST_MOST = 3, 0.2
"""After an answer, three times as long as it took; and the most, in seconds."""
_IDLE_SECONDS = 10
_LIFE_SECONDS = 30
"""Of a connection, but for streams: enough for the slowest honest client."""
_HEADER_BYTES = 16 << 10
_BODY_BYTES = 1024
"""Nothing here reads one."""
_UNREAD_SECONDS = 20
_RETRY_SECONDS = 5.0

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Health(Protocol):
    """See `health.Health`. Both give lines for a person, and none if all is well."""

    def stuck(self) -> Iterable[str]: ...
    def hindered(self) -> Iterable[str]: ...


class Streams:
    """Hands out the few streams of events that there can be at once."""

    def __init__(self, most: int = STREAMS) -> None:
        self._free = threading.BoundedSemaphore(most)

    def respond(self, events: Iterable[str]) -> Response:
        """An answer that goes on as `events` do, and with them; 503 if there are too many.

        Each of `events` is sent at once. A client that has gone is noticed when something is sent to it, so something,
        if only a comment, should be every few seconds.
        """
        if not self._free.acquire(blocking=False):
            raise ServiceUnavailable("too many streams", retry_after=_UNREAD_SECONDS)
        response = Response(events, mimetype="text/event-stream")
        response.call_on_close(self._free.release)
        return response


def create_web(health: Health, metrics: Callable[[], bytes], names: Collection[str]) -> Flask:
    """The application behind the listener. Who adds to it need not care for what every answer must have.

    :param metrics: all of them as text.
    :param names: of this host, in lower case, besides its addresses and `localhost`.
    """
    app = Flask("weft.web.listener", static_folder=None)
    app.url_map.merge_slashes = False
    ours = {"localhost", *names}

    @app.before_request
    def check() -> None:
        if not _names_us(request.headers.get("Host", ""), ours):
            raise MisdirectedRequest("this host has no such name: use its address, or name it in WEFT_LISTEN_NAMES")
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(["GET", "HEAD"])

    @app.get("/healthz")
    def live() -> tuple[Response, int]:
        return _healthy(health, tolerant=True)

    @app.get("/readyz")
    def ready() -> tuple[Response, int]:
        return _healthy(health, tolerant=False)

    @app.get("/metrics")
    def expose() -> Response:
        return Response(metrics(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @app.errorhandler(Exception)
    def refuse(error: Exception) -> Response:
        if isinstance(error, HTTPException):
            given = error.get_response()
            headers = {name: given.headers[name] for name in ("Allow", "Retry-After") if name in given.headers}
            return _plain(f"{error.name}: {error.description}", error.code or 500, headers)
        if isinstance(error, WeftError):
            return _plain(str(error), 503, {})
        log.exception("a bug in weft: GET %s", request.path)
        return _plain(f"weft met a bug ({type(error).__name__}): its log has the details", 500, {})

    @app.after_request
    def protect(response: Response) -> Response:
        response.headers.update(_HEADERS)
        return response

    return app


def _healthy(health: Health, *, tolerant: bool) -> tuple[Response, int]:
    stuck, hindered = list(health.stuck()), list(health.hindered())
    status = "stuck" if stuck else "hindered" if hindered else "ok"
    good = status == "ok" or (tolerant and status == "hindered")
    return jsonify(status=status, stuck=stuck, hindered=hindered), 200 if good else 503


def _plain(message: str, status: int, headers: dict[str, str]) -> Response:
    return Response(f"{message}\n", status, headers, content_type="text/plain; charset=utf-8")


def _names_us(host: str, ours: Collection[str]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    with suppress(ValueError):
        return bool(ip_address(name))
    return name.removesuffix(".") in ours


class Listener:
    """Serves an application from `start()` to `stop()`.

    A place that cannot be had is said in the log and tried again: the network of this host does not depend on it.
    """

    def __init__(self, app: Flask, place: Place) -> None:
        self._app = app
        self._place = place
        self._server: _Server | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="web", daemon=True)
        self.problem = ""
        """Why nobody can connect; "" if one can."""

    @property
    def port(self) -> int:
        """The one that is listened on; 0 while there is none."""
        return int(self._server.effective_port) if self._server else 0

    def start(self) -> None:
        if not ip_address(self._place.address).is_loopback:
            log.warning(
                "%s: whoever reaches this address can read, without a password, health, metrics, and the page with all "
                "hosts, networks, containers, faults and events of the cluster",
                self._place,
            )
        logging.getLogger("waitress").setLevel(logging.ERROR)  # its warnings are what clients do, one line for each
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if server := self._server:
            server.stop()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                with _bind(self._place) as bound:
                    self._server = _Server(self._app, bound)
                    log.info("health, metrics and the page are at http://%s", self._place)
                    self.problem = ""
                    if not self._stopping.is_set():
                        self._server.run()
            except OSError as error:
                self._note(f"cannot listen on {self._place} (WEFT_LISTEN): {error.strerror}")
            except Exception:
                log.exception("serving %s met a bug; trying again", self._place)
            self._server = None
            self._stopping.wait(_RETRY_SECONDS)

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            log.error("%s; nobody can read health and metrics of this host; trying again", problem)
        self.problem = problem


def _bind(place: Place) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in place.address else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((place.address, place.port))
    except OSError:
        bound.close()
        raise
    return bound


def _in_turn(app: Flask) -> Callable[[Any, Any], Iterable[bytes]]:
    """The application, but for what streams bring: one answer at a time, and a rest after each.

    More threads that run would not be faster, and each is one more that the driver's have to wait for.
    """
    turn, due = threading.Lock(), 0.0

    def answer(environ: Any, start: Any) -> Iterable[bytes]:
        nonlocal due
        with turn:
            sleep(max(0.0, due - monotonic()))
            began = monotonic()
            try:
                return app(environ, start)
            finally:
                due = monotonic() + min(_REST * (monotonic() - began), _REST_MOST)

    return answer


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    path = ""
    """waitress 3.0.2 names it when a client has gone, also if nothing could be read from that one."""


class _Channel(HTTPChannel):  # type: ignore[misc]
    parser_class = _Parser


class _Server(TcpWSGIServer):  # type: ignore[misc]
    """waitress, with limits that it lacks."""

    channel_class = _Channel

    def __init__(self, app: Flask, bound: socket.socket) -> None:
        limits = Adjustments(
            sockets=[bound],
            threads=_THREADS,
            connection_limit=1 << 16,  # whoever reaches that is not accepted; here the oldest goes instead
            channel_timeout=_IDLE_SECONDS,
            cleanup_interval=1,
            max_request_header_size=_HEADER_BYTES,
            max_request_body_size=_BODY_BYTES,
            channel_request_lookahead=1,  # so that a client that has gone is noticed while it is being answered
            asyncore_use_poll=True,  # select(2) knows no descriptor above 1023
            log_socket_errors=False,
            ident="weft",
        )
        place = (bound.family, bound.type, bound.proto, bound.getsockname())
        self._second, self._accepted = 0.0, 0
        super().__init__(_in_turn(app), {}, _sock=bound, adj=limits, bind_socket=False, sockinfo=place)

    def set_socket_options(self, conn: socket.socket) -> None:
        super().set_socket_options(conn)
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)

    def readable(self) -> bool:
        """Whether to accept one. What is too much waits in the kernel, where it costs nothing."""
        if (now := monotonic()) - self._second >= 1:
            self._second, self._accepted = now, 0
        return bool(super().readable()) and self._accepted < _PER_SECOND

    def handle_accept(self) -> None:
        """Of too many, the one goes that has waited longest for its own client: an honest one waits for none."""
        super().handle_accept()
        self._accepted += 1
        if len(self.active_channels) > _CONNECTIONS:
            waiting = [channel for channel in self.active_channels.values() if not channel.requests]
            min(waiting, key=lambda channel: channel.creation_time).handle_close()

    def maintenance(self, now: float) -> None:
        super().maintenance(now)
        for channel in self.active_channels.values():
            if not channel.requests and channel.creation_time < now - _LIFE_SECONDS:
                channel.will_close = True

    def run(self) -> None:
        try:
            super().run()
        finally:
            close_all(self._map)
            self.task_dispatcher.shutdown(timeout=0)

    def stop(self) -> None:
        """From another thread: end `run`."""
        pulled = threading.Event()

        def close() -> None:
            pulled.wait()  # somebody else may have pulled, and what is pulled must be open
            close_all(self._map)

        self.trigger.pull_trigger(close)
        pulled.set()
