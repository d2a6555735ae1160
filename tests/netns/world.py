"""Throw-away hosts and containers: network namespaces, each watched by `ip` and `bridge` as the second witness."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from weft.dataplane import Bridge, Link, Port, Row, Shaper, Vxlan, bridge_name, vxlan_name
from weft.kernel import LinuxKernel
from weft.kernel.namespace import NamespaceThread
from weft.reconcile import Create, RowPlan, Step, plan_links, plan_rows

T = TypeVar("T")

UDP_PORT = 4789
MTU = 1450
_NAMED = Path("/run/netns")
_ECHO_REQUEST = {4: 8, 6: 128}
_ECHO_REPLY = {4: 0, 6: 129}
_IPPROTO = {4: socket.IPPROTO_ICMP, 6: socket.IPPROTO_ICMPV6}
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_ETH_P_ALL = 3
_ARP = b"\x08\x06"
_IPV6 = b"\x86\xdd"
_VXLAN = struct.pack("!H", UDP_PORT)
_numbers = count()


def wait_for(condition: Callable[[], T], timeout: float = 5.0) -> T:
    """The condition's value as soon as it is true, or as it is when the time is up."""
    deadline = time.monotonic() + timeout
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


class Namespace:
    """A network namespace, by the path at which it is mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str) -> str:
        """A program's output. It starts in its thread's namespace: by emulation, one more for that would take long."""
        done = self.do(lambda: subprocess.run(command, capture_output=True, text=True, timeout=10))
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def ip(self, command: str) -> None:
        self.run("ip", *command.split())

    def bridge(self, command: str) -> None:
        self.run("bridge", *command.split())

    def link(self, name: str) -> dict[str, Any]:
        """What `ip` says of a link."""
        found: dict[str, Any] = json.loads(self.run("ip", "-j", "-d", "link", "show", name))[0]
        return found

    def links(self) -> set[str]:
        return {link["ifname"] for link in json.loads(self.run("ip", "-j", "link"))} - {"lo"}

    def fdb(self, device: str) -> list[dict[str, Any]]:
        """What `bridge` says of a device's forwarding entries."""
        found: list[dict[str, Any]] = json.loads(self.run("bridge", "-j", "fdb", "show", "dev", device))
        return found

    def neighbours(self, device: str) -> list[dict[str, Any]]:
        """What `ip` says of a device's permanent neighbours."""
        output = self.run("ip", "-j", "neigh", "show", "dev", device, "nud", "permanent")
        found: list[dict[str, Any]] = json.loads(output or "[]")
        return found

    def do(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread that is in this namespace."""
        with self.path.open("rb") as file, closing(NamespaceThread("test", file.fileno())) as thread:
            return thread.run(work)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of this namespace, for use from anywhere."""
        return self.do(lambda: socket.socket(family, kind, protocol))


class Container(Namespace):
    """A namespace that took one end of a port as its eth0."""

    def ping(self, address: str, timeout: float = 2.0) -> bool:
        """One echo request, one reply."""
        version = 6 if ":" in address else 4
        payload = token_hex(8).encode()
        with self.socket(_FAMILY[version], socket.SOCK_RAW, _IPPROTO[version]) as sock:
            sock.settimeout(timeout)
            sock.sendto(_echo(_ECHO_REQUEST[version], payload), (address, 0))
            with suppress(TimeoutError):
                while True:
                    reply = sock.recv(2048)[20 if version == 4 else 0 :]
                    if reply[0] == _ECHO_REPLY[version] and reply.endswith(payload):
                        return True
        return False

    def pings(self, address: str) -> bool:
        """Whether an answer comes within some tries: a new link may need a moment."""
        return wait_for(lambda: self.ping(address, 0.3))


def _echo(kind: int, payload: bytes) -> bytes:
    """An ICMP message; its checksum is right for IPv4, and for IPv6 the kernel's task."""
    head = struct.pack("!BBHHH", kind, 0, 0, 1, 1)
    words = struct.unpack(f"!{(len(head) + len(payload)) // 2}H", head + payload)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return struct.pack("!BBHHH", kind, 0, checksum, 1, 1) + payload


class Capture:
    """Frames of VXLAN packets that pass a host's eth0, unpacked."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def frames(self) -> list[bytes]:
        """What has come so far."""
        time.sleep(0.05)
        found = []
        with suppress(BlockingIOError):
            while True:
                found.append(self._socket.recv(65536, socket.MSG_DONTWAIT))
        return [inner for frame in found if (inner := _unpacked(frame))]

    @staticmethod
    def is_question(frame: bytes) -> bool:
        """True for ARP and for neighbour solicitations."""
        solicitation = frame[12:14] == _IPV6 and frame[20] == socket.IPPROTO_ICMPV6 and frame[54] == 135
        return solicitation or frame[12:14] == _ARP


def _unpacked(frame: bytes) -> bytes:
    """The Ethernet frame in a VXLAN packet; b"" if it is something else."""
    udp = 54 if frame[12:14] == _IPV6 else 34
    return frame[udp + 16 :] if frame[udp + 2 : udp + 4] == _VXLAN else b""


class Host(Namespace):
    """A machine: a namespace for it, and a kernel adapter with a data plane of its own."""

    def __init__(self, path: Path, run: Path, underlay: str) -> None:
        super().__init__(path)
        self.underlay = underlay
        self.wireguard = f"wg{path.name.removeprefix('weft-')}"
        """The device's name is its host's: sockets of wireguard-go are files, and hosts here share those."""
        self.kernel = LinuxKernel(run, host=path, wireguard=self.wireguard)
        self.dp = Namespace(run / "dp")
        self.wg = Namespace(run / "wg")

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        """Watch what leaves and enters by eth0."""
        with self.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as sock:
            sock.bind(("eth0", _ETH_P_ALL))
            yield Capture(sock)

    def apply(self, *links: Link) -> list[Step]:
        """Make the data plane consist of these links; return the steps that it took."""
        steps = plan_links(links, self.kernel.observe_links())
        for step in steps:
            self.kernel.perform(step)
        return steps

    def plan(self, *links: Link) -> list[Step]:
        return plan_links(links, self.kernel.observe_links())

    def network(self, vni: int, mtu: int = MTU, *, suppress: bool = False) -> tuple[Bridge, Vxlan]:
        """The links of a network on this host. With IPv6 the bridge has to suppress ND."""
        bridge = Bridge(bridge_name(vni), mtu)
        return bridge, Vxlan(vxlan_name(vni), vni, self.underlay, UDP_PORT, mtu, bridge.name, suppress=suppress)

    def observe(self, *devices: str) -> set[Row]:
        return self.kernel.observe_rows(devices)

    def put(self, *rows: Row) -> None:
        self.kernel.write_rows(RowPlan(put=rows))

    def set_rows(self, rows: set[Row], *devices: str) -> RowPlan:
        """Make these rows the only ones on the devices; return the plan that was needed."""
        plan = plan_rows(rows, self.observe(*devices))
        self.kernel.write_rows(plan)
        return plan


class World:
    """Makes namespaces, and removes all of them at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._resources = ExitStack()

    def close(self) -> None:
        self._resources.close()

    def namespace(self) -> Path:
        name = f"weft-{os.getpid()}-{next(_numbers)}"
        subprocess.run(["ip", "netns", "add", name], check=True, timeout=10)
        self._resources.callback(subprocess.run, ["ip", "netns", "del", name], check=True, timeout=10)
        Namespace(_NAMED / name).ip("link set lo up")
        return _NAMED / name

    def host(self, underlay: str = "192.0.2.1/24", run: Path | None = None) -> Host:
        """A host with an interface eth0 that leads nowhere."""
        host = self._host(underlay.partition("/")[0], run)
        host.ip("link add eth0 type veth peer name cable")
        host.ip("link set cable up")
        self._set_address(host, underlay)
        return host

    def hosts(self, *underlays: str) -> list[Host]:
        """Hosts on one switch."""
        switch = self.switch = Namespace(self.namespace())
        switch.ip("link add switch type bridge mcast_snooping 0")
        switch.ip("link set switch up")
        for call in Path("/proc/sys/net/bridge").glob("bridge-nf-call-*"):
            switch.do(lambda call=call: call.write_text("0"))  # type: ignore[misc]
        hosts = []
        for number, underlay in enumerate(underlays):
            host = self._host(underlay.partition("/")[0])
            switch.ip(f"link add p{number} master switch up type veth peer name eth0 netns {host.path.name}")
            self._set_address(host, underlay)
            hosts.append(host)
        return hosts

    def container(self, host: Host, vni: int, mac: str, *addresses: str, rate: int = 0) -> Container:
        """A container on one of the host's networks, attached as Docker would do it."""
        container, number = Container(self.namespace()), next(_numbers)
        port = Port(f"wp{number}", bridge_name(vni), MTU, peer=f"wc{number}", mac=mac, rate=rate)
        host.kernel.perform(Create(port))
        if rate:
            host.kernel.perform(Create(Shaper(port.name, rate)))
        host.ip(f"link set {port.peer} netns {container.path.name} name eth0")
        container.ip("link set eth0 addrgenmode none")
        for address in addresses:
            container.ip(f"addr add {address} dev eth0{' nodad' if ':' in address else ''}")
        container.ip("link set eth0 up")
        return container

    def _host(self, underlay: str, run: Path | None = None) -> Host:
        path = self.namespace()
        run = run or self._folder / path.name
        host = Host(path, run, underlay)
        host.kernel.open()
        self._resources.callback(subprocess.run, ["umount", str(run / "dp"), str(run / "wg")], check=True, timeout=10)
        self._resources.callback(Path(f"/var/run/wireguard/{host.wireguard}.sock").unlink, missing_ok=True)
        self._resources.callback(host.kernel.close)
        return host

    def _set_address(self, host: Host, underlay: str) -> None:
        host.ip(f"addr add {underlay} dev eth0{' nodad' if ':' in underlay else ''}")
        host.ip("link set eth0 up")
