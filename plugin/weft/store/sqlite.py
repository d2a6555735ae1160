"""The default store: one SQLite file, shared by any number of processes on one machine.

`entries` is the present state, `changes` the history that watches read. The history is trimmed; a watch that fell
behind gets a snapshot instead. A writer touches `<file>.changed` after each commit, and watches wait for that by
inotify: watching the database's own files would wake them before the commit can be seen.

A key that was beaten has a time at which it expires, by the wall clock that all processes share. Who next asks for
anything removes it, and an open watch asks every second.

A backup may be restored into the file while weft runs (`sqlite3 weft.db ".restore backup"`): a watch that has seen
later revisions gets a snapshot, which it asks for within a second. A file that another one replaced is refused: to
close it would remove the other one's journal.

WAL with `synchronous=FULL`: what was answered to the engine survives a power failure, as the engine's own state does.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, flock
from functools import partial
from pathlib import Path
from time import monotonic, time

from inotify_simple import INotify, flags

from weft.errors import StoreError
from weft.store import (
    Changes,
    Condition,
    Delete,
    DeleteAll,
    Entry,
    Health,
    KeyIs,
    Listing,
    NoneNewer,
    Present,
    Put,
    Snapshot,
    ValueIs,
    Write,
)

HISTORY = 50_000
"""Revisions of history that are kept for watches."""
_BUSY_SECONDS = 5.0
_FALLBACK_MS = 1000
"""A watch looks by itself this often, in case a writer died between its commit and its touch."""

_MIGRATIONS = (
    """
    CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE changes (revision INTEGER NOT NULL, key TEXT NOT NULL, value TEXT);
    CREATE INDEX changes_by_revision ON changes (revision);
    CREATE TABLE counter (revision INTEGER NOT NULL, trimmed INTEGER NOT NULL);
    INSERT INTO counter VALUES (0, 0);
    """,
    """
    ALTER TABLE entries ADD COLUMN expires REAL;
    CREATE INDEX entries_by_expiry ON entries (expires) WHERE expires IS NOT NULL;
    """,
)
"""What makes a file of each version one of the next; an empty one has version 0."""
SCHEMA_VERSION = len(_MIGRATIONS)
_EXPIRED = "SELECT key FROM entries WHERE expires <= ?"
_CHANGES = "SELECT key, value FROM changes WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision, rowid"
"""Ordered by the rowid alone, SQLite would go through all of them."""


class SqliteStore:
    """Opens (and creates) the store at `path`. Connections are per thread, made when a thread first asks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.signal = path.with_name(path.name + ".changed")
        self._local = threading.local()
        with self.errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One process at a time: SQLite does not wait for another that switches the same new file to WAL.
            with self.signal.open("a") as gate:
                flock(gate, LOCK_EX)
                self._prepare()
            self._file = self._present_file()

    def get(self, key: str) -> Entry | None:
        return self.get_many([key]).get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        with self.errors(), self._transaction("BEGIN") as db:
            return _found(db, keys)

    def list(self, prefix: str) -> Listing:
        with self.errors(), self._transaction("BEGIN") as db:
            return Listing(_entries(db, prefix), _revision(db))

    def pages(self, prefix: str) -> Iterator[Snapshot]:
        listing = self.list(prefix)
        yield Snapshot(listing.entries, listing.revision)

    def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> bool:
        return self.attempt(conditions, writes, ()) is None

    def attempt(
        self, conditions: Sequence[Condition], writes: Sequence[Write], keys: Sequence[str]
    ) -> dict[str, Entry] | None:
        with self.errors(), self._transaction("BEGIN IMMEDIATE") as db:
            if not all(_holds(db, condition) for condition in conditions):
                return _found(db, keys)
            with self._change(db) as revision:
                for write in writes:
                    _write(db, write, revision)
        return None

    def beat(self, key: str, value: str, seconds: float) -> bool:
        with self.errors(), self._transaction("BEGIN IMMEDIATE") as db:
            present = db.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
            if present is None:
                with self._change(db) as revision:
                    _write(db, Put(key, value), revision)
                    _expire(db, key, seconds)
            elif present[0] == value:
                _expire(db, key, seconds)
        return present is None or bool(present[0] == value)

    def watch(self, prefix: str) -> SqliteWatch:
        return SqliteWatch(self, prefix)

    def health(self) -> Health:
        began = monotonic()
        try:
            self.get("schema")
        except StoreError as error:
            return Health(str(error))
        return Health(seconds=monotonic() - began)

    def close(self) -> None:
        """Close this thread's connection. Other threads may be using theirs: those end with the process."""
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is not None:
            db.close()
            del self._local.db

    def read_changes(self, prefix: str, after: int | None) -> Snapshot | Changes:
        """What a watch that has seen revision `after` (None: nothing) gets next; empty changes if nothing is new."""
        with self.errors(), self._transaction("BEGIN") as db:
            revision, trimmed = db.execute("SELECT revision, trimmed FROM counter").fetchone()
            if after is None or not trimmed <= after <= revision:
                return Snapshot(_entries(db, prefix), revision)
            return Changes(tuple(db.execute(_CHANGES, (after, prefix, _end(prefix)))), revision)

    def _prepare(self) -> None:
        # Never open a file that exists: closing it would free SQLite's own locks on it in this process (fcntl(2)).
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"store {self.path} was written by a newer weft (schema {version}, this one knows {SCHEMA_VERSION}): "
                "install that version or newer"
            )
        damage = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise sqlite3.DatabaseError(damage)
        if version < SCHEMA_VERSION:
            steps = "".join(_MIGRATIONS[version:])
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def _present_file(self) -> tuple[int, int] | None:
        """What is at the path, whatever the connections have open."""
        with suppress(FileNotFoundError):
            found = self.path.stat()
            return found.st_dev, found.st_ino
        return None

    @property
    def _db(self) -> sqlite3.Connection:
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            db.execute("PRAGMA synchronous = FULL")
            db.text_factory = partial(str, encoding="utf-8", errors="replace")  # of what other programs wrote
            self._local.db = db
        return db

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        if self._present_file() != self._file:
            raise StoreError(f"store {self.path} was replaced or moved away: restart weft on this machine")
        db = self._db
        if db.execute(_EXPIRED, (time(),)).fetchone():
            with suppress(sqlite3.OperationalError):  # a full disk, say, that can be read nevertheless
                self._remove_expired(db)
        db.execute(begin)
        with db:  # commits, or rolls back on an exception
            yield db

    @contextmanager
    def _change(self, db: sqlite3.Connection) -> Iterator[int]:
        """The revision of what is now written; commits, and wakes the watches."""
        revision = _revision(db) + 1
        yield revision
        db.execute("UPDATE counter SET revision = ?", (revision,))
        if revision % (HISTORY // 10) == 0:
            _trim(db, revision - HISTORY)
        db.execute("COMMIT")
        self.signal.touch()

    def _remove_expired(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")
        with db:
            # Another may have been quicker, and its keeper be back.
            if keys := db.execute(_EXPIRED, (time(),)).fetchall():
                with self._change(db) as revision:
                    for (key,) in keys:
                        _write(db, Delete(key), revision)

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"store {self.path} cannot be used: {error}; check the file, its folder and the disk"
            ) from error
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"store {self.path} is damaged ({error}): restore it from a backup, or move it away and restart weft "
                "to begin with an empty store"
            ) from error
        except OSError as error:
            raise StoreError(
                f"store {self.path} cannot be used: {error.strerror} ({error.filename}): name another in WEFT_STORE"
            ) from error


