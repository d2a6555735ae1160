"""rtnetlink without an interpreter in between: a socket, batches of requests, dumps, and looking up a link or a route.

Two things make tables of 100,000 rows quick. A batch is one `send` of many messages, of which only the last asks for
an acknowledgement; the kernel still reports every message that it refuses, by its sequence number. And a dump is taken
as it comes, in chunks of up to 32 kB.

The kernel works inside our `send`: all answers to a batch are in the receive buffer when it returns. If they are not,
the buffer was too small for so many errors, and the batch is done again in halves: every request here may be repeated.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from errno import EAGAIN, EINTR, ENOBUFS, ENODEV
from struct import Struct
from typing import NamedTuple, Protocol, TypeVar

from weft.errors import KernelError

T = TypeVar("T")

NLM_F_REQUEST = 0x1
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
_NLM_F_ACK = 0x4
_NLM_F_DUMP_INTR = 0x10
_NLMSG_ERROR = 2
_NLMSG_DONE = 3

RTM_NEWLINK = 16
RTM_DELLINK = 17
_RTM_GETLINK = 18
_RTM_GETADDR = 22
_RTM_GETROUTE = 26
_RTM_GETNSID = 90

_NLA_TYPE_MASK = 0x3FFF

IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_ADDRESS = 1
_IFLA_EXT_MASK = 29
_RTEXT_FILTER_SKIP_STATS = 8
_RTA_DST = 1
_RTA_OIF = 4
_RTA_METRICS = 8
_RTA_CACHEINFO = 12
_RTAX_MTU = 2
_NETNSA_NSID = 1
_NETNSA_FD = 3

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_GET_STRICT_CHK = 12
_SO_RCVBUFFORCE = 33

HEADER = Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence number, port."""
LINK = Struct("=IHHII BxHiII")
"""nlmsghdr, then ifinfomsg: family, type, index, flags, change."""
ADDRESS = Struct("=IHHII BBBBi")
"""nlmsghdr, then ifaddrmsg: family, prefix length, flags, scope, index of the link."""
ROUTE = Struct("=IHHII BBBBBBBBI")
"""nlmsghdr, then rtmsg: family, bits of destination and of source, TOS, table, protocol, scope, type, flags."""
_EXPIRES = slice(8, 12)
"""In rta_cacheinfo."""
_NAMESPACE = Struct("=IHHII B3x HHI")
"""nlmsghdr, then rtgenmsg: family; then one attribute with a number."""
_ATTRIBUTE = Struct("=HH")
_FLAGS = Struct("=H")
_ERROR = Struct("=i")
_NO_STATISTICS = Struct("=HHI").pack(8, _IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)

_CHUNK = 1 << 16
_ATTEMPTS = 10


class Device(NamedTuple):
    """What there is to look up of a link."""

    ifindex: int
    name: str
    mac: bytes
    mtu: int


class Route(NamedTuple):
    """By which link packets leave for an address (0: by none), and the route's own MTU (0: it has none)."""

    ifindex: int
    mtu: int


class Find(Protocol):
    """Looks up a device of one namespace by its name or index."""

    def __call__(self, *, name: str = "", index: int = 0) -> Device | None: ...


def open_socket(*, receive_buffer: int, groups: int = 0) -> socket.socket:
    """An rtnetlink socket in the calling thread's namespace."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        sock.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
        except PermissionError:  # root of a user namespace only
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((0, groups))
    except BaseException:
        sock.close()
        raise
    return sock


def messages(buffer: bytes) -> Iterator[int]:
    """Where each message of a received chunk begins."""
    start = 0
    while start < len(buffer):
        yield start
        start += (HEADER.unpack_from(buffer, start)[0] + 3) & ~3


def attributes(buffer: bytes, start: int, end: int) -> dict[int, slice]:
    """Where the value of each attribute is."""
    found = {}
    while start < end:
        length, kind = _ATTRIBUTE.unpack_from(buffer, start)
        found[kind & _NLA_TYPE_MASK] = slice(start + 4, start + length)
        start += (length + 3) & ~3
    return found


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute with its padding."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def number(buffer: bytes, at: slice) -> int:
    """An integer of any size in the machine's byte order."""
    return int.from_bytes(buffer[at], sys.byteorder)


