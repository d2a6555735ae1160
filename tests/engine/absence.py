"""weft is away, and the engine's calls get lost at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from threading import Thread

from lab import Host
from lab.host import PLUGIN_SOCKET


class _Refusal(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *_: object) -> None:
        """Not to the terminal."""


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


@contextmanager
def without_weft(host: Host) -> Iterator[None]:
    """What the engine tells weft meanwhile is refused, and so lost.

    With nobody at the socket it would try each call for 15 s first, three calls for each thing that is removed.
    """
    host.stop_weft()
    socket = Path(f"{host.root}{PLUGIN_SOCKET}")
    with _Server(str(socket), _Refusal) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            with suppress(FileNotFoundError):
                socket.unlink()
    host.start_weft()
