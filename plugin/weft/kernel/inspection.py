"""What the doctor looks at in the host's own namespace: addresses, packet filters, sockets, switches, and pings.

Nothing is changed, and nothing is needed that weft has made: it works without the daemon as well.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from shutil import which

from weft.doctor.facts import PortDrop, Switch
from weft.doctor.packetfilter import Packet, iptables_drop, iptables_tables, nft_drop
from weft.errors import ConfigError
from weft.kernel.connection import Connection
from weft.kernel.mounts import outlives_us
from weft.kernel.namespace import ROUTING, NamespaceThread, find_namespace, open_namespace
from weft.kernel.netlink import Rtnetlink, open_socket
from weft.kernel.underlay import Underlay

_RECEIVE_BUFFER = 1 << 20
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_PROGRAM_SECONDS = 5.0
_PROC = Path("/proc")
_ECHO = {4: (8, 0), 6: (128, 129)}
"""ICMP types of a ping and its answer by IP version (RFC 792, RFC 4443)."""
_DATAPLANE_SWITCHES = ("net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables", *ROUTING)


class Inspection:
    """Any thread may call.

    :param run: the folder of weft below /run.
    :param host: the namespace that is the host's.
    """

    def __init__(self, run: Path, host: Path = Path("/proc/self/ns/net")) -> None:
        self._run = run
        self._resources = ExitStack()
        fd = open_namespace(host)
        try:
            self._host = self._resources.enter_context(closing(NamespaceThread("weft-look", fd)))
        finally:
            os.close(fd)
        connection = self._resources.enter_context(closing(Connection(self._host)))
        opened = partial(self._host.run, partial(open_socket, receive_buffer=_RECEIVE_BUFFER))
        self._underlay = Underlay(connection, self._resources.enter_context(closing(Rtnetlink(opened))))

    def close(self) -> None:
        self._resources.close()

    def device(self, address: str) -> tuple[str, int]:
        """Which interface has an address, and its MTU; "" and 0 if none has."""
        name = self._underlay.device(address)
        return (name, self._underlay.mtu(address)) if name else ("", 0)

    def address(self, spec: str, towards: Iterable[str]) -> str:
        """The address that WEFT_UNDERLAY means; without it, that from which this host sends to the first of `towards`
        that it has a route to. "" if there is none."""
        with suppress(ConfigError):
            return self._underlay.address(spec, towards=towards)
        return ""

    def drops(self, ports: Iterable[int], peer: str, device: str) -> Iterator[PortDrop]:
        """Which of these UDP ports this host's packet filters drop, for what comes from or goes to `peer`."""
        ruleset, tables = self._host.run(_rulesets)
        known = [name for saved in tables.values() for name in iptables_tables(saved)]
        for port in ports:
            for outgoing in (False, True):
                packet = Packet(port, outgoing, peer, device)
                drop = next(filter(None, (iptables_drop(saved, packet, p) for p, saved in tables.items())), None)
                if drop is None and ruleset:
                    drop = nft_drop(ruleset, packet, without=known)
                if drop:
                    yield PortDrop(port, outgoing, drop)

    def users(self, ports: Iterable[int]) -> dict[int, str]:
        """The programs that have these UDP ports, as far as we see processes. The kernel's sockets are no program's."""
        inodes = self._host.run(partial(_inodes, set(ports)))
        programs = _programs(set(inodes.values()))
        return {port: programs[inode] for port, inode in inodes.items() if inode in programs}

    def switches(self) -> list[Switch]:
        """Those of the kernel's switches that are otherwise than they must be."""
        found = [Switch(*one) for one in self._host.run(partial(_wrong, {"net.ipv4.ip_forward": "1"}))]
        place = self._run / "dp"
        if (fd := self._namespace(place)) is not None:
            try:
                with closing(NamespaceThread("weft-visit", fd)) as thread:
                    wrong = thread.run(partial(_wrong, dict.fromkeys(_DATAPLANE_SWITCHES, "0")))
            finally:
                os.close(fd)
            found += [Switch(*one, place=str(place)) for one in wrong]
        return found

    def mounts(self) -> str:
        """Why the data plane would not outlive weft; "" if it does."""
        place = self._run / "dp"
        if (fd := self._namespace(place)) is not None:
            os.close(fd)
        elif place.exists():
            return f"{place} is no namespace: its mount is gone, and containers that ran then are cut off"
        if not outlives_us(self._run):
            return f"mounts that weft makes in {self._run} do not reach the host: it is not shared"
        return ""

    def reached(self, addresses: Iterable[str], source: str, seconds: float = 0.7) -> dict[str, bool]:
        """Which of these answer a ping from `source`; {} if we may not ask."""
        return self._host.run(partial(_ping, list(addresses), source, seconds))

    def _namespace(self, path: Path) -> int | None:
        with suppress(OSError):
            return find_namespace(path)
        return None


