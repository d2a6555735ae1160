"""The sockets at which names are asked for: fair to those who ask, by the kernel's own means.

One queue for all would be full of the questions of whoever asks most, and the others' would be dropped, however quickly
we refuse the former. So there are several UDP sockets at the address, and a classic BPF program gives each question to
one by its source (SO_REUSEPORT): Docker numbers containers one by one, so up to `QUEUES` of them share none. Whoever
reads them in turn gives everybody the same, on machines of any speed. Who keeps a queue long asks more than this
machine answers; that one is kept out by another such program at the socket for a while, so that it costs us nothing.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import struct
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress

log = logging.getLogger(__name__)

QUEUES = 32
"""A power of two."""
_BYTES = 512 << 10
"""The kernel takes twice that, which is about 1,300 questions."""
_IP_FREEBIND = 15
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_SO_RCVBUFFORCE, _SO_ATTACH_REUSEPORT_CBPF, _SO_MEMINFO = 33, 51, 55
_MEMINFO = struct.Struct("II")
"""What is in the queue, and what may be, in bytes (linux/sock_diag.h)."""
_BACKLOG = 64
_LONGEST = 4096
_CROWD = 512
"""Questions in a row that leave a queue long: no burst that fits into it does that, only what goes on."""
_SHUT_SECONDS = 1.0
_MOST_SHUT = 64
_LOAD, _AND, _IS, _RETURN, _RETURN_IT = 0x20, 0x54, 0x15, 0x06, 0x16
"""BPF_LD+BPF_W+BPF_ABS, BPF_ALU+BPF_AND+BPF_K, BPF_JMP+BPF_JEQ+BPF_K, BPF_RET+BPF_K, BPF_RET+BPF_A."""
_SOURCE = 0xFFF00000 + 12
"""SKF_NET_OFF: from the IPv4 header on, in which the source is at 12."""

Code = Sequence[tuple[int, int, int, int]]


def bind(address: str, port: int = 53) -> list[socket.socket]:
    """UDP sockets, and one of TCP, on an address, which need not exist yet, in the namespace of the calling thread."""
    udp = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(QUEUES)]
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for one in udp:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BYTES)
            with suppress(PermissionError):  # beyond net.core.rmem_max
                one.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BYTES)
        for each in (tcp, *udp):
            each.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            each.bind((address, port))
        by_source = [(_LOAD, 0, 0, _SOURCE), (_AND, 0, 0, QUEUES - 1), (_RETURN_IT, 0, 0, 0)]
        _attach(udp[0], _SO_ATTACH_REUSEPORT_CBPF, by_source)
        tcp.listen(_BACKLOG)
    except OSError:
        for each in (tcp, *udp):
            each.close()
        raise
    return [*udp, tcp]


class Queue:
    """A UDP socket and who is kept away from it."""

    def __init__(self, udp: socket.socket) -> None:
        self.udp = udp
        self._until: dict[str, float] = {}
        self._crowd: deque[str] = deque(maxlen=_CROWD)
        """Of whom the last questions were, since the queue was last found short."""

    def take(self) -> tuple[bytes, tuple[str, int]] | None:
        """The next question and whose it is, unless that one is kept away.

        Raises `BlockingIOError` if there is none, or one that is spoiled, and `OSError` as the socket has it.
        """
        try:
            wire, peer = self.udp.recvfrom(_LONGEST, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._crowd.clear()
            raise
        if peer[0] in self._until:
            return None  # it was in the queue already
        self._crowd.append(peer[0])
        return wire, peer

    def judge(self, now: float) -> None:
        """After a few questions in a row: if the queue is always long, who asks most is kept out."""
        if not self._is_long:
            self._crowd.clear()
        elif len(self._crowd) == _CROWD:
            (most, _), *_ = Counter(self._crowd).most_common(1)
            self._crowd.clear()
            self.shut(most, now)

    @property
    def _is_long(self) -> bool:
        """Whether half of what it can hold is there."""
        used, limit = _MEMINFO.unpack(self.udp.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
        return bool(used > limit // 2)

    def shut(self, source: str, now: float) -> None:
        """Nothing more of a source for a while."""
        if source in self._until or len(self._until) >= _MOST_SHUT:
            return
        log.warning("container at %s asks for names too often: nothing of it is read for a second", source)
        self._until[source] = now + _SHUT_SECONDS
        self._filter()

    def open(self, now: float) -> None:
        """To whom the while is over."""
        left = {source: until for source, until in self._until.items() if until > now}
        if left != self._until:
            self._until = left
            self._filter()

    def _filter(self) -> None:
        with suppress(OSError):
            if not self._until:
                self.udp.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
                return
            code = [(_LOAD, 0, 0, _SOURCE)]
            for source in self._until:
                code += [(_IS, 0, 1, int.from_bytes(socket.inet_aton(source), "big")), (_RETURN, 0, 0, 0)]
            _attach(self.udp, _SO_ATTACH_FILTER, [*code, (_RETURN, 0, 0, 0xFFFFFFFF)])


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filters", ctypes.POINTER(_Filter)))


def _attach(udp: socket.socket, option: int, code: Code) -> None:
    filters = (_Filter * len(code))(*(_Filter(*instruction) for instruction in code))
    udp.setsockopt(socket.SOL_SOCKET, option, bytes(_Program(len(code), filters)))
