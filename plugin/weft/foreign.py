"""What stands in the store and is none of weft's: broken, under a key that weft does not know, or of nothing there is.

Such an entry stops nothing else, and weft never deletes it by itself: a newer weft may know better. Finding all of them
takes a listing of the whole store, so that is done when somebody asks. Those under `topology/` every host meets anyway.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import ip_address, ip_network
from math import inf
from time import monotonic, sleep

from weft.cluster import Cluster
from weft.doctor.facts import PROBED, Report
from weft.errors import Conflict, Unreadable
from weft.ipam import GLOBAL_SPACE, SWARM
from weft.model import (
    ADDRESSES,
    ALIVE,
    BINDINGS,
    ENDPOINT_NAMES,
    ENDPOINTS,
    ENGINES,
    HOSTS,
    MACS,
    MEMBERS,
    NAMES,
    NETWORKS,
    PENDING,
    POOLS,
    QUESTIONS,
    REPORTS,
    SCHEMA_KEY,
    Allocation,
    Binding,
    Endpoint,
    EndpointNames,
    Host,
    Member,
    Network,
    PoolClaim,
    endpoint_key,
    network_key,
    reading,
)
from weft.probes.links import REQUESTS, RESULTS, Results
from weft.store import Delete, Entry, KeyIs, Store

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 0.5
"""What belongs to nothing for so long is not just being made or removed."""
_MOST_KEYS = 100
"""Of one request to the store."""
_NO_SUCH_KEY = "weft knows no such key"


class Foreign:
    """Any thread may call."""

    def __init__(self, store: Store, cluster: Cluster) -> None:
        self._store = store
        self._cluster = cluster
        self._found: dict[str, str] = {}

    @property
    def known(self) -> dict[str, str]:
        """By key, what is wrong: of the last look, and what this host has met since."""
        return {**self._found, **self._cluster.unreadable}

    def look(self, until: float = inf) -> dict[str, str] | None:
        """Read the whole store; return by key what is wrong.

        :param until: the moment of `monotonic` at which it is given up; the result is None then.
        """
        found = self._search(until)
        if found:
            sleep(_AGAIN_SECONDS)
            again = self._search(until)
            found = again and {key: why for key, why in again.items() if key in found}
        if found is None:
            return None
        for key in sorted(found.keys() - self.known.keys()):
            log.error("left out: %s", found[key])
        self._found = found
        return found

    def check(self) -> None:
        """Forget what is there no more."""
        keys = sorted(self._found)
        present: set[str] = set()
        for start in range(0, len(keys), _MOST_KEYS):
            present |= self._store.get_many(keys[start : start + _MOST_KEYS]).keys()
        self._found = {key: why for key, why in self._found.items() if key in present}

    def _search(self, until: float) -> dict[str, str] | None:
        search = _Search()
        for page in self._store.pages(""):
            if monotonic() > until:
                return None
            if page.first:
                search = _Search()
            search.add(page.entries)
        return search.found()

    def delete(self, key: str) -> str:
        """Delete such an entry, and no other; return what was wrong with it."""
        entry = self._store.get(key)
        why = (self.look() or {}).get(key)
        if entry is None or why is None:
            raise Conflict(f"the store's entry {key} is {'not there' if entry is None else 'one that weft needs'}")
        if not self._store.transact([KeyIs(key, entry.revision)], [Delete(key)]):
            raise Conflict(f"the store's entry {key} was just changed: look again")
        self._found.pop(key, None)
        log.warning("deleted by hand: %s", why)
        return why


def foreign(entries: Iterable[Entry]) -> dict[str, str]:
    """By key, what is wrong with those of a store's entries that are none of weft's (pure).

    :param entries: all that the store has.
    """
    search = _Search()
    search.add(entries)
    return search.found()


class _Search:
    """The same part by part, since all of a large cluster's entries at one time would be hundreds of megabytes."""

    def __init__(self) -> None:
        self._present: set[str] = set()
        """Keys, and ids of endpoints."""
        self._broken: dict[str, str] = {}
        self._needed: dict[str, list[tuple[str, ...]]] = {}
        """What entries need that has not come until now."""

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._present.add(entry.key)
            if entry.key.startswith(ENDPOINTS):
                self._present.add(entry.key.rpartition("/")[2])
            try:
                needed = [one for one in _needs(entry) if self._present.isdisjoint(one)]
            except Unreadable as error:
                self._broken[entry.key] = str(error)
            else:
                if needed:
                    self._needed[entry.key] = needed

    def found(self) -> dict[str, str]:
        found = dict(self._broken)
        for key, needed in self._needed.items():
            if missing := next((one for one in needed if self._present.isdisjoint(one)), ()):
                lacks = " or ".join(dict.fromkeys(missing))
                found[key] = f"the store's entry {key} belongs to nothing: there is no {lacks}"
        return found


