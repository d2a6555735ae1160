"""etcd 3.4 to 3.6 as the store, over its JSON gateway (`gateway.py`). Reads are linearizable. What is special:

- *A transaction whose answer was lost may have been done.* So each also writes a receipt: a key that one thread at a
  time uses, guarded by its revision. Then the same request can be sent again: if it had been done, the receipt says
  so, and a copy that is still on its way finds the guard changed and does nothing. Only when no member answers for
  seconds, the outcome stays unknown, and that is a `StoreError`. Receipts have a lease that nobody renews.
- *A revision is seen when its events are.* While a watch catches up, the header shows etcd's newest revision and not
  how far the events go; to go on from there would lose some.
- *A silent watch may be a dead one*: a member that hangs keeps its connections. While watches are open, a guard asks
  their member something every second. The last message of a stream, an error, may lack its newline.
- *A key that goes by itself has a lease*, which every process that keeps the key finds at the key: none remembers one.
- *History may be gone*: etcd was compacted or restored from a backup, or (before 3.4.17) events do not fit into the
  gateway's 4 MB. Then a watch begins again, with a snapshot. Otherwise it goes on, at any member, with the revision
  after the last it gave, however long etcd was away.
- *Equal revisions need not be the same history.* A restored etcd keeps its cluster's id (a hash of the members' names
  and addresses) and soon passes the revision that a watch had seen. So every write also puts a random mark in one key.
  A watch looks at it every few seconds, and goes on only where the newest mark that it saw is part of the history.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import ceil, inf
from time import monotonic

import msgspec
import requests

from weft.errors import StoreError
from weft.store import (
    Changes,
    Condition,
    Delete,
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
from weft.store.connections import Access, Connections
from weft.store.gateway import PATIENCE_SECONDS, Away, Gateway, Json, Refused, Silence

log = logging.getLogger(__name__)

_PAGE = 5000
"""Entries: 2 MB of ours. etcd 3.4 goes through all that is left of a range for each page of it."""
_ATTEMPTS = 5
_RECEIPT_SECONDS = 3600
_HEARTBEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.7
"""A member that takes longer, twice, is left for another: events shall be late by less than five seconds."""
_MISSES = 2
_CHUNK = 1 << 20
_PAUSE_SECONDS = 0.1
_PAUSE_MOST = 2.0
_LOUD = 5
"""A watch that failed so many times in a row is worth a warning; fewer are a failover."""
_UNCOMPACTED = 20_000
"""Revisions that a young etcd may have without having been compacted once."""
_HEALTH_SECONDS = 1.5
_READINGS = 3
"""One may meet a busy moment."""
_TOO_LARGE = "larger than max"
_LEASE_GONE, _REVISION_GONE = 5, 11
"""gRPC codes."""


class _HistoryGone(Exception):
    """etcd has not got the revisions that were asked for."""


@dataclass(slots=True)
class _Receipt:
    """A key that shows whether a transaction was done, and the revision of its last change."""

    key: str
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Moment:
    """A point of etcd's history: its revision, and the newest mark ("" if there is none) with the revision of that."""

    revision: int
    mark: str
    marked: int


class _Kv(msgspec.Struct, gc=False):
    """msgspec makes bytes of base64."""

    key: bytes
    mod_revision: int
    value: bytes = b""


class _Header(msgspec.Struct):
    revision: int


class _Page(msgspec.Struct):
    """An answer of `kv/range`."""

    header: _Header
    kvs: list[_Kv] = []
    more: bool = False


