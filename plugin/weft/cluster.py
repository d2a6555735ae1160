"""What all hosts share, as this host last saw it: the store's `topology/` in memory.

Fed by the store's watch, by one thread (the agent's). Other threads may look things up, but iterate over copies only.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from time import monotonic

from weft.errors import StoreError, Unreadable
from weft.model import (
    ALIVE,
    ENDPOINT_NAMES,
    ENDPOINTS,
    HOSTS,
    MEMBERS,
    NETWORKS,
    QUESTIONS,
    TOPOLOGY,
    Endpoint,
    EndpointNames,
    Host,
    Member,
    Network,
    unreadable,
)
from weft.store import Entry


@dataclass(slots=True)
class Touched:
    """What a batch of changes touched.

    :param networks: VNIs whose record or membership changed.
    :param hosts: ids of hosts that appeared, went away, or are reached otherwise than before.
    :param alive: ids of hosts that fell silent or gave a sign of life.
    :param endpoints: by VNI, what each touched endpoint was before the batch (None: it is new).
    :param spread: by VNI of touched endpoints, the hosts that had endpoints there before the batch.
    """

    networks: set[int] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)
    alive: set[str] = field(default_factory=set)
    endpoints: dict[int, dict[str, Endpoint | None]] = field(default_factory=lambda: defaultdict(dict))
    spread: dict[int, set[str]] = field(default_factory=dict)


log = logging.getLogger(__name__)


class Cluster:
    """The mirror. All that has no underscore is read-only for everybody else.

    `alive` are the ids of hosts that give signs of life; `version` grows with every change. `bindings` are the VNIs of
    engines' networks, by host and NetworkID. `names` are by VNI and endpoint; `called` has the ids of the endpoints by
    VNI and lower-case name, and `holders` the endpoint that has an address.

    :param host: id of the host whose mirror this is: its own endpoints are found at once among all others.
    """

    def __init__(self, host: str = "") -> None:
        self.loaded = False
        """True from the store's first snapshot on; before, it is what was last known of the store."""
        self.version = 0
        self.hosts: dict[str, Host] = {}
        self.lost: dict[str, tuple[Host, float]] = {}
        """Hosts that the snapshot lacks although nobody was seen to delete them, as they were; and since when."""
        self.alive: set[str] = set()
        self.networks: dict[int, Network] = {}
        self.members: dict[int, dict[str, Member]] = {}
        self.endpoints: dict[int, dict[str, Endpoint]] = {}
        self.bindings: dict[tuple[str, str], int] = {}
        self.names: dict[int, dict[str, EndpointNames]] = {}
        self.called: dict[int, dict[str, tuple[str, ...]]] = {}
        self.holders: dict[str, Endpoint] = {}
        self.questions: dict[str, str] = {}
        """Which every host shall answer with a report (see `examination`), and the host that asks."""
        self.unreadable: dict[str, str] = {}
        """By key, why an entry is left out."""
        self._me = host
        self._local: dict[int, dict[str, Endpoint]] = {}
        """Endpoints of that host, by VNI and id."""
        self._spread: dict[int, Counter[str]] = {}

    def load(self, entries: Iterable[Entry], *, certain: bool = True) -> None:
        """Replace everything by a snapshot, at once for all who look.

        :param certain: it is what the store has, all of it.
        """
        fresh = self.blank()
        fresh.apply((entry.key, entry.value) for entry in entries)
        self.become(fresh, certain=certain)

    def blank(self) -> Cluster:
        """Another mirror of the same host, in which nothing is."""
        return Cluster(self._me)

    def become(self, fresh: Cluster, *, certain: bool = True) -> None:
        """See `load`: have what another mirror has, which nobody uses any more."""
        fresh.version, fresh.loaded = self.version + 1, certain
        known = {**{host.id: (host, monotonic()) for host in self.hosts.values()}, **self.lost}
        fresh.lost = {host: one for host, one in known.items() if host not in fresh.hosts}
        vars(self).update(vars(fresh))

    def apply(self, events: Iterable[tuple[str, str | None]]) -> Touched:
        """Follow changes in order; a value of None is a deletion. What cannot be read, or is unknown, is left out."""
        touched = Touched()
        kinds = {
            ENDPOINTS: self._endpoint,
            ENDPOINT_NAMES: self._names,
            NETWORKS: self._network,
            MEMBERS: self._member,
            HOSTS: self._host,
            ALIVE: self._alive,
            QUESTIONS: self._question,
        }
        for key, value in events:
            follow = kinds.get(key[: key.find("/", len(TOPOLOGY)) + 1])
            self.unreadable.pop(key, None)
            try:
                if follow:
                    follow(key, value, touched)
                elif value is not None:
                    self._leave_out_unknown(key)
            except (StoreError, ValueError) as error:
                if value is not None:
                    log.error("the store's entry %s is left out: %s", key, error)
                    self.unreadable[key] = str(error if isinstance(error, Unreadable) else unreadable(key, error))
            self.version += 1  # not before: who looks meanwhile would take the old for the new
        return touched

    def _leave_out_unknown(self, key: str) -> None:
        """A newer weft may write thousands of a new kind: the log has the first."""
        why = str(unreadable(key, ValueError("weft knows no such key")))
        kind = "/".join(key.split("/")[:2])
        if not any(other.startswith(kind) for other in self.unreadable):
            log.warning("left out: %s", why)
        self.unreadable[key] = why

    def title(self, endpoint: Endpoint) -> str:
        """How messages call an endpoint: as its container, if that is known."""
        names = self.names.get(endpoint.vni, {}).get(endpoint.id)
        return names.container if names else f"endpoint {endpoint.id[:12]}"

    def hosts_of(self, vni: int) -> set[str]:
        """Ids of the hosts that have endpoints on a network."""
        return set(self._spread.get(vni, ()))

    def local_endpoints(self, vni: int, host: str) -> list[Endpoint]:
        if host == self._me:
            return list(self._local.get(vni, {}).values())
        if host not in self._spread.get(vni, ()):
            return []
        return [e for e in list(self.endpoints.get(vni, {}).values()) if e.host == host]

    def memberships(self, host: str) -> dict[str, int]:
        """VNIs of the networks that the engine of `host` has, by its own ids for them."""
        found = ((members.get(host), vni) for vni, members in list(self.members.items()))
        return {member.network_id: vni for member, vni in found if member}

    def local_networks(self, host: str) -> set[int]:
        """VNIs of the networks on which `host` has endpoints."""
        if host == self._me:
            return set(self._local)
        return {vni for vni, spread in list(self._spread.items()) if host in spread}

    def endpoints_of(self, host: str) -> list[Endpoint]:
        """On all networks."""
        return [endpoint for vni in self.local_networks(host) for endpoint in self.local_endpoints(vni, host)]

    def entries_of(self, host: str) -> Iterator[tuple[str, str]]:
        """All that this host's engine needs, as entries of the store: the hosts, and the networks it has.

        One after the other, since all of them at once may be very large.
        """
        vnis = self.local_networks(host) | {vni for vni, members in list(self.members.items()) if host in members}
        networks = [self.networks[vni] for vni in vnis if vni in self.networks]
        members = [self.members[vni][host] for vni in vnis if host in self.members.get(vni, ())]
        endpoints = (endpoint for vni in vnis for endpoint in list(self.endpoints.get(vni, {}).values()))
        names = (names for vni in vnis for names in list(self.names.get(vni, {}).values()))
        kinds: list[Iterable[Host | Network | Member | Endpoint | EndpointNames]]
        kinds = [list(self.hosts.values()), networks, members, endpoints, names]
        for record in chain.from_iterable(kinds):
            yield record.key, record.encode()

    def _endpoint(self, key: str, value: str | None, touched: Touched) -> None:
        vni_text, endpoint_id = key.removeprefix(ENDPOINTS).split("/", 1)
        vni = int(vni_text)
        if vni not in touched.spread:
            touched.spread[vni] = self.hosts_of(vni)
        if vni not in self.endpoints:
            self.endpoints[vni], self._spread[vni] = {}, Counter()
        endpoints, spread = self.endpoints[vni], self._spread[vni]
        old = endpoints.pop(endpoint_id, None)
        touched.endpoints[vni].setdefault(endpoint_id, old)
        if old is not None:
            self._be_local(old, False)
            spread[old.host] -= 1
            if not spread[old.host]:
                del spread[old.host]
            for address in old.addresses:
                if self.holders.get(address) is old:  # it may be another's by now
                    del self.holders[address]
        if value is not None:
            new = Endpoint.read(Entry(key, value, 0))
            endpoints[new.id if new.id == endpoint_id else endpoint_id] = new  # not a second string for it
            self._be_local(new, True)
            spread[new.host] += 1
            for address in new.addresses:
                self.holders[address] = new
        elif not endpoints:
            del self.endpoints[vni], self._spread[vni]

    def _be_local(self, endpoint: Endpoint, present: bool) -> None:
        if endpoint.host != self._me:
            return
        local = self._local.setdefault(endpoint.vni, {})
        if present:
            local[endpoint.id] = endpoint
        else:
            local.pop(endpoint.id, None)
        if not local:
            del self._local[endpoint.vni]

    def _names(self, key: str, value: str | None, touched: Touched) -> None:
        vni_text, endpoint_id = key.removeprefix(ENDPOINT_NAMES).split("/", 1)
        vni = int(vni_text)
        new = EndpointNames.read(Entry(key, value, 0)) if value is not None else None
        now = new.all if new else frozenset()
        names, called = self.names.setdefault(vni, {}), self.called.setdefault(vni, {})
        old = names.pop(endpoint_id, None)
        before = old.all if old else frozenset()
        if new is not None:
            names[endpoint_id] = new
        for name in now - before:
            called[name] = (*called.get(name, ()), endpoint_id)
        for name in before - now:
            if others := tuple(one for one in called[name] if one != endpoint_id):
                called[name] = others
            else:
                del called[name]
        if not names:
            del self.names[vni], self.called[vni]

    def _network(self, key: str, value: str | None, touched: Touched) -> None:
        vni = int(key.removeprefix(NETWORKS))
        touched.networks.add(vni)
        if value is None:
            self.networks.pop(vni, None)
        else:
            self.networks[vni] = Network.read(Entry(key, value, 0))

    def _member(self, key: str, value: str | None, touched: Touched) -> None:
        vni_text, host = key.removeprefix(MEMBERS).split("/", 1)
        vni = int(vni_text)
        touched.networks.add(vni)
        member = Member.read(Entry(key, value, 0)) if value is not None else None
        members = self.members.setdefault(vni, {})
        if old := members.pop(host, None):
            self.bindings.pop((host, old.network_id), None)
        if member is not None:
            members[host] = member
            self.bindings[host, member.network_id] = vni
        elif not members:
            del self.members[vni]

    def _host(self, key: str, value: str | None, touched: Touched) -> None:
        host_id = key.removeprefix(HOSTS)
        new = Host.read(Entry(key, value, 0)) if value is not None else None
        old = self.hosts.pop(host_id, None)
        self.lost.pop(host_id, None)
        if new is not None:
            self.hosts[host_id] = new
        if (old and old.reached) != (new and new.reached):
            touched.hosts.add(host_id)

    def _alive(self, key: str, value: str | None, touched: Touched) -> None:
        host_id = key.removeprefix(ALIVE)
        touched.alive.add(host_id)
        if value is None:
            self.alive.discard(host_id)
        else:
            self.alive.add(host_id)

    def _question(self, key: str, value: str | None, touched: Touched) -> None:
        question = key.removeprefix(QUESTIONS)
        if value is None:
            self.questions.pop(question, None)
        else:
            self.questions[question] = value