class SqliteWatch:
    """See `Store.watch`."""

    def __init__(self, store: SqliteStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Snapshot | Changes]:
        revision: int | None = None
        with self._store.errors(), INotify() as inotify:
            inotify.add_watch(str(self._store.signal), flags.ATTRIB)
            while not self._closed.is_set():
                news = self._store.read_changes(self._prefix, revision)
                revision = news.revision
                if isinstance(news, Snapshot) or news.events:
                    yield news
                else:
                    inotify.read(timeout=_FALLBACK_MS)

    def close(self) -> None:
        self._closed.set()
        self._store.signal.touch()


def _end(prefix: str) -> str:
    """The least text that sorts after every text with this prefix."""
    return prefix + "\U0010ffff"


def _revision(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT revision FROM counter").fetchone()[0])


def _entries(db: sqlite3.Connection, prefix: str) -> tuple[Entry, ...]:
    rows = db.execute(
        "SELECT key, value, revision FROM entries WHERE key >= ? AND key < ? ORDER BY key", (prefix, _end(prefix))
    )
    return tuple(Entry(*row) for row in rows)


def _found(db: sqlite3.Connection, keys: Iterable[str]) -> dict[str, Entry]:
    query = "SELECT key, value, revision FROM entries WHERE key = ?"
    return {key: Entry(*row) for key in keys for row in db.execute(query, (key,))}


def _holds(db: sqlite3.Connection, condition: Condition) -> bool:
    if not isinstance(condition, NoneNewer):
        entry = _found(db, [condition.key]).get(condition.key)
        match condition:
            case KeyIs(_, revision):
                return (entry.revision if entry else 0) == revision
            case ValueIs(_, value):
                return entry is not None and entry.value == value
            case Present():
                return entry is not None
    newer = db.execute(
        "SELECT 1 FROM entries WHERE key >= ? AND key < ? AND revision > ? LIMIT 1",
        (condition.prefix, _end(condition.prefix), condition.revision),
    )
    return newer.fetchone() is None


def _write(db: sqlite3.Connection, write: Write, revision: int) -> None:
    if isinstance(write, Put):
        db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, NULL)", (write.key, write.value, revision))
        db.execute("INSERT INTO changes VALUES (?, ?, ?)", (revision, write.key, write.value))
        return
    where, what = (
        ("key >= ? AND key < ?", (write.prefix, _end(write.prefix)))
        if isinstance(write, DeleteAll)
        else ("key = ?", (write.key,))
    )
    db.execute(f"INSERT INTO changes SELECT {revision}, key, NULL FROM entries WHERE {where} ORDER BY key", what)
    db.execute(f"DELETE FROM entries WHERE {where}", what)


def _expire(db: sqlite3.Connection, key: str, seconds: float) -> None:
    db.execute("UPDATE entries SET expires = ? WHERE key = ?", (time() + seconds, key))


def _trim(db: sqlite3.Connection, up_to: int) -> None:
    db.execute("DELETE FROM changes WHERE revision <= ?", (up_to,))
    db.execute("UPDATE counter SET trimmed = max(trimmed, ?)", (up_to,))
