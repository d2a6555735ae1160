"""The three bulk tables: VXLAN forwarding, bridge forwarding, neighbours; packed and parsed by ourselves.

pyroute2 writes 5,000 rows a second and reads 10,000; one network of 100,000 endpoints has 300,000. See `netlink.py`
for how rows travel. What a row is in the kernel's terms:

    Fdb         AF_BRIDGE, NTF_SELF, permanent, NDA_LLADDR and NDA_DST. Flood entries share a MAC, so they are
                appended; any other replaces what the MAC had, in one step.
    Station     AF_BRIDGE, NTF_MASTER, NUD_NOARP ("static"), NDA_LLADDR. Never NUD_PERMANENT: that would mean that the
                MAC is the bridge's own, and its frames would end here.
    Neighbour   AF_INET or AF_INET6, permanent, NDA_DST and NDA_LLADDR.

Reading has to see what others put there as well, or it would never be removed. It leaves out what the kernel makes by
itself: each device's own MAC, multicast addresses, what a bridge learned, and rows of VLANs, which our bridges do not
have (`observe.BRIDGE`). An `Fdb` entry with more than a VTEP (another port, VNI, interface or a nexthop group) is seen
with the VTEP 0.0.0.0, which no wish contains and which, as the kernel reads it, deletes the MAC with all its VTEPs.

In a large table most messages differ from the one before in nothing but device and addresses. The columns of such a run
are cut out at once, several times faster than message by message. The first message teaches the form, so this does not
depend on the order in which a kernel puts the attributes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from errno import EEXIST, EINVAL, ENODEV, ENOENT, ESRCH
from itertools import repeat
from socket import AF_INET, AF_INET6, socket
from struct import Struct
from typing import NamedTuple

from weft.dataplane import FLOOD_MAC, Fdb, Neighbour, Row, Station
from weft.errors import KernelError
from weft.kernel.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    Device,
    Find,
    Rtnetlink,
    attributes,
)
from weft.reconcile import RowPlan

RTM_NEWNEIGH = 28
RTM_DELNEIGH = 29
_RTM_GETNEIGH = 30

_AF_BRIDGE = 7
_FAMILY = {4: AF_INET, 16: AF_INET6}
_NTF_SELF = 0x2
_NTF_MASTER = 0x4
_NUD_NOARP = 0x40
_NUD_PERMANENT = 0x80
_LASTING = _NUD_NOARP | _NUD_PERMANENT

_NDA_DST = 1
_NDA_LLADDR = 2
_NDA_VLAN = 5
_NDA_IFINDEX = 8
_MORE_THAN_VTEP = {6, 7, _NDA_IFINDEX, 13}
"""NDA_PORT, NDA_VNI, NDA_IFINDEX, NDA_NH_ID."""

_HEAD = "=IHHII BxxxiHBB"
"""nlmsghdr, then ndmsg: family, index, state, flags, type."""
_FORM_BYTES = (*range(6), 16, *range(24, 27))
"""Of those, what two messages of one form share: length, type, family, state, flags."""
_IFINDEX = 20
_MESSAGE = Struct(_HEAD)
_FDB = {4: Struct(_HEAD + "HH6s2x HH4s"), 16: Struct(_HEAD + "HH6s2x HH16s")}
_STATION = Struct(_HEAD + "HH6s2x")
_NEIGHBOUR = {4: Struct(_HEAD + "HH4s HH6s2x"), 16: Struct(_HEAD + "HH16s HH6s2x")}
_FILTER = Struct("=HHI")
_INDEX = Struct("=i")

UNKNOWN_VTEP = bytes(4)

_PUT = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE
_PUT_FLOOD = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_APPEND
_ALREADY_SO = {RTM_NEWNEIGH: {EEXIST}, RTM_DELNEIGH: {ENOENT, ESRCH, ENODEV}}
_VERB = {RTM_NEWNEIGH: "put", RTM_DELNEIGH: "delete"}
_NO_INDEX = 2**31 - 1
"""Stands for a device that is not there, so that the kernel itself says so."""

_BATCH = 600
_FEW = 4
"""Up to so many devices are dumped one by one: each dump of neighbours walks the kernel's whole table of them, which
never shrinks, and is that of all namespaces."""


class Rows:
    """Reads and writes the tables of one namespace. Readers and writers do not wait for each other.

    :param opened: makes a socket in that namespace.
    :param find: looks up a device there by its name.
    """

    def __init__(self, opened: Callable[[], socket], find: Find) -> None:
        self._reader = Rtnetlink(opened)
        self._writer = Rtnetlink(opened)
        self._find = find

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def observe(self, names: Iterable[str]) -> set[Row]:
        devices = [device for name in names if (device := self._find(name=name))]
        wanted = {_INDEX.pack(device.ifindex): device.name for device in devices}
        if len(devices) <= _FEW:
            requests = [_dump_forwarding(device.ifindex) for device in devices]
            requests += [_dump_neighbours(d.ifindex) for d in devices if d.name.startswith("br")]  # none else has any
        else:
            requests = [_dump_forwarding(0), _dump_neighbours(0)]
        rows: set[Row] = set()
        with _no_garbage():
            for request in requests:
                for chunk in self._reader.dump(request):
                    rows.update(parse(chunk, wanted))
        rows.difference_update(map(own_row, devices))
        return rows

    def write(self, plan: RowPlan) -> None:
        """Put, then delete; only entries of unknown VTEP go first, since with them goes all that their MAC has."""
        unknown = {row for row in plan.delete if isinstance(row, Fdb) and row.vtep == UNKNOWN_VTEP}
        delete = [row for row in plan.delete if row not in unknown] if unknown else plan.delete
        failures = [
            *self._send(RTM_DELNEIGH, [*unknown]),
            *self._send(RTM_NEWNEIGH, plan.put),
            *self._send(RTM_DELNEIGH, delete),
        ]
        if failures:
            verb, row, errno = failures[0]
            others = f" and {len(failures) - 1} other rows" if len(failures) > 1 else ""
            raise KernelError(f"{_VERB[verb]} {row}{others}", errno, _hint(row, errno))

    def _send(self, verb: int, rows: Sequence[Row]) -> Iterator[tuple[int, Row, int]]:
        """Yields what failed: verb, row, errno."""
        indexes: dict[str, int] = {}
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            for name in {row.device for row in batch} - indexes.keys():
                device = self._find(name=name)
                indexes[name] = device.ifindex if device else _NO_INDEX
            packed = [pack(verb, row, indexes[row.device], place) for place, row in enumerate(batch)]
            for place, errno in self._writer.send(packed):
                if errno not in _ALREADY_SO[verb]:
                    yield verb, batch[place], errno


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Rows are in no cycles; looking for some among 300,000 new ones takes as long as making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _hint(row: Row, errno: int) -> str:
    if isinstance(row, Neighbour) and len(row.address) == 16 and errno == EINVAL:
        return "IPv6 needs an MTU of 1280 at least, and must not be off in the data plane"
    return ""


def pack(verb: int, row: Row, index: int, number: int) -> bytes:
    """The request to put or delete a row on the device of that index."""
    flags = NLM_F_REQUEST if verb == RTM_DELNEIGH else _PUT
    if isinstance(row, Fdb):
        if row.mac == FLOOD_MAC and verb == RTM_NEWNEIGH:
            flags = _PUT_FLOOD
        form, width = _FDB[len(row.vtep)], 4 + len(row.vtep)
        return form.pack(form.size, verb, flags, number, 0, _AF_BRIDGE, index, _NUD_PERMANENT, _NTF_SELF, 0,
                         10, _NDA_LLADDR, row.mac, width, _NDA_DST, row.vtep)  # fmt: skip
    if isinstance(row, Neighbour):
        form, width = _NEIGHBOUR[len(row.address)], 4 + len(row.address)
        return form.pack(form.size, verb, flags, number, 0, _FAMILY[len(row.address)], index, _NUD_PERMANENT, 0, 0,
                         width, _NDA_DST, row.address, 10, _NDA_LLADDR, row.mac)  # fmt: skip
    # A row that makes a MAC the bridge's own may be on the bridge itself, which is nobody's port.
    owner = _NTF_SELF if row.device.startswith("br") else _NTF_MASTER
    return _STATION.pack(_STATION.size, verb, flags, number, 0, _AF_BRIDGE, index, _NUD_NOARP, owner, 0,
                         10, _NDA_LLADDR, row.mac)  # fmt: skip


class Form(NamedTuple):
    """A message but for its addresses; `at` tells where in the chunk they are."""

    size: int
    kind: int
    family: int
    ifindex: int
    state: int
    flags: int
    at: dict[int, slice]

    @classmethod
    def of(cls, chunk: bytes, start: int) -> Form:
        size, kind, _, _, _, family, index, state, flags, _ = _MESSAGE.unpack_from(chunk, start)
        return cls(size, kind, family, index, state, flags, attributes(chunk, start + _MESSAGE.size, start + size))

    @property
    def lasting(self) -> bool:
        """Not learned. The kernel's own neighbours, those of multicast addresses, are NUD_NOARP."""
        return bool(self.state & (_LASTING if self.family == _AF_BRIDGE else _NUD_PERMANENT))

    @property
    def of_bridge(self) -> bool:
        """Whether it is of a bridge's own table, where addresses come and go by learning."""
        return self.family == _AF_BRIDGE and not self.flags & _NTF_SELF

    def end(self, chunk: bytes, start: int) -> int:
        """Where the messages of this form end that begin at `start`: the bytes that make the form are all equal."""
        places = [start + place for place in _FORM_BYTES]
        places += [place for at in self.at.values() for place in range(at.start - 4, at.start)]
        columns = [chunk[place :: self.size] for place in places]
        count = min(len(column) - len(column.lstrip(column[:1])) for column in columns)
        return start + self.size * count

    def row(self, chunk: bytes, device: str) -> Row | None:
        """The row, lasting or not; None if it is of a kind that we do not care for."""
        mac = chunk[self.at[_NDA_LLADDR]] if _NDA_LLADDR in self.at else b""
        address = chunk[self.at[_NDA_DST]] if _NDA_DST in self.at else b""
        if self.family != _AF_BRIDGE:
            return Neighbour(device, address, mac)
        if self.of_bridge:
            return None if _NDA_VLAN in self.at else Station(device, mac, not self.state & _NUD_NOARP)
        if not _MORE_THAN_VTEP.isdisjoint(self.at):
            return Fdb(device, mac, UNKNOWN_VTEP)
        return Fdb(device, mac, address) if address else None