def _needs(entry: Entry) -> Iterator[tuple[str, ...]]:
    """Groups of keys, or ids of endpoints: one of each group has to be there. `Unreadable` if the entry is broken."""
    kind = next((kind for kind in _READ if entry.key.startswith(kind)), "")
    rest = entry.key.removeprefix(kind)
    with reading(entry.key):
        if not kind:
            raise ValueError(_NO_SUCH_KEY)
        record = _READ[kind](rest, entry)
    first = rest.partition("/")[0]
    if kind in _OF_HOST:
        yield (HOSTS + first,)
    if kind in _OF_NETWORK:
        yield (NETWORKS + first,)
    match record:
        case str():
            yield (record,)
        case Member() | Endpoint():
            yield (HOSTS + record.host,)
        case EndpointNames():
            yield (ENDPOINTS + rest,)
        case Binding():
            yield (network_key(record.vni),)
        case PoolClaim() if SWARM not in record.users:
            yield (network_key(record.vni), *(HOSTS + user for user in record.users))
        case Allocation():
            yield (POOLS + record.cidr,)
            if record.kind == "endpoint" and record.space != GLOBAL_SPACE:
                yield (record.endpoint or record.pending_key, record.pending_key)


def _matching(pattern: str) -> Callable[[str, Entry], None]:
    """Of entries that are no more than a key."""

    def read(rest: str, entry: Entry) -> None:
        if not re.fullmatch(pattern, rest):
            raise ValueError(_NO_SUCH_KEY)

    return read


def _schema(rest: str, entry: Entry) -> None:
    _matching("")(rest, entry)
    int(entry.value)


def _report(rest: str, entry: Entry) -> None:
    if not rest.endswith(PROBED):
        Report.decode(entry.value)


def _pending(rest: str, entry: Entry) -> None:
    """One that lacks its address is collected by its host."""
    _, network, bits, address = rest.split("/")
    ip_network(f"{network}/{bits}")
    ip_address(address)


def _mac(rest: str, entry: Entry) -> str:
    _matching(r"\d+/[0-9a-f]{2}(:[0-9a-f]{2}){5}")(rest, entry)
    return endpoint_key(int(rest.partition("/")[0]), entry.value)


def _binding(rest: str, entry: Entry) -> Binding:
    binding = Binding.read(entry)
    if binding.network_id != rest.partition("/")[2]:
        raise ValueError(f"it belongs to {binding.network_id}")
    return binding


_READ: Mapping[str, Callable[[str, Entry], object]] = {
    SCHEMA_KEY: _schema,
    HOSTS: lambda rest, entry: Host.read(entry),
    ALIVE: _matching("[^/]+"),
    NETWORKS: lambda rest, entry: Network.read(entry),
    MEMBERS: lambda rest, entry: Member.read(entry),
    ENDPOINTS: lambda rest, entry: Endpoint.read(entry),
    ENDPOINT_NAMES: lambda rest, entry: EndpointNames.read(entry),
    QUESTIONS: lambda rest, entry: HOSTS + entry.value,
    REPORTS: _report,
    POOLS: lambda rest, entry: PoolClaim.read(entry),
    ADDRESSES: lambda rest, entry: Allocation.read(entry),
    PENDING: _pending,
    MACS: _mac,
    BINDINGS: _binding,
    NAMES: lambda rest, entry: network_key(int(entry.value)),
    ENGINES: _matching("[^/]+"),
    RESULTS: lambda rest, entry: Results.read(entry),
    REQUESTS: _matching("[^/]+/[^/]+"),
}
"""How the entries of each kind are read. What is no record is read as the key of what it belongs to, if any."""
_OF_HOST = (ALIVE, BINDINGS, PENDING, ENGINES, RESULTS, REQUESTS)
"""Whose keys begin with a host's id."""
_OF_NETWORK = (MEMBERS, ENDPOINTS, ENDPOINT_NAMES, MACS)
"""Whose keys begin with a VNI."""
