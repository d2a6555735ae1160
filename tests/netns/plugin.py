"""A running weft on a throw-away host, and the Docker Engine's side of the conversation with it.

A host is a network namespace with an underlay and a mount namespace with its own /run; `python -m weft serve` runs
there as it would on a machine. The engine's HTTP is written by hand: no Content-Type, an empty Host, connections that
are kept or cut. What the calls did is judged by `ip`, by `bridge` and by reading the store's file.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from http.client import HTTPConnection, HTTPResponse
from ipaddress import ip_network
from itertools import count
from pathlib import Path
from secrets import token_hex
from select import select
from typing import Any, Self

import weft
from weft.ipam import LOCAL_SPACE
from weft.model import BINDINGS
from weft.store.sqlite import SqliteStore

IPAM_CALLS = {"GetDefaultAddressSpaces", "RequestPool", "ReleasePool", "RequestAddress", "ReleaseAddress"}
GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}

_HOLDER = """
mount -t tmpfs run /run
mount --make-shared /run
mkdir -p /run/docker/plugins
ip link set lo up
ip link add eth0 type veth peer name cable
ip addr add "$0/24" dev eth0
ip link set cable up
ip link set eth0 up
echo ready
exec sleep infinity
"""
_START_SECONDS = 15.0
_numbers = count(1)


def wait_until(condition: Callable[[], object], what: str, timeout: float = 8.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.01)


def fresh_pool(v6: bool = False) -> str:
    """A subnet that no other case uses."""
    number = next(_numbers)
    return f"fd00:{number:x}::/64" if v6 else f"10.{100 + number // 256}.{number % 256}.0/24"


def get(place: str, path: str) -> tuple[int, str]:
    """Status and text of what WEFT_LISTEN serves, from the calling thread's namespace."""
    with closing(HTTPConnection(place, timeout=10)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def refusal(self) -> str:
        """The message, "" if the call was done."""
        return str(self.body.get("Err") or self.body.get("Error") or "")


class Connection:
    """One keep-alive connection of the engine."""

    def __init__(self, path: Path, timeout: float = 20.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, path: str, body: bytes, *, method: str = "POST", host: str = "", cut: int | None = None) -> None:
        """Write a request as an engine does, or only its first `cut` bytes."""
        head = (
            f"{method} /{path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: Go-http-client/1.1\r\n"
            f"Content-Length: {len(body)}\r\nAccept: application/vnd.docker.plugins.v1.2+json\r\n"
            "Accept-Encoding: gzip\r\n\r\n"
        )
        # Who refuses a long body closes before it is all there; the answer can be read nevertheless.
        with suppress(BrokenPipeError):
            self._socket.sendall((head.encode() + body)[:cut])

    def receive(self) -> Reply:
        response = HTTPResponse(self._socket)
        response.begin()
        text = response.read()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(text))

    def ends(self, seconds: float) -> bool:
        """Whether the server closes it, or says more, within so many seconds."""
        return bool(select([self._socket], [], [], seconds)[0])

    def call(self, path: str, body: bytes, *, method: str = "POST", host: str = "") -> Reply:
        self.send(path, body, method=method, host=host)
        return self.receive()