def _rulesets() -> tuple[str, dict[str, str]]:
    """nft's rules in JSON, and those of each kind of iptables by its name; what is not installed filters nothing."""
    saved = {program: _output(f"{program}-save") for program in ("iptables", "ip6tables", "iptables-legacy")}
    return _output("nft", "-j", "list", "ruleset"), {program: text for program, text in saved.items() if text}


def _output(name: str, *arguments: str) -> str:
    program = which(name, path=_PATH)
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_PROGRAM_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _inodes(ports: set[int]) -> dict[int, str]:
    """Sockets by UDP port, in the calling thread's namespace."""
    found = {}
    for name in ("udp", "udp6"):
        for line in _lines(_PROC / "thread-self/net" / name):
            fields = line.split()
            port, inode = int(fields[1].rpartition(":")[2], 16), fields[9]
            if port in ports:
                found[port] = inode
    return found


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text().splitlines()[1:]
    return []


def _programs(inodes: Collection[str]) -> dict[str, str]:
    """Whose sockets these are, with its process id. Not those of the kernel, nor of processes not for us to see."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[str, str] = {}
    for folder in _PROC.glob("[0-9]*/fd") if wanted else ():
        with suppress(OSError):  # it has ended, or is not for us to see
            for inode in {wanted[target] for target in map(os.readlink, folder.iterdir()) if target in wanted}:
                found[inode] = f"{(folder.parent / 'comm').read_text().strip()} (pid {folder.parent.name})"
    return found


def _wrong(wanted: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Switches of the calling thread's namespace that are otherwise; one that is not there is fine."""
    found = []
    for name, value in wanted.items():
        path = _PROC / "sys" / name.replace(".", "/")
        with suppress(OSError):
            if path.exists() and (has := path.read_text().strip()) != value:
                found.append((name, has, value))
    return found


def _ping(addresses: list[str], source: str, seconds: float) -> dict[str, bool]:
    """All at once, three times within the time, from the calling thread's namespace."""
    version = ip_address(source).version
    addresses = [one for one in addresses if ip_address(one).version == version]
    found = dict.fromkeys(addresses, False)
    family, protocol = (socket.AF_INET, socket.IPPROTO_ICMP) if version == 4 else (socket.AF_INET6, 58)
    try:
        sock = _open_icmp(family, protocol)
    except OSError:
        return {}
    with sock, selectors.DefaultSelector() as selector:
        with suppress(OSError):
            sock.bind((source, 0))
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ)
        end = time.monotonic() + seconds
        for turn in range(3):
            for address in (one for one in addresses if not found[one]):
                with suppress(OSError):
                    sock.sendto(_echo(version, turn), (address, 0))
            until = min(end, time.monotonic() + seconds / 3)
            while not all(found.values()) and (left := until - time.monotonic()) > 0:
                for _ in selector.select(left):
                    _receive(sock, version, found)
    return found


def _open_icmp(family: int, protocol: int) -> socket.socket:
    """The raw one needs CAP_NET_RAW, the other one that net.ipv4.ping_group_range has us in."""
    try:
        return socket.socket(family, socket.SOCK_RAW, protocol)
    except PermissionError:
        return socket.socket(family, socket.SOCK_DGRAM, protocol)


def _echo(version: int, turn: int) -> bytes:
    head = struct.pack("!BBHHH", _ECHO[version][0], 0, 0, os.getpid() & 0xFFFF, turn)
    total = sum(struct.unpack("!4H", head))
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return head[:2] + struct.pack("!H", checksum) + head[4:]


def _receive(sock: socket.socket, version: int, found: dict[str, bool]) -> None:
    with suppress(OSError):
        data, (address, *_) = sock.recvfrom(2048)
        start = (data[0] & 15) * 4 if data[0] >> 4 == 4 else 0  # a raw IPv4 socket gives the IP header, no other does
        if address in found and data[start] == _ECHO[version][1]:
            found[address] = True