def parse(chunk: bytes, devices: Mapping[bytes, str]) -> Iterator[Row]:
    """The lasting rows in a dump's chunk that are on these devices, by index as the kernel packs it."""
    start = 0
    while start < len(chunk):
        form = Form.of(chunk, start)
        end = form.end(chunk, start)
        if form.lasting and _NDA_LLADDR in form.at:
            yield from rows_between(start, end, chunk, form, devices.get)
        start = end


def rows_between(
    start: int, end: int, chunk: bytes, form: Form, device: Callable[[bytes], str | None]
) -> Iterator[Row]:
    """Of messages of that form, lasting or not; `device` tells a name by the index as the kernel packs it, if it is of
    interest."""
    if sample := form.row(chunk, ""):
        names = [device(chunk[place : place + 4]) for place in range(start + _IFINDEX, end, form.size)]
        yield from (row for row in _cut(chunk, form, names, sample) if row[0])


def own_row(device: Device) -> Station:
    """What the kernel makes for a device that is a bridge or a bridge's port."""
    return Station(device.name, device.mac, True)


def _cut(chunk: bytes, first: Form, devices: Sequence[str | None], sample: Row) -> Iterable[Row]:
    """The rows of a run of messages on these devices; `sample` is like the first."""

    def column(attribute: int) -> Iterable[bytes]:
        if attribute not in first.at:
            return repeat(b"")
        at, size = first.at[attribute], first.size
        width = at.stop - at.start
        return [chunk[place : place + width] for place in range(at.start, at.start + len(devices) * size, size)]

    macs = column(_NDA_LLADDR)
    match sample:
        case Neighbour():
            return map(Neighbour._make, zip(devices, column(_NDA_DST), macs, strict=False))
        case Station():
            return map(Station._make, zip(devices, macs, repeat(sample.local), strict=False))
        case Fdb():
            vteps = repeat(UNKNOWN_VTEP) if sample.vtep == UNKNOWN_VTEP else column(_NDA_DST)
            return map(Fdb._make, zip(devices, macs, vteps, strict=False))


def _dump_forwarding(index: int) -> bytes:
    return _MESSAGE.pack(_MESSAGE.size, _RTM_GETNEIGH, NLM_F_REQUEST | NLM_F_DUMP, 0, 0, _AF_BRIDGE, index, 0, 0, 0)


def _dump_neighbours(index: int) -> bytes:
    """Both IP versions. Unlike above, the device is an attribute."""
    only = _FILTER.pack(8, _NDA_IFINDEX, index) if index else b""
    size = _MESSAGE.size + len(only)
    return _MESSAGE.pack(size, _RTM_GETNEIGH, NLM_F_REQUEST | NLM_F_DUMP, 0, 0, 0, 0, 0, 0, 0) + only