class EtcdStore:
    """Opens nothing before it is asked.

    :param endpoints: URLs of members (`https://etcd1:2379`); the first that answers is used while it does.
    :param root: what all keys begin with, ending in a slash. Receipts are beside it: `/weft/v1.receipts/…`.
    :param patience: seconds that a call may take before it fails because no member answers; they are shared among
        the members. The first of several calls waits so long for etcd to come back, the next ones ask each member once.
    :param connections: those that it is to share with another store of the process.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        root: str = "/weft/v1/",
        access: Access | None = None,
        patience: float = PATIENCE_SECONDS,
        connections: Connections | None = None,
    ) -> None:
        prefix = root.rstrip("/")
        self._root = root
        self._gateway = Gateway(endpoints, access or Access(), prefix, patience=patience, connections=connections)
        self._receipts = f"{prefix}.receipts/"
        self._newest_mark = {"key": _base64(f"{self._receipts}newest".encode())}
        self._free: deque[_Receipt] = deque()
        """Receipts that no transaction uses at the moment."""
        self._guard = _Guard()
        self._lease = "0"
        self._lease_until = monotonic()

    def get(self, key: str) -> Entry | None:
        found = self._find(key)
        return self._entry(found) if found else None

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        answers = self._gateway.call("kv/txn", {"success": self._reads(keys)}).get("responses", ())
        return self._found(answers)

    def list(self, prefix: str) -> Listing:
        entries: list[Entry] = []
        for page in self.pages(prefix):
            if page.first:
                entries.clear()
            entries += page.entries
        return Listing(tuple(entries), page.revision)

    def pages(self, prefix: str) -> Iterator[Snapshot]:
        """A listing as it comes, from its beginning again if etcd was compacted meanwhile."""
        for _ in range(_ATTEMPTS):
            try:
                yield from self._pages(prefix)
            except Refused as refusal:
                if refusal.code != _REVISION_GONE:
                    raise
            else:
                return
        raise StoreError(f"etcd is compacted faster than {self._root}{prefix} can be read: compact it less often")

    def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> bool:
        return self.attempt(conditions, writes, ()) is None

    def attempt(
        self, conditions: Sequence[Condition], writes: Sequence[Write], keys: Sequence[str]
    ) -> dict[str, Entry] | None:
        compare, operations = [*map(self._compare, conditions)], [*map(self._operation, writes)]
        try:
            receipt = self._free.pop()
        except IndexError:
            receipt = _Receipt(self._receipts + secrets.token_hex(8))
        try:
            return self._transact(compare, operations, self._reads(keys), receipt)
        finally:
            self._free.append(receipt)

    def beat(self, key: str, value: str, seconds: float) -> bool:
        wanted = ceil(seconds)
        for _ in range(_ATTEMPTS):
            found = self._find(key)
            if found and _text(found, "value") != value:
                return False
            if found and self._keep(found.get("lease", "0")) >= wanted:
                return True
            put = {**self._at(key), "value": _base64(value.encode()), "lease": self._grant(wanted)}
            unchanged = _revision(self._at(key), "EQUAL", int(found["mod_revision"]) if found else 0)
            request = {"compare": [unchanged], "success": [{"request_put": put}, self._mark(_random())]}
            if self._gateway.call("kv/txn", request).get("succeeded"):
                return True
            # Else it was changed meanwhile, maybe by an earlier copy of the request, whose answer was lost.
        raise StoreError(f"etcd's key {self._root}{key} is changed by others all the time: let only weft write there")

    def watch(self, prefix: str) -> EtcdWatch:
        return EtcdWatch(self, self._gateway, self._guard, prefix)

    def health(self, *, history: int = _UNCOMPACTED) -> Health:
        """:param history: so many revisions need not have been compacted yet."""
        members = self._members()
        seconds = inf
        try:
            for _ in range(_READINGS):
                began = monotonic()
                moment = self.moment()
                seconds = min(seconds, monotonic() - began)
            kept = moment.revision if moment.revision > history and self._has_all_history() else 0
        except StoreError as error:
            return Health(str(error), members=members)
        return Health("", seconds, members, kept, self._alarm())

    def _alarm(self) -> str:
        try:
            alarms = self._gateway.call("maintenance/alarm", {}).get("alarms", ())
        except StoreError:  # where etcd has users, it tells its own root only
            return ""
        return ", ".join(sorted({one["alarm"] for one in alarms if "alarm" in one}))

    def _members(self) -> dict[str, str]:
        """By place, why a member of those we know does not serve."""
        places = self._gateway.places
        with ThreadPoolExecutor(len(places)) as pool:
            return dict(zip(places.values(), pool.map(self._ailment, places), strict=True))

    def _ailment(self, endpoint: str) -> str:
        problem = ""
        for _ in range(2):
            try:
                self._gateway.ask(endpoint, "kv/range", self._newest_mark, _HEALTH_SECONDS)
            except Away as error:
                problem = str(error) or "no answer"
            except StoreError:  # an answer all the same
                return ""
            else:
                return ""
        return problem

    def _has_all_history(self) -> bool:
        """True if nothing was ever compacted: the first revisions are there."""
        try:
            self._gateway.call("kv/range", {**self._newest_mark, "revision": "2"})
        except Refused as refusal:
            return refusal.code != _REVISION_GONE
        return True

    def close(self) -> None:
        self._gateway.close()

    def moment(self, endpoint: str = "", *, at: int = 0) -> Moment:
        """The present, or revision `at`; of this member, if it can reach its cluster, or of any."""
        ask = partial(self._gateway.ask, endpoint, seconds=_LOOK_SECONDS) if endpoint else self._gateway.call
        answer = ask("kv/range", {**self._newest_mark, "revision": str(at)})
        found = answer.get("kvs", [{}])[0]
        return Moment(int(answer["header"]["revision"]), found.get("value", ""), int(found.get("mod_revision", 0)))

    def events(self, response: Json) -> tuple[tuple[str, str | None], ...]:
        """The events in a watch's message, as `Changes` has them."""
        found = response.get("events", ())
        return tuple(
            (self._key(e["kv"]), None if e.get("type") == "DELETE" else _text(e["kv"], "value")) for e in found
        )

    def under(self, prefix: str) -> Json:
        """The request fields that mean all keys under `prefix`."""
        start = (self._root + prefix).encode()
        return {"key": _base64(start), "range_end": _base64(start[:-1] + bytes([start[-1] + 1]))}

    def _pages(self, prefix: str) -> Iterator[Snapshot]:
        """All of them as they stood at the first one's revision."""
        request: Json = {**self.under(prefix), "limit": _PAGE}
        start = len(self._root)
        first = more = True
        while more:
            page = self._gateway.call("kv/range", request, _Page)
            entries = [Entry(_decoded(kv.key)[start:], _decoded(kv.value), kv.mod_revision) for kv in page.kvs]
            revision, more = int(request.setdefault("revision", str(page.header.revision))), page.more
            yield Snapshot(tuple(entries), revision, first, not more)
            del entries  # whoever reads them may be slower than etcd
            if more:
                request["key"] = _base64(page.kvs[-1].key + b"\0")
            first = False

    def _transact(
        self, compare: Sequence[Json], operations: Sequence[Json], reads: Sequence[Json], receipt: _Receipt
    ) -> dict[str, Entry] | None:
        key, mark = _base64(receipt.key.encode()), _random()
        for _ in range(_ATTEMPTS):
            put = {"request_put": {"key": key, "value": mark, "lease": self._current_lease()}}
            request = {
                "compare": [*compare, _revision({"key": key}, "EQUAL", receipt.revision)],
                "success": [*operations, put, self._mark(mark)],
                "failure": [{"request_range": {"key": key}}, *reads],
            }
            try:
                answer = self._gateway.call("kv/txn", request)
            except Refused as refusal:
                if refusal.code != _LEASE_GONE:
                    raise
                self._lease_until = monotonic()
                continue
            if answer.get("succeeded"):
                receipt.revision = int(answer["header"]["revision"])
                return None
            first, *others = answer["responses"]
            found = first["response_range"].get("kvs", [{}])[0]
            guarded, receipt.revision = receipt.revision, int(found.get("mod_revision", 0))
            if found.get("value") == mark:
                return None  # done by an earlier copy of the request, whose answer was lost
            if receipt.revision == guarded:
                return self._found(others)
            # The guard was wrong: the receipt's lease ran out, or a copy from before a StoreError arrived late.
        raise StoreError(f"etcd's key {receipt.key} is changed by others: let only weft write there, and try again")

    def _mark(self, mark: str) -> Json:
        return {"request_put": {**self._newest_mark, "value": mark}}

    def _current_lease(self) -> str:
        """The lease for receipts. It is replaced, never renewed, so an old one takes unused receipts along."""
        if monotonic() >= self._lease_until:
            self._lease = self._grant(_RECEIPT_SECONDS)
            self._lease_until = monotonic() + _RECEIPT_SECONDS / 2
        return self._lease

    def _grant(self, seconds: int) -> str:
        lease: str = self._gateway.call("lease/grant", {"TTL": seconds})["ID"]
        return lease

    def _keep(self, lease: str) -> int:
        """Let a lease last as long again as when it was granted: so many seconds, 0 if it is gone."""
        return int(self._gateway.call("lease/keepalive", {"ID": lease})["result"].get("TTL", 0))

    def _find(self, key: str) -> Json | None:
        found: list[Json] = self._gateway.call("kv/range", self._at(key)).get("kvs", [])
        return found[0] if found else None

    def _compare(self, condition: Condition) -> Json:
        match condition:
            case KeyIs(key, revision):
                return _revision(self._at(key), "EQUAL", revision)
            case ValueIs(key, value):
                return {**self._at(key), "target": "VALUE", "result": "EQUAL", "value": _base64(value.encode())}
            case Present(key):
                return _revision(self._at(key), "GREATER", 0)
            case NoneNewer(prefix, revision):
                return _revision(self.under(prefix), "LESS", revision + 1)

    def _operation(self, write: Write) -> Json:
        if isinstance(write, Put):
            return {"request_put": {**self._at(write.key), "value": _base64(write.value.encode())}}
        what = self._at(write.key) if isinstance(write, Delete) else self.under(write.prefix)
        return {"request_delete_range": what}

    def _reads(self, keys: Sequence[str]) -> Sequence[Json]:
        return [{"request_range": self._at(key)} for key in keys]

    def _found(self, answers: Iterable[Json]) -> dict[str, Entry]:
        """What `_reads` found."""
        found = (kv for answer in answers for kv in answer["response_range"].get("kvs", ()))
        return {entry.key: entry for entry in map(self._entry, found)}

    def _entry(self, kv: Json) -> Entry:
        return Entry(self._key(kv), _text(kv, "value"), int(kv["mod_revision"]))

    def _key(self, kv: Json) -> str:
        return _text(kv, "key").removeprefix(self._root)

    def _at(self, key: str) -> Json:
        return {"key": _base64((self._root + key).encode())}


