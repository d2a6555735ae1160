"""The store's contract, kept by SQLite and by a real etcd of one member; and what is SQLite's own."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from tests.etcd import MISSING, Cluster, in_memory
from tests.unit.conftest import together
from weft.errors import StoreError
from weft.store import (
    Changes,
    Condition,
    Delete,
    DeleteAll,
    Entry,
    KeyIs,
    Listing,
    NoneNewer,
    Present,
    Put,
    Snapshot,
    Store,
    ValueIs,
)
from weft.store import sqlite as sqlite_store
from weft.store.etcd import EtcdStore
from weft.store.sqlite import SqliteStore

_numbers = count()


@pytest.fixture(scope="session")
def etcd() -> Iterator[Cluster]:
    if MISSING:
        pytest.skip(MISSING)
    with in_memory() as folder:
        cluster = Cluster(Path(folder))
        yield cluster
        cluster.kill()


@pytest.fixture(params=["sqlite", "etcd"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        opened: Store = SqliteStore(tmp_path / "weft.db")
    else:
        opened = EtcdStore(request.getfixturevalue("etcd").endpoints, root=f"/test/{next(_numbers)}/")
    with closing(opened):
        yield opened


def put(store: Store, key: str, value: str = "x") -> int:
    """Write a key and return its revision."""
    assert store.transact([], [Put(key, value)])
    entry = store.get(key)
    assert entry is not None
    return entry.revision


def test_a_change_costs_the_same_however_many_came_before(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "store")) as store, closing(sqlite3.connect(store.path)) as file:
        (step,) = file.execute(f"EXPLAIN QUERY PLAN {sqlite_store._CHANGES}", (7, "a", "b")).fetchall()
    assert "SEARCH changes USING INDEX" in step[-1]


def test_a_key_is_read_back_with_a_rising_revision(store: Store) -> None:
    first = put(store, "a", "1")
    assert put(store, "a", "2") > first
    entry = store.get("a")
    assert entry is not None
    assert entry.value == "2"
    assert store.get("b") is None


def test_a_listing_is_sorted_and_stays_under_its_prefix(store: Store) -> None:
    for key in ("p/b", "p/a", "p", "q/a", "p0"):
        put(store, key)
    listing = store.list("p/")
    assert [entry.key for entry in listing.entries] == ["p/a", "p/b"]
    assert listing.revision == put(store, "p/c") - 1


@pytest.mark.parametrize(
    ("key", "revision_offset", "holds"), [("a", 0, True), ("a", -1, False), ("a", 1, False), ("b", None, True)]
)
def test_key_is(store: Store, key: str, revision_offset: int | None, holds: bool) -> None:
    revision = put(store, "a")
    wanted = 0 if revision_offset is None else revision + revision_offset
    assert store.transact([KeyIs(key, wanted)], [Put("done", "")]) is holds
    assert (store.get("done") is not None) is holds


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (ValueIs("a", "x"), True),
        (ValueIs("a", ""), False),
        (ValueIs("b", "x"), False),
        (ValueIs("b", ""), False),
        (Present("a"), True),
        (Present("b"), False),
    ],
    ids=str,
)
def test_value_is_and_present(store: Store, condition: Condition, holds: bool) -> None:
    put(store, "a", "y")
    put(store, "a", "x")
    assert store.transact([condition], [Put("done", "")]) is holds
    assert (store.get("done") is not None) is holds


def test_an_attempt_tells_what_is_there_if_its_guess_is_wrong(store: Store) -> None:
    revision = put(store, "a", "x")
    before = store.list("")
    assert store.attempt([KeyIs("a", 0)], [Put("b", "")], ["a", "b"]) == {"a": Entry("a", "x", revision)}
    assert store.attempt([KeyIs("a", 0)], [], []) == {}
    assert store.list("") == before
    assert store.attempt([KeyIs("a", revision)], [Put("b", "")], ["a", "b"]) is None
    assert store.get("b")


def test_none_newer_sees_new_and_changed_keys_under_the_prefix_only(store: Store) -> None:
    put(store, "p/a")
    listing = store.list("p/")
    put(store, "q/a")
    assert store.transact([NoneNewer("p/", listing.revision)], [Put("q/b", "")])
    put(store, "p/a")
    assert not store.transact([NoneNewer("p/", listing.revision)], [Put("q/c", "")])
    assert not store.transact([NoneNewer("p/", 0)], [])
    store.transact([], [DeleteAll("p/")])
    assert store.transact([NoneNewer("p/", 0)], [])


def test_a_failed_condition_writes_nothing_at_all(store: Store) -> None:
    put(store, "a")
    before = store.list("")
    assert not store.transact([KeyIs("b", 0), KeyIs("a", 0)], [Put("b", ""), Delete("a")])
    assert store.list("") == before


def test_a_watch_begins_with_a_snapshot_and_goes_on_in_order(store: Store) -> None:
    put(store, "p/a", "1")
    watch = store.watch("p/")
    news = iter(watch)
    first = next(news)
    assert isinstance(first, Snapshot)
    assert [(e.key, e.value) for e in first.entries] == [("p/a", "1")]
    store.transact([], [Put("p/b", "2"), Delete("p/a"), Put("q/x", "")])
    store.transact([], [DeleteAll("p/")])
    events: list[tuple[str, str | None]] = []
    while len(events) < 3:
        change = next(news)
        assert isinstance(change, Changes)
        events += change.events
    assert events == [("p/b", "2"), ("p/a", None), ("p/b", None)]
    watch.close()
    assert list(news) == []


def test_deleting_what_is_not_there_is_no_event(store: Store) -> None:
    watch = store.watch("")
    news = iter(watch)
    next(news)
    store.transact([], [Delete("ghost"), DeleteAll("ghosts/")])
    put(store, "a")
    change = next(news)
    assert isinstance(change, Changes)
    assert change.events == (("a", "x"),)
    watch.close()


def test_a_watch_that_fell_behind_gets_a_snapshot(
    store: Store, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "HISTORY", 20)
    put(store, "gone")
    watch = store.watch("")
    news = iter(watch)
    next(news)
    store.transact([], [Delete("gone")])
    for number in range(50):
        put(store, f"k{number % 3}", str(number))
    if isinstance(store, EtcdStore):
        request.getfixturevalue("etcd").forget_history()
    caught_up = next(news)
    assert isinstance(caught_up, Snapshot)
    assert {entry.key for entry in caught_up.entries} == {"k0", "k1", "k2"}
    put(store, "k4")
    change = next(news)
    assert isinstance(change, Changes)
    assert change.events == (("k4", "x"),)
    watch.close()


def test_a_closed_watch_ends_its_reader_at_once(store: Store) -> None:
    watch = store.watch("")
    arrived = threading.Event()

    def read() -> None:
        for _ in watch:
            arrived.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert arrived.wait(5)
    watch.close()
    reader.join(timeout=2)
    assert not reader.is_alive()


def test_many_keys_are_read_at_once(store: Store) -> None:
    revisions = [put(store, key, key) for key in ("a", "b")]
    found = store.get_many(["b", "ghost", "a", "a"])
    assert {key: (entry.key, entry.value, entry.revision) for key, entry in found.items()} == {
        "a": ("a", "a", revisions[0]),
        "b": ("b", "b", revisions[1]),
    }
    assert store.get_many([]) == {}
    assert len(store.get_many([f"k{number}" for number in range(99)] + ["a"])) == 1


def next_events(news: Iterator[Snapshot | Changes]) -> tuple[tuple[str, str | None], ...]:
    change = next(news)
    assert isinstance(change, Changes)
    return change.events


def test_a_beaten_key_goes_by_itself_and_watches_see_it(store: Store) -> None:
    watch = store.watch("alive/")
    news = iter(watch)
    next(news)
    put(store, "alive/h2", "not beaten")
    assert next_events(news) == (("alive/h2", "not beaten"),)
    began = time.monotonic()
    assert store.beat("alive/h1", "me", 2)
    assert next_events(news) == (("alive/h1", "me"),)
    assert next_events(news) == (("alive/h1", None),)
    assert 1.9 < time.monotonic() - began < 5
    assert [entry.key for entry in store.list("").entries] == ["alive/h2"]
    assert store.beat("alive/h1", "me", 2)
    assert next_events(news) == (("alive/h1", "me"),)
    watch.close()


def test_beats_keep_a_key_without_changing_anything(store: Store) -> None:
    assert store.beat("k", "me", 2)
    before = store.list("")
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        time.sleep(0.4)
        assert store.beat("k", "me", 2)
        assert not store.beat("k", "somebody else", 2)
    assert store.list("") == before


def test_a_beaten_key_that_was_deleted_is_put_again(store: Store) -> None:
    assert store.beat("k", "me", 60)
    assert store.transact([], [Delete("k")])
    assert store.get("k") is None
    assert store.beat("k", "me", 60)
    assert store.get("k") is not None


def test_a_silent_key_is_not_there_for_who_asks(store: Store) -> None:
    """Nobody watches."""
    assert store.beat("k", "me", 2)
    put(store, "other")
    deadline = time.monotonic() + 5
    while store.get("k"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [entry.key for entry in store.list("").entries] == ["other"]
    assert store.beat("k", "somebody else", 2)


def test_values_and_keys_are_any_text(store: Store) -> None:
    text = 'ä "quoted"\n\0 \U0001f9f6'
    put(store, "p/é:1/10.0.0.0/24", text)
    entry = store.list("p/é").entries[0]
    assert (entry.key, entry.value) == ("p/é:1/10.0.0.0/24", text)
    assert store.get(entry.key) == entry


def test_only_one_of_many_threads_wins_a_key(store: Store) -> None:
    wins: list[int] = []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        for key in range(20):
            if store.transact([KeyIs(f"k{key}", 0)], [Put(f"k{key}", str(number))]):
                wins.append(key)

    together(*(partial(race, number) for number in range(8)))
    assert sorted(wins) == list(range(20))


def test_another_process_is_seen_by_a_watch(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "weft.db")
    watch = store.watch("")
    news = iter(watch)
    next(news)
    writer = (
        "import sys; from pathlib import Path; from weft.store import Put; from weft.store.sqlite import SqliteStore; "
        "SqliteStore(Path(sys.argv[1])).transact([], [Put('from', 'afar')])"
    )
    path = str(Path(sqlite_store.__file__).parents[2])
    subprocess.run([sys.executable, "-c", writer, str(store.path)], check=True, env={"PYTHONPATH": path})
    change = next(news)
    assert isinstance(change, Changes)
    assert change.events == (("from", "afar"),)
    watch.close()
    store.close()


def test_a_file_restored_in_place_gives_a_snapshot(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "weft.db")) as store, closing(store.watch("")) as watch:
        put(store, "old")
        with closing(sqlite3.connect(tmp_path / "backup")) as backup, closing(sqlite3.connect(store.path)) as file:
            file.backup(backup)
            for key in ("lost", "lost too"):
                put(store, key)
            news = iter(watch)
            assert isinstance(next(news), Snapshot)
            backup.backup(file)
        put(store, "new")
        again = next(news)
        assert isinstance(again, Snapshot)
        assert [entry.key for entry in again.entries] == ["new", "old"]


@pytest.mark.parametrize("instead", [True, False], ids=["replaced", "moved away"])
def test_a_file_that_is_another_by_now_is_refused(tmp_path: Path, instead: bool) -> None:
    """Else what this process writes would be seen by nobody, and gone at its end."""
    SqliteStore(tmp_path / "other.db").close()
    with closing(SqliteStore(tmp_path / "weft.db")) as store, closing(store.watch("")) as watch:
        news = iter(watch)
        next(news)
        store.path.rename(tmp_path / "old.db")
        if instead:
            (tmp_path / "other.db").rename(store.path)
        for call in (lambda: put(store, "lost"), lambda: store.get("k"), lambda: next(news)):
            with pytest.raises(StoreError, match=r"weft\.db was replaced or moved away: restart weft on this machine"):
                call()
        assert store.path.exists() is instead


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "weft.db"
    SqliteStore(path).close()
    return path


_OPEN_AT_ONCE = """
import os, sys
from pathlib import Path
from weft.store.sqlite import SqliteStore
for number in range(15):
    ready, go = os.pipe()
    children = []
    for _ in range(8):
        if not (child := os.fork()):
            os.close(go)
            os.read(ready, 1)
            SqliteStore(Path(sys.argv[1]) / f"{number}.db")
            os._exit(0)
        children.append(child)
    os.close(go)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
