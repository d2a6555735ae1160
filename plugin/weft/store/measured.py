"""A store whose every call is told of: how long it took, and whether it failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from weft.store import Condition, Entry, Health, Listing, Snapshot, Store, Watch, Write

Note = Callable[[str, float, bool], None]
"""Told the name of a call, its seconds, and whether it failed."""


class MeasuredStore:
    """A `Store` that does what `store` does."""

    def __init__(self, store: Store, note: Note) -> None:
        self._store = store
        self._note = note

    def get(self, key: str) -> Entry | None:
        with self._measured("get"):
            return self._store.get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        with self._measured("get"):
            return self._store.get_many(keys)

    def list(self, prefix: str) -> Listing:
        with self._measured("list"):
            return self._store.list(prefix)

    def pages(self, prefix: str) -> Iterator[Snapshot]:
        return self._store.pages(prefix)

    def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> bool:
        with self._measured("transact"):
            return self._store.transact(conditions, writes)

    def attempt(
        self, conditions: Sequence[Condition], writes: Sequence[Write], keys: Sequence[str]
    ) -> dict[str, Entry] | None:
        with self._measured("transact"):
            return self._store.attempt(conditions, writes, keys)

    def beat(self, key: str, value: str, seconds: float) -> bool:
        with self._measured("beat"):
            return self._store.beat(key, value, seconds)

    def watch(self, prefix: str) -> Watch:
        return self._store.watch(prefix)

    def health(self) -> Health:
        return self._store.health()

    def close(self) -> None:
        self._store.close()

    @contextmanager
    def _measured(self, call: str) -> Iterator[None]:
        began, failed = perf_counter(), True
        try:
            yield
            failed = False
        finally:
            self._note(call, perf_counter() - began, failed)
