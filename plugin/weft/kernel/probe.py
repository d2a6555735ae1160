"""A socket on a tunnel device, for whole frames, past all IP stacks.

Each frame carries a virtio_net_hdr (PACKET_VNET_HDR in packet(7)), by which the sender says that the checksum is left
to the network card, as the stack of a container does; and the kernel says of a frame that came from a card's other end
on this machine (a veth) that nobody has filled it in.
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import NamedTuple

from weft.errors import KernelError

_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23
_ETH_P_ALL = 3
_NEEDS_CHECKSUM = 1
_HEADER = Struct("=BBHHHH")
"""Flags, kind of segmentation, header length, segment size, where the checksum's part begins, where in it that goes."""
_LARGEST = 1 << 16
_RECEIVE_BUFFER = 1 << 20


class Frame(NamedTuple):
    """:param pending: its checksum is not filled in."""

    data: bytes
    pending: bool


class ProbeSocket:
    """Any thread may send, one may receive. An `OSError` of either means that the device is gone, or was down."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, frame: bytes, checksum: tuple[int, int] = (0, 0)) -> None:
        """:param checksum: see `echo.checksum_place`."""
        flags = _NEEDS_CHECKSUM if checksum[0] else 0
        self._socket.send(_HEADER.pack(flags, 0, 0, 0, *checksum) + frame, socket.MSG_DONTWAIT)

    def receive(self) -> Frame | None:
        """The next frame; None if there is none now."""
        try:
            received = self._socket.recv(_LARGEST, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        flags = received[0]
        return Frame(received[_HEADER.size :], bool(flags & _NEEDS_CHECKSUM))


def open_probe(device: str) -> ProbeSocket:
    """In the calling thread's namespace."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        sock.bind((device, _ETH_P_ALL))
    except OSError as error:
        sock.close()
        raise KernelError(f"open a socket on {device}", error.errno or 0) from error
    return ProbeSocket(sock)