"""


def test_another_process_that_ends_does_not_take_the_file_away(tmp_path: Path) -> None:
    """SQLite's locks are the process's: who opens and closes the file besides SQLite frees them all."""
    code = (
        "import sys; from pathlib import Path; from weft.store.sqlite import SqliteStore; "
        "store = SqliteStore(Path(sys.argv[1])); print(*(e.key for e in store.list('').entries)); store.close()"
    )
    path = str(Path(sqlite_store.__file__).parents[2])
    argv = [sys.executable, "-c", code, str(tmp_path / "weft.db")]
    with closing(SqliteStore(tmp_path / "weft.db")) as first, closing(SqliteStore(tmp_path / "weft.db")):
        for key in ("a", "b", "c"):
            put(first, key)
            seen = subprocess.run(argv, check=True, env={"PYTHONPATH": path}, capture_output=True, text=True).stdout
            assert seen.split()[-1] == key


@pytest.mark.parametrize("kind", ["new", "old"])
def test_processes_may_open_a_new_file_at_once(tmp_path: Path, kind: str) -> None:
    for number in range(15 if kind == "old" else 0):
        make_version_1(tmp_path / f"{number}.db")
    path = str(Path(sqlite_store.__file__).parents[2])
    subprocess.run([sys.executable, "-c", _OPEN_AT_ONCE, str(tmp_path)], check=True, env={"PYTHONPATH": path})


_VERSION_1 = """
PRAGMA journal_mode = WAL;
CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE changes (revision INTEGER NOT NULL, key TEXT NOT NULL, value TEXT);
CREATE INDEX changes_by_revision ON changes (revision);
CREATE TABLE counter (revision INTEGER NOT NULL, trimmed INTEGER NOT NULL);
INSERT INTO counter VALUES (7, 0);
INSERT INTO entries VALUES ('a', '1', 7);
INSERT INTO changes VALUES (7, 'a', '1');
PRAGMA user_version = 1;
"""


def make_version_1(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(_VERSION_1)


def test_a_file_of_version_1_is_taken_over(tmp_path: Path) -> None:
    make_version_1(tmp_path / "weft.db")
    for _ in range(2):
        with closing(SqliteStore(tmp_path / "weft.db")) as store:
            assert store.list("") == Listing((Entry("a", "1", 7),), 7)
            assert store.beat("a", "1", 60)
    with closing(sqlite3.connect(tmp_path / "weft.db")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)


def test_what_is_no_text_is_read_all_the_same(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("INSERT INTO entries VALUES (CAST(x'7061ff' AS TEXT), CAST(x'ff7b' AS TEXT), 1, NULL)")
    with closing(SqliteStore(database)) as store:
        assert store.list("p").entries == (Entry("pa\ufffd", "\ufffd{", 1),)


def test_a_newer_schema_is_refused_by_name(database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match=r"weft\.db was written by a newer weft \(schema 99, this one knows 2\)"):
        SqliteStore(database)


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to be one " * 100, b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weft.db"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"weft\.db is damaged .*: restore it from a backup, or move it away"):
        SqliteStore(path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("")
    with pytest.raises(StoreError, match="cannot be used"):
        SqliteStore(tmp_path / "folder" / "weft.db")


def test_the_file_is_for_root_only(database: Path) -> None:
    assert database.stat().st_mode & 0o777 == 0o600