class EtcdWatch:
    """See `Store.watch`. Once the first snapshot is there, it outlasts every outage."""

    def __init__(self, store: EtcdStore, gateway: Gateway, guard: _Guard, prefix: str) -> None:
        self._store = store
        self._gateway = gateway
        self._guard = guard
        self._prefix = prefix
        self._closed = threading.Event()
        self._response: requests.Response | None = None
        self._failures = 0
        self.seen = Moment(0, "", 0)
        """A part of the history that this watch follows."""

    def __iter__(self) -> Iterator[Snapshot | Changes]:
        while not self._closed.is_set():
            self.seen = self._store.moment()
            for page in self._store.pages(self._prefix):
                revision = page.revision
                yield page
            del page  # may be large, and this frame lives on
            with suppress(_HistoryGone):
                yield from self._changes(revision)

    def close(self) -> None:
        self._closed.set()
        self.hang_up()

    def hang_up(self) -> None:
        """End the stream that another thread is reading, or has just closed."""
        if self._response:
            with suppress(OSError, ValueError, RuntimeError):
                self._response.raw.shutdown()

    def look(self, endpoint: str) -> Moment:
        """The present of this member, which must be of the same history: otherwise `_HistoryGone`."""
        seen, now = self.seen, self._store.moment(endpoint)
        if seen.mark and (now.mark, now.marked) != (seen.mark, seen.marked):
            try:
                then = self._store.moment(endpoint, at=seen.marked)
            except Refused as refusal:
                if refusal.code == _REVISION_GONE:
                    raise _HistoryGone from refusal
                raise
            if (then.mark, then.marked) != (seen.mark, seen.marked):
                raise _HistoryGone
        self.seen = now
        return now

    def _changes(self, revision: int) -> Iterator[Changes]:
        """What comes after `revision`, from one member after the other."""
        while not self._closed.is_set():
            endpoint = self._gateway.endpoint
            try:
                for changes in self._follow(endpoint, revision):
                    revision = changes.revision
                    yield changes
            except Silence:
                pass
            except (Away, StoreError) as error:
                self._gateway.avoid(endpoint)
                self._pause(f"{endpoint}: {error}")

    def _pause(self, problem: str) -> None:
        if self._closed.is_set():
            return
        self._failures += 1
        if self._failures == _LOUD:
            log.warning("no store events (%s): the last state known stays in force, trying again", problem)
        self._closed.wait(min(_PAUSE_SECONDS * 2**self._failures, _PAUSE_MOST) * random.uniform(0.5, 1.0))

    def _follow(self, endpoint: str, revision: int) -> Iterator[Changes]:
        """The same from one member, until that fails."""
        if self.look(endpoint).revision < revision:
            raise _HistoryGone
        request = {**self._store.under(self._prefix), "start_revision": str(revision + 1)}
        with self._gateway.stream(endpoint, "watch", {"create_request": request}) as response:
            self._response = response
            if self._closed.is_set():
                return
            with self._guard.over(self, endpoint):
                yield from self._read(response)
        raise Away("the stream of events ended")

    def _read(self, response: requests.Response) -> Iterator[Changes]:
        for line in response.iter_lines(chunk_size=_CHUNK):
            message = msgspec.json.decode(line)
            result = message.get("result", {})
            problem = message.get("error", {}).get("message") or result.get("cancel_reason", "")
            if result.get("compact_revision") or _TOO_LARGE in problem:
                raise _HistoryGone
            if "error" in message or result.get("canceled"):
                raise Away(problem or "the watch was canceled")
            self._working()
            if events := self._store.events(result):
                yield Changes(events, int(result["events"][-1]["kv"]["mod_revision"]))

    def _working(self) -> None:
        if self._failures >= _LOUD:
            log.info("store events are back")
        self._failures = 0


