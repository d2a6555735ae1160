"""What the Docker Engine is asked for a network, by its age."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from weft.engine.client import DockerEngine
from weft.errors import EngineError
from weft.model import Network, Pool, Published

EVENT = {"Type": "network", "Action": "prune", "Actor": {"ID": "", "Attributes": {"reclaimed": "0"}}}
V4, V6 = Pool("10.77.0.0/24"), Pool("fd00:77::/64")


def network(*pools: Pool) -> Network:
    return Network(42, "app", pools, 0, False, "h1", published=Published(labels={"a": "b"}, ipv6=V6 in pools))


@contextmanager
def engine(api: str) -> Iterator[tuple[DockerEngine, list[dict[str, Any]]]]:
    """An engine of that API version that starts nothing, and the networks that it was asked to make."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(EVENT if "/events" in self.path else {"ApiVersion": api})

        def do_POST(self) -> None:
            if self.path == f"/v{api}/containers/web/start":
                self._answer({"message": "no such device"}, 500)
                return
            assert self.path == f"/v{api}/networks/create"
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer({"Id": "made"})

        def _answer(self, reply: Mapping[str, Any], status: int = 200) -> None:
            text = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        log_message: Callable[..., None] = lambda *_: None

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield DockerEngine(f"tcp://127.0.0.1:{server.server_port}", "weft"), asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("api", ["1.41", "1.48"])
def test_a_network_as_it_is_asked_for(api: str) -> None:
    with engine(api) as (docker, asked):
        assert docker.create(network(V4, V6)) == "made"
    (one,) = asked
    assert (one["Name"], one["Driver"], one["IPAM"]["Driver"]) == ("app", "weft", "weft")
    assert [pool["Subnet"] for pool in one["IPAM"]["Config"]] == [V4.cidr, V6.cidr]
    assert (one["EnableIPv6"], one["Labels"], one["CheckDuplicate"]) == (True, {"a": "b"}, True)
    assert "EnableIPv4" not in one


def test_a_network_of_ipv6_alone_needs_an_engine_that_knows_it() -> None:
    with engine("1.48") as (docker, asked):
        docker.create(network(V6))
    assert (asked[0]["EnableIPv4"], asked[0]["EnableIPv6"]) == (False, True)
    with engine("1.47") as (docker, asked):
        with pytest.raises(EngineError, match="network app has no IPv4: it takes Docker Engine 28"):
            docker.create(network(V6))
        assert asked == []


def test_a_container_that_cannot_be_started_says_why() -> None:
    with engine("1.41") as (docker, _):
        assert docker.start("web") == "no such device"


def test_a_prune_is_told_and_everything_may_have_changed() -> None:
    seen: list[str] = []
    with engine("1.41") as (docker, _), pytest.raises(EngineError, match="closed the event stream"):
        docker.follow(seen.append, lambda: seen.append("pruned"))
    assert seen == ["", "pruned", ""]