class Host:
    """Namespaces with an underlay address, held by a process."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-ec", _HOLDER, address], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "ready\n"

    @property
    def pid(self) -> int:
        return self._holder.pid

    @property
    def root(self) -> Path:
        """The files as processes of this host see them."""
        return Path(f"/proc/{self.pid}/root")

    def enter(self, argv: Iterable[str]) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "--", *argv]

    def run(self, *argv: str, check: bool = True) -> str:
        return subprocess.run(self.enter(argv), check=check, text=True, stdout=subprocess.PIPE).stdout

    def json(self, *argv: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run(*argv) or "[]")
        return found

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()


class Plugin:
    """`weft serve` on a host of its own.

    :param folder: where its state, its log and, unless `store` is given, the store's file are.
    :param settings: more settings, without their prefix.
    """

    def __init__(self, folder: Path, address: str = "192.168.78.1", store: Path | None = None, **settings: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.host = Host(address)
        self.log = folder / "log"
        self.state = folder / "state"
        self.store_path = store or folder / "weft.db"
        self.settings = {
            "state": str(self.state),
            "store": f"sqlite://{self.store_path}",
            "hostname": folder.name,
            "underlay": address,
            "docker": "off",
            "probe_interval": "0",
            "log": "info",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.host.root / "run/docker/plugins/weft.sock"

    def environment(self, **settings: str) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("WEFT_")}
        ours = {f"WEFT_{key.upper()}": value for key, value in {**self.settings, **settings}.items()}
        return {**inherited, **ours, "PYTHONPATH": str(Path(weft.__file__).parent.parent)}

    def command(self, wrapper: Sequence[str] = (), arguments: Sequence[str] = ("serve",)) -> list[str]:
        return self.host.enter([*wrapper, sys.executable, "-m", "weft", *arguments])

    def run_command(self, *arguments: str) -> str:
        """What `weft ARGUMENTS` prints."""
        argv, environment = self.command(arguments=arguments), self.environment()
        return subprocess.run(argv, env=environment, check=True, text=True, stdout=subprocess.PIPE, timeout=30).stdout

    def spawn(self, wrapper: Sequence[str] = ()) -> None:
        """Begin to start; `wrapper` is a command that runs the one after it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command(wrapper), env=self.environment(), stdout=log, stderr=log)

    def start(self, wrapper: Sequence[str] = ()) -> Self:
        self.spawn(wrapper)
        wait_until(self.answers, "weft's start", _START_SECONDS)
        return self

    def answers(self) -> bool:
        assert self.process
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.call("Plugin.Activate").status == 200
        except OSError:
            return False

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> None:
        if self.process:
            self.process.send_signal(with_signal)
            self.process.wait(15)
            self.process = None

    def restart(self, wrapper: Sequence[str] = ()) -> None:
        self.stop()
        self.start(wrapper)

    def run_to_end(self, wrapper: Sequence[str] = (), **settings: str) -> subprocess.CompletedProcess[str]:
        """Start one that is expected to give up."""
        environment = self.environment(**settings)
        return subprocess.run(self.command(wrapper), env=environment, capture_output=True, text=True, timeout=30)

    def close(self) -> None:
        self.stop()
        self.host.close()
        if "store" in self.__dict__:
            self.store.close()

    # What the engine says

    def connect(self) -> Connection:
        return Connection(self.socket)

    def call(self, name: str, body: dict[str, Any] | None = None) -> Reply:
        with self.connect() as connection:
            return connection.call(name, encode(body))

    def ok(self, name: str, **fields: Any) -> dict[str, Any]:
        """The answer to a call that must be done."""
        reply = self.call(full_name(name), fields)
        assert reply.status == 200, reply
        assert not reply.refusal, (name, fields, reply.refusal)
        answer: dict[str, Any] = reply.body
        return answer

    def refused(self, name: str, **fields: Any) -> str:
        """The message of a call that must be refused: one line, in the field that the engine reads."""
        reply = self.call(full_name(name), fields)
        assert reply.status == 200, reply
        message: str = reply.body["Error" if name in IPAM_CALLS else "Err"]
        assert message
        assert "\n" not in message
        return message

    def request_pool(self, cidr: str = "", sub: str = "", *, v6: bool = False) -> str:
        asked = {"AddressSpace": LOCAL_SPACE, "Pool": cidr, "SubPool": sub, "Options": None, "V6": v6 or ":" in cidr}
        answer = self.ok("RequestPool", **asked)
        assert answer["Pool"] == cidr or not cidr
        pool_id: str = answer["PoolID"]
        return pool_id

    def request_address(self, pool_id: str, address: str = "", options: Any = None) -> str:
        """The address alone; that its prefix length is the pool's is checked."""
        got, length = self.ok("RequestAddress", PoolID=pool_id, Address=address, Options=options)["Address"].split("/")
        assert length == pool_id.split("/")[2]
        return str(got)

    def request_gateway(self, pool_id: str, address: str = "") -> str:
        return self.request_address(pool_id, address, GATEWAY)

    def network(self, cidr: str = "", *, network_id: str = "", internal: bool = False) -> Network:
        """`docker network create`."""
        cidr = cidr or fresh_pool()
        pool_id = self.request_pool(cidr)
        network = Network(network_id or token_hex(32), cidr, pool_id, self.request_gateway(pool_id), internal)
        assert self.ok("CreateNetwork", **network.request()) == {}
        return network

    def addressed(self, network: Network, address: str = "", mac: str = "") -> Endpoint:
        """An endpoint that has its address, and is about to be created."""
        return Endpoint(network, token_hex(32), self.request_address(network.pool_id, address), mac)

    def endpoint(self, network: Network, address: str = "", mac: str = "") -> Endpoint:
        """The first half of `docker run`: an address and an endpoint."""
        endpoint = self.addressed(network, address, mac)
        answer = self.ok("CreateEndpoint", **endpoint.request())
        return replace(endpoint, mac=mac or answer["Interface"]["MacAddress"])

    def join(self, endpoint: Endpoint, sandbox: str = "/run/docker/netns/none", *, route: str = "") -> str:
        """The name of the container's interface; everything else about the answer is checked.

        :param route: destination of the one static route that has to be there.
        """
        options: dict[str, Any] = {"com.docker.network.portmap": [], "com.docker.network.endpoint.exposedports": []}
        answer = self.ok("Join", **endpoint.ids, SandboxKey=sandbox, Options=options)
        name: str = answer["InterfaceName"]["SrcName"]
        routes = {"StaticRoutes": [{"Destination": route, "RouteType": 1}]} if route else {}
        assert answer == {"InterfaceName": {"SrcName": name, "DstPrefix": "eth"}, **routes}
        return name

    def remove(self, endpoint: Endpoint) -> None:
        """`docker stop`."""
        for call in ("Leave", "DeleteEndpoint"):
            assert self.ok(call, **endpoint.ids) == {}
        self.release(endpoint)

    def release(self, endpoint: Endpoint) -> None:
        assert self.ok("ReleaseAddress", PoolID=endpoint.network.pool_id, Address=endpoint.address) == {}

    def remove_network(self, network: Network) -> None:
        """`docker network rm`."""
        assert self.ok("ReleaseAddress", PoolID=network.pool_id, Address=network.gateway) == {}
        assert self.ok("ReleasePool", PoolID=network.pool_id) == {}
        assert self.ok("DeleteNetwork", NetworkID=network.id) == {}

    # What became of it

    @cached_property
    def store(self) -> SqliteStore:
        return SqliteStore(self.store_path)

    def stored(self, prefix: str = "") -> dict[str, str]:
        return {entry.key: entry.value for entry in self.store.list(prefix).entries}

    def record(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stored(key)[key])
        return found

    def mentions(self, text: str) -> list[str]:
        """Keys of the store's entries about something: an id, a CIDR, an address."""
        return [key for key, value in self.stored().items() if f"/{text}/" in f"/{key}/" or f'"{text}"' in value]

    def vni(self, network: Network) -> int:
        bindings = self.stored(BINDINGS)
        (key,) = (key for key in bindings if key.endswith(f"/{network.id}"))
        return int(json.loads(bindings[key])["vni"])

    def links(self) -> dict[str, dict[str, Any]]:
        """The host's interfaces by name."""
        return {link["ifname"]: link for link in self.host.json("ip", "-j", "-d", "link")}

    def overlay_links(self) -> dict[str, dict[str, Any]]:
        """Those of the data-plane namespace."""
        return {link["ifname"]: link for link in self._overlay("ip", "-j", "-d", "link")}

    def devices(self, vni: int) -> set[str]:
        """A network's bridge and VXLAN device, as far as they exist."""
        return {f"br{vni}", f"vx{vni}"} & self.overlay_links().keys()

    def veth(self, endpoint: Endpoint) -> set[str]:
        """Both ends of an endpoint's veth, as far as they are where they are made."""
        port, peer = endpoint.veth
        return {port} & self.overlay_links().keys() | {peer} & self.links().keys()

    def vteps(self, vni: int) -> dict[str, str]:
        """Where the VXLAN device sends frames, by MAC."""
        entries = self._overlay("bridge", "-j", "fdb", "show", "dev", f"vx{vni}")
        return {entry["mac"]: entry["dst"] for entry in entries if "dst" in entry}

    def neighbours(self, vni: int) -> dict[str, str]:
        """MACs that the bridge answers with, by address."""
        entries = self._overlay("ip", "-j", "neigh", "show", "dev", f"br{vni}", "nud", "permanent")
        return {entry["dst"]: entry["lladdr"] for entry in entries}

    def _overlay(self, *argv: str) -> list[dict[str, Any]]:
        return self.host.json("nsenter", "--net=/run/docker/weft/dp", *argv)


