"""Hosts with encrypted networks: weft's agent over a real kernel, on the throw-away hosts of `world.py`.

WireGuard is the kernel's where it has one, otherwise wireguard-go: the tests are the same.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Self

from tests.netns.world import Container, Host, World, wait_for
from weft import model
from weft.agent import Agent
from weft.attachments import Attachments
from weft.cluster import Cluster
from weft.encryption import Encryption
from weft.identity import LocalHost
from weft.keys import KeyFile
from weft.model import Endpoint, Network, Pool
from weft.store import Delete, Put
from weft.store.sqlite import SqliteStore

PORT = 4789
WG_PORT = 51820
SECRET = Network(7001, "secret", (Pool("10.7.1.0/24"),), 0, False, "h1", encrypted=True)
PLAIN = Network(7002, "plain", (Pool("10.7.2.0/24"),), 0, False, "h1")
_ETH_P_ALL = 3
_numbers = count(1)


class SecuredHost:
    """What of weft makes a host's data plane."""

    probes = False
    """Have the networks for probes as well."""

    def __init__(self, host: Host, store: SqliteStore, folder: Path) -> None:
        number = next(_numbers)
        self.host = host
        self.store = store
        self.me = LocalHost(model.Host(f"{number:032x}", f"h{number}", host.underlay))
        self.cluster = Cluster()
        self.keys = KeyFile(folder / f"{number}.key")
        self.encryption = Encryption(host.kernel, self.cluster, self.me, self.keys, port=WG_PORT, publish=self.publish)
        self.attachments = Attachments(host.kernel, self.cluster, self.me, port=PORT, encryption=self.encryption)
        self.publish()
        self.start()

    def start(self) -> None:
        """Also again: a new agent finds what an earlier one left."""
        kernel = self.host.kernel
        self.agent = Agent(
            self.store,
            self.cluster,
            kernel,
            self.me,
            self.attachments,
            monitor=kernel.monitor,
            resync=3600,
            encryption=self.encryption,
            tunnel_monitor=kernel.tunnel_monitor,
            probes=self.probes,
        )
        self.agent.start()
        assert wait_for(lambda: self.cluster.loaded)

    def stop(self) -> None:
        self.agent.stop()

    def publish(self) -> None:
        host = self.me.host
        self.store.transact([], [Put(host.key, host.encode())])

    def run(self, world: World, network: Network, address: str) -> Container:
        """Start a container there, as Docker and weft's driver would do it."""
        number = next(_numbers)
        mac = f"02:42:0a:07:00:{number:02x}"
        endpoint = Endpoint(f"e{number}", network.vni, mac, (address,), self.me.id)
        self.attachments.check(encrypted=network.encrypted)
        self.store.transact([], [Put(network.key, network.encode()), Put(endpoint.key, endpoint.encode())])
        peer = self.attachments.attach(network, endpoint)
        container = Container(world.namespace())
        self.host.ip(f"link set {peer} netns {container.path.name} name eth0")
        container.ip("link set eth0 addrgenmode none")
        container.ip(f"addr add {address}/24 dev eth0")
        container.ip("link set eth0 up")
        return container

    def forget(self, other: SecuredHost) -> None:
        self.store.transact([], [Delete(other.me.host.key)])


class Mesh:
    """Two hosts and an outsider on one switch, with a container of each network on each host."""

    def __init__(self, world: World, folder: Path, *underlays: str) -> None:
        self.world = world
        self._resources = ExitStack()
        self.store = self._resources.enter_context(closing(SqliteStore(folder / "weft.db")))
        hosts = world.hosts(*underlays)
        self.outsider = hosts[-1]
        self.hosts = [SecuredHost(host, self.store, folder) for host in hosts[:-1]]
        for one in self.hosts:
            self._resources.callback(one.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def containers(self, network: Network) -> list[Container]:
        prefix = network.pools[0].cidr.rpartition(".")[0]
        return [host.run(self.world, network, f"{prefix}.{n}") for n, host in enumerate(self.hosts, start=2)]


class Tap:
    """Counts what passes an interface and has a mark in it, encapsulated or not."""

    def __init__(self, sock: socket.socket, incoming: bool) -> None:
        self._socket = sock
        self._incoming = incoming

    def count(self, mark: bytes, wait: float = 0.3) -> int:
        """How often it has passed so far, and in the next moment."""
        time.sleep(wait)
        found = 0
        with suppress(BlockingIOError):
            while True:
                packet, (_, _, kind, *_) = self._socket.recvfrom(65536, socket.MSG_DONTWAIT)
                found += mark in packet and not (self._incoming and kind == socket.PACKET_OUTGOING)
        return found


@contextmanager
def tap(place: Host | Container) -> Iterator[Tap]:
    """On eth0: what a container gets, or all that passes a host's."""
    with place.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as sock:
        sock.bind(("eth0", _ETH_P_ALL))
        yield Tap(sock, incoming=isinstance(place, Container))


def vxlan(vni: int, mark: bytes) -> bytes:
    """The payload of a VXLAN datagram: a broadcast frame with the mark."""
    frame = b"\xff" * 6 + bytes.fromhex("024200000001") + b"\x88\xb5" + mark.ljust(60, b".")
    return struct.pack("!II", 0x08000000, vni << 8) + frame


def udp_fragments(source: str, destination: str, port: int, payload: bytes) -> list[bytes]:
    """A UDP datagram as two IPv4 packets, of which the first has the UDP header alone."""
    datagram = struct.pack("!HHHH", 40000, port, 8 + len(payload), 0) + payload
    parts = ((datagram[:8], 0x2000), (datagram[8:], 1))
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    return [
        struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(part), 4711, flags, 64, socket.IPPROTO_UDP, 0) + addresses + part
        for part, flags in parts
    ]
