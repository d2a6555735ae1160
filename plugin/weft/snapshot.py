"""What this host last knew of the cluster, on disk: what the data plane is made of after a reboot without a store.

Only the networks of this host's engine are kept, as entries of the store, word for word.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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


def read_snapshot(path: Path) -> Snapshot | None:
    """The snapshot; None if there is no such file, or it cannot be used."""
    try:
        found, when = json.loads(path.read_text()), path.stat().st_mtime
        return Snapshot(path, found["origin"], when, tuple(Entry(key, value, 0) for key, value in found["entries"]))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
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
            with fresh.open("w") as file:
                json.dump({"origin": self._origin, "entries": list(entries)}, file, separators=(",", ":"))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError as error:
            log.error("the snapshot %s cannot be written: %s; make room, or correct WEFT_STATE", self._path, error)