@dataclass(frozen=True, slots=True)
class Network:
    """A Docker network as its engine knows it."""

    id: str
    cidr: str
    pool_id: str
    gateway: str
    internal: bool = False

    def data(self) -> dict[str, Any]:
        """Its element of IPv4Data or IPv6Data."""
        length = self.cidr.split("/")[1]
        return {"AddressSpace": LOCAL_SPACE, "Pool": self.cidr, "Gateway": f"{self.gateway}/{length}"}

    def request(self, **generic: str) -> dict[str, Any]:
        """CreateNetwork."""
        v6 = ":" in self.cidr
        options: dict[str, Any] = {
            "com.docker.network.enable_ipv4": not v6,
            "com.docker.network.enable_ipv6": v6,
            "com.docker.network.generic": generic,
            **({"com.docker.network.internal": True} if self.internal else {}),
        }
        data = [self.data()]
        return {
            "NetworkID": self.id,
            "Options": options,
            "IPv4Data": [] if v6 else data,
            "IPv6Data": data if v6 else [],
        }

    def address(self, number: int) -> str:
        return str(ip_network(self.cidr)[number])


@dataclass(frozen=True, slots=True)
class Endpoint:
    network: Network
    id: str
    address: str
    mac: str = ""

    @property
    def ids(self) -> dict[str, str]:
        return {"NetworkID": self.network.id, "EndpointID": self.id}

    @property
    def veth(self) -> tuple[str, str]:
        return f"wp{self.id[:12]}", f"wc{self.id[:12]}"

    def request(self) -> dict[str, Any]:
        """CreateEndpoint."""
        given = f"{self.address}/{self.network.cidr.split('/')[1]}"
        v4, v6 = ("", given) if ":" in given else (given, "")
        interface = {"Address": v4, "AddressIPv6": v6, "MacAddress": self.mac}
        return {**self.ids, "Interface": interface, "Options": {}}


def encode(body: dict[str, Any] | None) -> bytes:
    """As Go does: no body at all without arguments, else a newline at the end."""
    return b"" if body is None else json.dumps(body).encode() + b"\n"


def full_name(call: str) -> str:
    return f"{'IpamDriver' if call in IPAM_CALLS else 'NetworkDriver'}.{call}"
