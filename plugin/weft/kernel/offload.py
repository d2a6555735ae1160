"""Whether a link leaves checksums to whoever sends its frames, such as a network card: the kernel's ethtool.

What a link cannot leave to others, the kernel does before it hands it a frame; so without checksums it cuts large
packets up as well (`netdev_fix_features` in net/core/dev.c).
"""

from __future__ import annotations

import array
import errno
import fcntl
import socket
from struct import Struct

from weft.errors import KernelError

_SIOCETHTOOL = 0x8946
_ETHTOOL_GTXCSUM = 0x16
_ETHTOOL_STXCSUM = 0x17

_REQUEST = Struct("16sP16x")
"""ifreq: the link's name, and where its ethtool_value is."""


def leaves_checksums(sock: socket.socket, name: str) -> bool:
    """:param sock: any of the link's namespace. A link that has gone meanwhile counts as usual."""
    try:
        return bool(_ethtool(sock, name, _ETHTOOL_GTXCSUM))
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EOPNOTSUPP):
            return True
        raise KernelError(f"read the features of {name}", error.errno or 0) from error


def leave_checksums(sock: socket.socket, name: str, leave: bool) -> None:
    """Raises `OSError`."""
    _ethtool(sock, name, _ETHTOOL_STXCSUM, int(leave))


def _ethtool(sock: socket.socket, name: str, command: int, value: int = 0) -> int:
    values = array.array("I", (command, value))
    fcntl.ioctl(sock, _SIOCETHTOOL, _REQUEST.pack(name.encode(), values.buffer_info()[0]))
    return values[1]
