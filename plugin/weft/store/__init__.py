"""The store port: a small ordered key-value store with revisions, as etcd has it.

Every change of any key raises the store's revision by at least one; an entry carries the revision of its last
change. Keys are text with `/` between parts, values are JSON text. The same contract is kept by every adapter
and checked by one test suite (`tests/unit/test_store.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """One key's present value and the revision of its last change."""

    key: str
    value: str
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All entries under a prefix, sorted by key, as they stood at `revision`."""

    entries: tuple[Entry, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class KeyIs:
    """Condition: the key's last change was at `revision`; 0 says that the key is absent."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class ValueIs:
    """Condition: the key is present with this very value, whenever that was put."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Present:
    """Condition: the key is present."""

    key: str


@dataclass(frozen=True, slots=True)
class NoneNewer:
    """Condition: no present key under `prefix` was changed after `revision`; 0 says that there is none at all."""

    prefix: str
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


@dataclass(frozen=True, slots=True)
class DeleteAll:
    """Delete every key under `prefix`."""

    prefix: str


Condition = KeyIs | ValueIs | Present | NoneNewer
Write = Put | Delete | DeleteAll


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A watch's first message, and its answer when it fell behind: everything, replacing all held before.

    Much may come in several ones, so that the first can be read while the next is on its way. They belong together from
    one that is `first` to the next that is `last`; if another `first` comes before, the ones until then mean nothing.
    """

    entries: tuple[Entry, ...]
    revision: int
    first: bool = True
    last: bool = True


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed since the last message, in order. A deleted key has `value` None."""

    events: tuple[tuple[str, str | None], ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Health:
    """How a store does.

    :param problem: why it cannot be used; "" if it can.
    :param seconds: that one reading took.
    :param members: of a cluster, by place: why it does not serve, "" if it does.
    :param history: how many revisions are kept that nobody needs; 0 if they are few, or get removed.
    :param alarm: which keeps it from writing, or "".
    """

    problem: str = ""
    seconds: float = 0.0
    members: Mapping[str, str] = field(default_factory=dict)
    history: int = 0
    alarm: str = ""


class Watch(Protocol):
    """An open watch: iterate (blocks), and `close()` from any thread to end the iteration."""

    def __iter__(self) -> Iterator[Snapshot | Changes]: ...
    def close(self) -> None: ...


class Store(Protocol):
    """What weft needs of a store. Every method may raise `StoreError`; all are safe to call from any thread."""

    def get(self, key: str) -> Entry | None: ...

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        """Those of these keys that are present, all as they stood at one revision. At most a hundred keys."""
        ...

    def list(self, prefix: str) -> Listing: ...

    def pages(self, prefix: str) -> Iterator[Snapshot]:
        """The same in parts, as they come: see `Snapshot`."""
        ...

    def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> bool:
        """Do all writes at one revision if all conditions hold; otherwise do nothing and return False.

        No key may be written twice in one transaction. After a `StoreError` it may have been done or not.
        """
        ...

    def attempt(
        self, conditions: Sequence[Condition], writes: Sequence[Write], keys: Sequence[str]
    ) -> dict[str, Entry] | None:
        """Like `transact` for conditions that are a guess: None if all was done, else what `get_many` gives for `keys`.

        So a guess that is right saves the reading, and one that is wrong costs nothing.
        """
        ...

    def beat(self, key: str, value: str, seconds: float) -> bool:
        """Put a key that goes by itself unless this is said again within `seconds`; watches see both.

        Saying it again with the same value changes nothing but the deadline: no revision, no event. False, and nothing
        done, if the key has another value: somebody else keeps it. Whoever wants it gone at once deletes it; the next
        beat puts it again.
        """
        ...

    def watch(self, prefix: str) -> Watch:
        """A snapshot of everything under `prefix` first, then its changes as they come."""
        ...

    def health(self) -> Health:
        """Look how it does, within a few seconds. Never raises."""
        ...

    def close(self) -> None: ...
