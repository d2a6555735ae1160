"""What this host last knew of the cluster, on disk: what the data plane is made of after a reboot without a store.

Only the networks of this host's engine are kept, as entries of the store, word for word.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from weft.store import Entry

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is in such a file.

    :param origin: which store the entries are of.
    :param when: Unix time of the last change of the file.
    :param entries: with revision 0.
    """

    path: Path
    origin: str
    when: float
    entries: tuple[Entry, ...]


class _Form(msgspec.Struct):
    """What is in the file, as JSON."""

    origin: str
    entries: list[tuple[str, str]]


def read_snapshot(path: Path) -> Snapshot | None:
    """The snapshot; None if there is no such file, or it cannot be used."""
    try:
        found, when = msgspec.json.decode(path.read_bytes(), type=_Form), path.stat().st_mtime
        return Snapshot(path, found.origin, when, tuple(Entry(key, value, 0) for key, value in found.entries))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        log.warning("the snapshot %s cannot be used: %s", path, error)
    return None


class SnapshotFile:
    """
    :param origin: which store the entries are of; those of another one are not used.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self._path = path
        self._origin = origin

    def load(self) -> tuple[Entry, ...]:
        """The entries, with revision 0; none if there is no such file, or it cannot be used."""
        found = read_snapshot(self._path)
        return found.entries if found and found.origin == self._origin else ()

    def save(self, entries: Iterable[tuple[str, str]]) -> None:
        """Replace the file; a power failure leaves the old one or the new one."""
        fresh = self._path.with_suffix(".new")
        try:
            with fresh.open("wb") as file:
                file.writelines(_lines(self._origin, entries))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError as error:
            log.error("the snapshot %s cannot be written: %s; make room, or correct WEFT_STATE", self._path, error)


def _lines(origin: str, entries: Iterable[tuple[str, str]]) -> Iterator[bytes]:
    """A `_Form`, without having all of it in memory."""
    yield b'{"origin":%s,"entries":[' % msgspec.json.encode(origin)
    separator = b"\n"
    for entry in entries:
        yield separator + msgspec.json.encode(entry)
        separator = b",\n"
    yield b"\n]}\n"