def text(buffer: bytes, at: slice) -> str:
    return buffer[at].rstrip(b"\0").decode()


class Rtnetlink:
    """A socket that any thread may use, one request at a time. A broken one is replaced at the next use.

    :param opened: makes the socket, in its namespace.
    """

    def __init__(self, opened: Callable[[], socket.socket]) -> None:
        self._open = opened
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def close(self) -> None:
        with self._lock:
            self._drop()

    def send(self, batch: Sequence[bytes]) -> list[tuple[int, int]]:
        """Send requests; return sequence number and errno of each that the kernel refused."""
        data = bytearray().join(batch)
        last = len(data) - len(batch[-1])
        _FLAGS.pack_into(data, last + 6, _FLAGS.unpack_from(data, last + 6)[0] | _NLM_F_ACK)
        try:
            return self._exchange("write rows", lambda sock: _refused(sock, data, HEADER.unpack_from(data, last)[3]))
        except KernelError as error:
            if error.errno not in (ENOBUFS, EAGAIN) or len(batch) == 1:
                raise
        half = len(batch) // 2
        return self.send(batch[:half]) + self.send(batch[half:])

    def dump(self, request: bytes) -> list[bytes]:
        """All chunks of the answer; asked again if the table changed so that the answer is inconsistent."""
        for _ in range(_ATTEMPTS):
            chunks, interrupted = self._exchange("read a table", lambda sock: _dump(sock, request))
            if not interrupted:
                return chunks
        raise KernelError("read a table", EINTR, "it changes all the time")

    def links(self) -> list[bytes]:
        """Chunks of a dump of all links, without statistics."""
        return self.dump(_link_request(NLM_F_REQUEST | NLM_F_DUMP))

    def addresses(self, family: int = socket.AF_INET) -> list[bytes]:
        """Chunks of a dump of all addresses of a family; of others as well if this kernel does not have it."""
        flags = NLM_F_REQUEST | NLM_F_DUMP
        return self.dump(ADDRESS.pack(ADDRESS.size, _RTM_GETADDR, flags, 0, 0, family, 0, 0, 0, 0))

    def routes(self, family: int) -> list[bytes]:
        """Chunks of a dump of the routes in all tables; see `addresses`."""
        flags = NLM_F_REQUEST | NLM_F_DUMP
        return self.dump(ROUTE.pack(ROUTE.size, _RTM_GETROUTE, flags, 0, 0, family, *bytes(7), 0))

    def link(self, *, name: str = "", index: int = 0) -> bytes:
        """The message of the link with that name or index; b"" if there is none.

        The older ioctl will not do: for a name that does not exist it starts modprobe.
        """
        request = _link_request(NLM_F_REQUEST, name, index)
        return self._exchange(f"look up link {name or index}", lambda sock: _ask(sock, request))

    def find(self, *, name: str = "", index: int = 0) -> Device | None:
        """See `Find`."""
        if not (reply := self.link(name=name, index=index)):
            return None
        at = attributes(reply, LINK.size, len(reply))
        return Device(
            ifindex=LINK.unpack_from(reply)[7],
            name=text(reply, at[IFLA_IFNAME]),
            mac=reply[at[IFLA_ADDRESS]] if IFLA_ADDRESS in at else b"",
            mtu=number(reply, at[IFLA_MTU]),
        )

    def route(self, destination: bytes) -> Route | None:
        """The route to an address of 4 or 16 bytes; None if there is none now.

        What the kernel has learned of a path is forgotten after ten minutes, and does not count.
        """
        family = socket.AF_INET if len(destination) == 4 else socket.AF_INET6
        tail = attribute(_RTA_DST, destination)
        head = ROUTE.size + len(tail), _RTM_GETROUTE, NLM_F_REQUEST, 0, 0, family, 8 * len(destination)
        request = ROUTE.pack(*head, *bytes(6), 0) + tail
        reply = self._exchange("look up a route", lambda sock: _answer(sock, request))
        size, kind, *_ = HEADER.unpack_from(reply)
        if kind == _NLMSG_ERROR:
            return None
        at = attributes(reply, ROUTE.size, size)
        metrics = attributes(reply, at[_RTA_METRICS].start, at[_RTA_METRICS].stop) if _RTA_METRICS in at else {}
        learned = _RTA_CACHEINFO in at and any(reply[at[_RTA_CACHEINFO]][_EXPIRES])
        mtu = number(reply, metrics[_RTAX_MTU]) if _RTAX_MTU in metrics and not learned else 0
        return Route(number(reply, at[_RTA_OIF]) if _RTA_OIF in at else 0, mtu)

    def namespace_id(self, fd: int) -> int | None:
        """By which number links of this namespace name the one with that file descriptor; None if none does yet."""
        head = _NAMESPACE.size, _RTM_GETNSID, NLM_F_REQUEST, 0, 0, 0
        request = _NAMESPACE.pack(*head, 8, _NETNSA_FD, fd)
        reply = self._exchange("look up a namespace", lambda sock: _ask(sock, request))
        at = attributes(reply, HEADER.size + 4, HEADER.unpack_from(reply)[0])
        found = number(reply, at[_NETNSA_NSID])
        return found if found < 1 << 31 else None

    def _exchange(self, what: str, work: Callable[[socket.socket], T]) -> T:
        with self._lock:
            try:
                if self._socket is None:
                    self._socket = self._open()
                return work(self._socket)
            except OSError as error:
                self._drop()  # answers left in it would be taken for those to the next request
                raise KernelError(what, error.errno or 0) from error

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _refused(sock: socket.socket, data: bytearray, last: int) -> list[tuple[int, int]]:
    sock.send(data)
    refused = []
    sequence = -1
    while sequence != last:
        reply = sock.recv(_CHUNK, socket.MSG_DONTWAIT)
        sequence = HEADER.unpack_from(reply)[3]
        if errno := -_ERROR.unpack_from(reply, HEADER.size)[0]:
            refused.append((sequence, errno))
    return refused