@dataclass(frozen=True, slots=True)
class _Group:
    """Watches at one member, the eldest first."""

    watches: list[EtcdWatch]
    ended: threading.Event


class _Guard:
    """Of all watches of a store: looks after their members."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: dict[str, _Group] = {}

    @contextmanager
    def over(self, watch: EtcdWatch, endpoint: str) -> Iterator[None]:
        """Meanwhile, hang up if the member does not answer other questions any more, or from another history."""
        with self._lock:
            group = self._groups.get(endpoint)
            if group is None:
                group = self._groups[endpoint] = _Group([], threading.Event())
                threading.Thread(target=self._look, args=(endpoint, group), name="store-guard", daemon=True).start()
            group.watches.append(watch)
        try:
            yield
        finally:
            with self._lock:
                group.watches.remove(watch)
                if not group.watches:
                    self._end(endpoint, group)

    def _look(self, endpoint: str, group: _Group) -> None:
        misses = 0
        while misses < _MISSES:
            if group.ended.wait(0 if misses else _HEARTBEAT_SECONDS):
                return
            try:
                self._look_once(endpoint, group)
                misses = 0
            except Away:
                misses += 1
            except _HistoryGone:
                break
            except StoreError:
                misses = 0  # an answer all the same
            except Exception:
                log.exception("looking after the events of %s met a bug", endpoint)
                misses += 1
        log.info("%s does not answer as before: the events are asked for anew", endpoint)
        with self._lock:
            self._end(endpoint, group)
            watches = list(group.watches)
        for watch in watches:
            watch.hang_up()

    def _look_once(self, endpoint: str, group: _Group) -> None:
        """The eldest watch looks for all: what it has seen, they have seen."""
        with self._lock:
            watches = list(group.watches)
        if watches:
            seen = watches[0].look(endpoint)
            for watch in watches[1:]:
                watch.seen = seen

    def _end(self, endpoint: str, group: _Group) -> None:
        group.ended.set()
        if self._groups.get(endpoint) is group:
            del self._groups[endpoint]


def _revision(keys: Json, result: str, revision: int) -> Json:
    """A comparison of the last change of each of these keys; a key that is absent counts as 0."""
    return {**keys, "target": "MOD", "result": result, "mod_revision": str(revision)}


def _random() -> str:
    return _base64(secrets.token_bytes(8))


def _base64(text: bytes) -> str:
    return b64encode(text).decode()


def _text(kv: Json, part: str) -> str:
    return _decoded(b64decode(kv.get(part, "")))


def _decoded(text: bytes) -> str:
    return text.decode(errors="replace")
