"""A stand-in for the Docker Engine's API on a unix socket: the little of it that weft's collector reads."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

from tests.netns.plugin import Endpoint, Network


class DockerApi(ThreadingMixIn, UnixStreamServer):
    """Answers nothing about networks but an error, except while a test tells what the engine has."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Handler)
        self.url = f"unix://{path}"
        self.version = {"ApiVersion": "1.41", "Version": "20.10.24"}
        self.closed = False
        self._networks: list[dict[str, Any]] | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.closed = True
        self._tell(None)
        self.shutdown()
        self.server_close()

    @contextmanager
    def has(self, *networks: Network, endpoints: tuple[Endpoint, ...] = ()) -> Iterator[None]:
        """The engine has these networks and attached endpoints, and no others."""
        self._tell([_described(network, [e for e in endpoints if e.network == network]) for network in networks])
        try:
            yield
        finally:
            self._tell(None)

    def networks(self) -> list[dict[str, Any]] | None:
        return self._networks

    def wait_for_change(self) -> None:
        with self._changed:
            self._changed.wait()

    def _tell(self, networks: list[dict[str, Any]] | None) -> None:
        with self._changed:
            self._networks = networks
            self._changed.notify_all()


def _described(network: Network, endpoints: list[Endpoint]) -> dict[str, Any]:
    length = network.cidr.split("/")[1]
    return {
        "Id": network.id,
        "Name": f"net-{network.id[:8]}",
        "Driver": "weft",
        "IPAM": {"Driver": "weft", "Config": [{"Subnet": network.cidr, "Gateway": network.gateway}]},
        "Containers": {
            f"container-of-{e.id}": {"EndpointID": e.id, "IPv4Address": f"{e.address}/{length}", "IPv6Address": ""}
            for e in endpoints
        },
    }


class _Handler(BaseHTTPRequestHandler):
    server: DockerApi
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        what = self.path.partition("?")[0].split("/")[1:]
        what = what[1:] if what[0].startswith("v1.") else what
        networks = self.server.networks()
        match what:
            case ["version"]:
                self._answer(200, self.server.version)
            case ["events"]:
                self._events()
            case _ if networks is None:
                self._answer(503, {"message": "not now"})
            case ["containers", "json"]:
                self._answer(200, [])
            case ["containers", *_]:
                self._answer(404, {"message": "no such container"})
            case ["networks"]:
                self._answer(200, networks)
            case ["networks", network_id]:
                found = [network for network in networks if network["Id"] == network_id]
                self._answer(*((200, found[0]) if found else (404, {"message": "no such network"})))

    def _answer(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _events(self) -> None:
        """One event per change, until the other side goes away. It names no network: any may have changed."""
        event = b'{"Type": "network", "Action": "connect", "Actor": {"ID": "", "Attributes": {"container": "c1"}}}\n'
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.server.wait_for_change()
                if self.server.closed:
                    self.close_connection = True
                    return
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        except OSError:
            self.close_connection = True

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        pass
