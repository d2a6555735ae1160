"""Kernel events of the data-plane namespace, as they happen.

Row events are parsed by the reader of the tables (`rows.py`); a link whose rate limit changes is one that changes. Our
own writes come back as events, too, and look like anybody's: whoever listens says which of the rows are news. So many
events are read together as have come, and runs of them at once, as in a dump. What is not told:

- rows on other devices than bridges and VXLAN devices, and what bridges learn by themselves;
- the MAC of a deleted `Neighbour`, for the kernel forgets it first: it is b"" then. Compare by `key`.

A row that is replaced by a short-lived one counts as deleted. If we are too slow, the kernel drops events and says so
once: `Overflow`. The receive buffer is large, since a bulk write of ours makes 300,000 events within a second.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from errno import ENOBUFS

from weft.dataplane import KernelEvent, LinkEvent, News, Overflow, Row, RowEvent, Station, TunnelEvent, vni_of
from weft.errors import KernelError
from weft.kernel.netlink import (
    HEADER,
    IFLA_IFNAME,
    LINK,
    RTM_DELLINK,
    RTM_NEWLINK,
    Find,
    attributes,
    open_socket,
    text,
)
from weft.kernel.rows import RTM_DELNEIGH, RTM_NEWNEIGH, Form, own_row, rows_between
from weft.kernel.shaping import RTM_DELQDISC, RTM_DELTFILTER, RTM_NEWQDISC, RTM_NEWTFILTER, TRAFFIC

_AF_BRIDGE = 7
GROUPS = 1 << 0 | 1 << 2 | 1 << 3
"""RTNLGRP_LINK, RTNLGRP_NEIGH and RTNLGRP_TC."""
_TUNNEL_GROUPS = 1 << 0 | 1 << 4
"""RTNLGRP_LINK and RTNLGRP_IPV4_IFADDR."""
_RECEIVE_BUFFER = 64 << 20
_CHUNK = 1 << 16
_TOGETHER = 128
"""Events; in a chunk of them where none is like its neighbour, the search for runs shall not take long."""
_BULK = 8
_BULK_SECONDS = 0.01
"""Where so many came at once, more do: to read a few costs as much as a run, and the bulk's writer would wait."""
_SHAPING = (RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER, RTM_DELTFILTER)


def open_events() -> socket.socket:
    """The socket for a `Monitor`, in the calling thread's namespace."""
    return open_socket(receive_buffer=_RECEIVE_BUFFER, groups=GROUPS)


def open_tunnel_events() -> socket.socket:
    """The same for a `TunnelMonitor`."""
    return open_socket(receive_buffer=_CHUNK, groups=_TUNNEL_GROUPS)


class Monitor:
    """Iterating blocks for events; `close()` from any thread ends it.

    :param sock: from `open_events`; belongs to the monitor.
    :param find: looks up a device of the namespace.
    :param news: chooses which rows are told. (None: all)
    """

    def __init__(self, sock: socket.socket, find: Find, news: News | None = None) -> None:
        self._socket = sock
        self._find = find
        self._news = news
        self._names: dict[int, str] = {}
        self._in_bulk = False
        self._closed = False
        self._iterating = False
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def __iter__(self) -> Iterator[KernelEvent]:
        with self._lock:
            if self._closed:
                return
            self._iterating = True
        try:
            while not self._closed:
                yield from self._receive()
        except OSError as error:
            raise KernelError("follow kernel events", error.errno or 0) from error
        finally:
            with self._lock:
                self._release()

    def close(self) -> None:
        """Whoever iterates releases the socket; it must not be pulled from under them."""
        with self._lock:
            if self._iterating:
                os.eventfd_write(self._wake, 1)
                self._closed = True
            elif not self._closed:
                self._release()

    def _release(self) -> None:
        self._closed, self._iterating = True, False
        self._socket.close()
        os.close(self._wake)

    def _receive(self) -> list[KernelEvent]:
        """What has come, or nothing after waiting for it."""
        chunks: list[bytes] = []
        try:
            while len(chunks) < _TOGETHER:
                chunks.append(self._socket.recv(_CHUNK, socket.MSG_DONTWAIT))
        except BlockingIOError:
            if not chunks:
                self._poll.poll()
                if self._in_bulk:
                    time.sleep(_BULK_SECONDS)
        except OSError as error:
            if error.errno != ENOBUFS:
                raise
            self._drain()
            self._names.clear()
            return [Overflow()]
        self._in_bulk = len(chunks) >= _BULK
        return self._events(b"".join(chunks))

    def _events(self, chunk: bytes) -> list[KernelEvent]:
        events: list[KernelEvent] = []
        start = 0
        while start < len(chunk):
            size, kind, *_ = HEADER.unpack_from(chunk, start)
            end = start + (size + 3 & ~3)
            if kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
                form = Form.of(chunk, start)
                end = form.end(chunk, start)
                events += self._row_events(start, end, chunk, form)
            elif kind in (RTM_NEWLINK, RTM_DELLINK):
                events += self._link_events(chunk, start)
            elif kind in _SHAPING:
                index = TRAFFIC.unpack_from(chunk, start)[6]
                if index > 0 and (name := self._name(index)):
                    events.append(LinkEvent(name, True))
            start = end
        return events

    def _drain(self) -> None:
        """Skip what is in the buffer: it is older than what whoever hears of the overflow looks up next."""
        while True:
            try:
                self._socket.recv(_CHUNK, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != ENOBUFS:
                    raise

    def _row_events(self, start: int, end: int, chunk: bytes, form: Form) -> list[RowEvent]:
        """Of messages of that form."""
        if form.of_bridge and not form.lasting:
            return []
        present = form.kind == RTM_NEWNEIGH and form.lasting
        rows: Iterable[Row] = rows_between(start, end, chunk, form, self._shared_name)
        rows = (row for row in rows if not (isinstance(row, Station) and row.local and self._is_own(row)))
        return [RowEvent(row, present) for row in (self._news(rows, present) if self._news else rows)]

    def _link_events(self, chunk: bytes, start: int) -> list[LinkEvent]:
        size, kind, _, _, _, family, _, index, *_ = LINK.unpack_from(chunk, start)
        name = text(chunk, attributes(chunk, start + LINK.size, start + size)[IFLA_IFNAME])
        # A bridge (AF_BRIDGE) says "deleted" of a port that merely leaves it.
        present = kind == RTM_NEWLINK or family == _AF_BRIDGE
        events = [LinkEvent(name, present)]
        if (before := self._names.pop(index, name)) != name:
            events.insert(0, LinkEvent(before, False))
        if present:
            self._names[index] = name
        return events

    def _name(self, index: int) -> str:
        if index not in self._names:
            device = self._find(index=index)
            self._names[index] = device.name if device else ""
        return self._names[index]

    def _shared_name(self, index: bytes) -> str:
        """Of a device with rows; "" of any other."""
        name = self._name(int.from_bytes(index, sys.byteorder))
        return name if vni_of(name) else ""

    def _is_own(self, row: Station) -> bool:
        device = self._find(name=row.device)
        return device is not None and row == own_row(device)


class TunnelMonitor(Monitor):
    """Says that something changed in the namespace of the WireGuard device, and at first that something may have."""

    def __iter__(self) -> Iterator[KernelEvent]:
        yield TunnelEvent()
        yield from super().__iter__()

    def _events(self, chunk: bytes) -> list[KernelEvent]:
        return [TunnelEvent()]