def _dump(sock: socket.socket, request: bytes) -> tuple[list[bytes], bool]:
    """Chunks of messages, and whether the kernel says that they do not fit together."""
    sock.send(request)
    chunks: list[bytes] = []
    interrupted = done = False
    while not done:
        chunk = sock.recv(_CHUNK)
        _raise_error(chunk)
        # The last message may come alone or behind others; it has 20 bytes, no attribute looks like it.
        size, kind, flags, _, _ = HEADER.unpack_from(chunk, len(chunk) - 20)
        done = kind == _NLMSG_DONE and size == 20
        flags = HEADER.unpack_from(chunk)[2] | (flags if done else 0)
        interrupted |= bool(flags & _NLM_F_DUMP_INTR)
        chunks.append(chunk[:-20] if done else chunk)
    return chunks, interrupted


def _link_request(flags: int, name: str = "", index: int = 0) -> bytes:
    tail = _NO_STATISTICS
    if name:
        tail += attribute(IFLA_IFNAME, name.encode() + b"\0")
    return LINK.pack(LINK.size + len(tail), _RTM_GETLINK, flags, 0, 0, 0, 0, index, 0, 0) + tail


def _ask(sock: socket.socket, request: bytes) -> bytes:
    """The one message that answers; b"" if it is that there is no such device."""
    reply = _answer(sock, request)
    try:
        _raise_error(reply)
    except OSError as error:
        if error.errno == ENODEV:
            return b""
        raise
    return reply


def _answer(sock: socket.socket, request: bytes) -> bytes:
    sock.send(request)
    return sock.recv(_CHUNK)


def _raise_error(reply: bytes) -> None:
    if HEADER.unpack_from(reply)[1] == _NLMSG_ERROR and (errno := -_ERROR.unpack_from(reply, HEADER.size)[0]):
        raise OSError(errno, "refused")
