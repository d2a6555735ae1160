"""What all hosts share, as this host last saw it: the store's `topology/` in memory.

Fed by the store's watch, by one thread (the agent's). Other threads may look things up, but iterate over copies only.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from weft.model import ENDPOINTS, HOSTS, MEMBERS, NETWORKS, Endpoint, Host, Member, Network
from weft.store import Entry


@dataclass(slots=True)
class Touched:
    """What a batch of changes touched.

    :param networks: VNIs whose record or membership changed.
    :param hosts: ids of hosts that appeared, went away or moved to another underlay address.
    :param endpoints: by VNI, what each touched endpoint was before the batch (None: it is new).
    :param spread: by VNI of touched endpoints, the hosts that had endpoints there before the batch.
    """

    networks: set[int] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)
    endpoints: dict[int, dict[str, Endpoint | None]] = field(default_factory=lambda: defaultdict(dict))
    spread: dict[int, set[str]] = field(default_factory=dict)


log = logging.getLogger(__name__)


class Cluster:
    """The mirror. `hosts`, `networks`, `members` and `endpoints` are read-only for everybody else."""

    loaded = False
    """True from the store's first snapshot on."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.networks: dict[int, Network] = {}
        self.members: dict[int, dict[str, Member]] = {}
        self.endpoints: dict[int, dict[str, Endpoint]] = {}
        self._spread: dict[int, Counter[str]] = {}

    def load(self, entries: Iterable[Entry]) -> None:
        """Replace everything by a snapshot, at once: other threads see what was before it, or all of it."""
        fresh = Cluster()
        fresh.apply((entry.key, entry.value) for entry in entries)
        fresh.loaded = True
        vars(self).update(vars(fresh))

    def apply(self, events: Iterable[tuple[str, str | None]]) -> Touched:
        """Follow changes in order; a value of None is a deletion. Keys of newer versions are ignored."""
        touched = Touched()
        kinds = {ENDPOINTS: self._endpoint, NETWORKS: self._network, MEMBERS: self._member, HOSTS: self._host}
        for key, value in events:
            follow = next((follow for prefix, follow in kinds.items() if key.startswith(prefix)), None)
            try:
                if follow:
                    follow(key, value, touched)
            except (ValueError, TypeError, KeyError):
                log.exception("the store's entry %s cannot be read and is left out: is it of a newer weft?", key)
        return touched

    def hosts_of(self, vni: int) -> set[str]:
        """Ids of the hosts that have endpoints on a network."""
        return set(self._spread.get(vni, ()))

    def local_endpoints(self, vni: int, host: str) -> list[Endpoint]:
        if host not in self._spread.get(vni, ()):
            return []
        return [e for e in list(self.endpoints.get(vni, {}).values()) if e.host == host]

    def memberships(self, host: str) -> dict[str, int]:
        """VNIs of the networks that the engine of `host` has, by its own ids for them."""
        found = ((members.get(host), vni) for vni, members in list(self.members.items()))
        return {member.network_id: vni for member, vni in found if member}

    def local_networks(self, host: str) -> set[int]:
        """VNIs of the networks on which `host` has endpoints."""
        return {vni for vni, spread in self._spread.items() if host in spread}

    def _endpoint(self, key: str, value: str | None, touched: Touched) -> None:
        vni_text, endpoint_id = key.removeprefix(ENDPOINTS).split("/", 1)
        vni = int(vni_text)
        if vni not in touched.spread:
            touched.spread[vni] = self.hosts_of(vni)
        endpoints = self.endpoints.setdefault(vni, {})
        spread = self._spread.setdefault(vni, Counter())
        old = endpoints.pop(endpoint_id, None)
        touched.endpoints[vni].setdefault(endpoint_id, old)
        if old is not None:
            spread[old.host] -= 1
            if not spread[old.host]:
                del spread[old.host]
        if value is not None:
            new = endpoints[endpoint_id] = Endpoint.decode(value)
            spread[new.host] += 1
        elif not endpoints:
            del self.endpoints[vni], self._spread[vni]

    def _network(self, key: str, value: str | None, touched: Touched) -> None:
        vni = int(key.removeprefix(NETWORKS))
        touched.networks.add(vni)
        if value is None:
            self.networks.pop(vni, None)
        else:
            self.networks[vni] = Network.decode(value)

    def _member(self, key: str, value: str | None, touched: Touched) -> None:
        vni_text, host = key.removeprefix(MEMBERS).split("/", 1)
        vni = int(vni_text)
        touched.networks.add(vni)
        members = self.members.setdefault(vni, {})
        if value is not None:
            members[host] = Member.decode(value)
        elif members.pop(host, None) and not members:
            del self.members[vni]

    def _host(self, key: str, value: str | None, touched: Touched) -> None:
        host_id = key.removeprefix(HOSTS)
        old, new = self.hosts.pop(host_id, None), Host.decode(value) if value is not None else None
        if new is not None:
            self.hosts[host_id] = new
        if (old and old.underlay) != (new and new.underlay):
            touched.hosts.add(host_id)
