"""What this host last knew of the cluster, on disk: what the data plane is made of after a reboot without a store.

Only the networks of this host's engine are kept, as entries of the store, word for word.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from weft.store import Entry

log = logging.getLogger(__name__)


class SnapshotFile:
    """
    :param origin: which store the entries are of; those of another one are not used.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self._path = path
        self._origin = origin

    def load(self) -> tuple[Entry, ...]:
        """The entries, with revision 0; none if there is no such file, or it cannot be used."""
        try:
            found = json.loads(self._path.read_text())
            if found["origin"] == self._origin:
                return tuple(Entry(key, value, 0) for key, value in found["entries"])
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("the snapshot %s cannot be used: %s", self._path, error)
        return ()

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
