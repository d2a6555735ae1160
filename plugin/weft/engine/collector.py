"""Compares this host's part of the store with what its Docker Engine has, and collects leftovers.

The engine never repeats a delete that failed or was never sent (it crashed, or we were down), so whatever only the
store knows is collected: networks, endpoints with their veths, addresses, pool reservations. Never while the engine
does not answer, and only after an object was missing for the whole grace period: what is being created is in the
store first and in Docker's lists a moment later. And never an endpoint whose veth is up at both ends: a container uses
it, so this engine is not the one that runs it, or lies.

A network that is missing was removed by somebody, so it retires on all hosts, unless the engine's own store was wiped,
or never had it since making it was cut short: then only this host's part goes, and the mirror makes the network again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address, ip_network

from weft.cluster import Cluster
from weft.driver import Driver
from weft.engine.inventory import DockerNetwork, Inventory
from weft.engine.sweeper import Due, Outcome, Patience
from weft.errors import WeftError
from weft.ipam import LOCAL_SPACE, Ipam, PoolId
from weft.model import ENGINES, POOLS, Endpoint, Host, Member, PoolClaim, pending_prefix, readable, reading
from weft.store import Entry, KeyIs, Put, Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Orphan:
    """Something of this host that Docker does not have, and how to collect it."""

    what: str
    collect: Callable[[], object]
    revision: int = 0
    """Of its entry in the store: an address that is taken anew is not the one that was missed."""

    @property
    def key(self) -> tuple[str, int]:
        return self.what, self.revision


class Collector:
    """The clean-up of one host; see `sweeper.Sweep`.

    :param grace: seconds that Docker must not have an object before it is collected.
    """

    def __init__(self, store: Store, host: Host, cluster: Cluster, driver: Driver, ipam: Ipam, *, grace: float) -> None:
        self._store = store
        self._me = host
        self._cluster = cluster
        self._driver = driver
        self._networks = driver.networks
        self._ipam = ipam
        self._grace = grace
        self._patience = Patience(grace)
        self._engine = ""
        """The engine that this host had at the last sweep without a missing network, as the store says."""

    def forget(self) -> None:
        self._patience.forget()

    def sweep(self, inventory: Inventory, pools: Sequence[Entry]) -> Outcome:
        """Compare once; collect what has been missing for the grace period.

        No event tells of a container whose start is under way, so what was read before counts for nothing then.
        """
        self._note_seen(inventory)
        orphans = self._all(inventory, pools)
        lasting = self._patience.lasting(orphan.key for orphan in orphans)
        if lasting and not inventory.fresh:
            return Outcome(unsure=True)
        for orphan in orphans:
            if orphan.key in lasting:
                self._collect(orphan)
        return Outcome(self._grace / 2 if orphans else None)

    def due(self, inventory: Inventory, pools: Sequence[Entry]) -> list[Due]:
        """What would be collected."""
        why = "this host's Docker does not have it"
        return [Due(one.what, why, self._patience.left(one.key)) for one in self._all(inventory, pools)]

    def _all(self, inventory: Inventory, pools: Sequence[Entry]) -> list[Orphan]:
        return [*self._orphans(inventory), *self._orphan_pools(pools, inventory.networks)]

    def _began_anew(self, engine: str, *, complete: bool) -> bool:
        """True if this is another engine than the one that had what is missing."""
        if not self._engine and (entry := self._store.get(ENGINES + self._me.id)):
            self._engine = entry.value
        if self._engine != engine and complete:
            self._store.transact([], [Put(ENGINES + self._me.id, engine)])
            self._engine = engine
        return self._engine != engine

    def _note_seen(self, inventory: Inventory) -> None:
        """Record of each network that the engine really has it."""
        present = {network.id for network in inventory.networks}
        for member in self._members():
            if member.network_id in present and not member.seen:
                entry = self._store.get(member.key)
                if entry and Member.read(entry) == member:
                    seen = replace(member, seen=True)
                    self._store.transact([KeyIs(entry.key, entry.revision)], [Put(entry.key, seen.encode())])

    def _members(self) -> list[Member]:
        found = (members.get(self._me.id) for members in list(self._cluster.members.values()))
        return [member for member in found if member]

    def _collect(self, orphan: Orphan) -> None:
        log.warning("collecting %s: Docker does not have it", orphan.what)
        try:
            orphan.collect()
        except WeftError as error:
            log.warning("%s stays for now: %s", orphan.what, error)

    def _orphans(self, inventory: Inventory) -> Iterator[Orphan]:
        present = {network.id: network for network in inventory.networks}
        mine = self._members()
        anew = self._began_anew(inventory.engine, complete=all(member.network_id in present for member in mine))
        for member in mine:
            removed = member.seen and not anew
            lose = self._networks.delete if removed else self._networks.forget
            yield from self._orphans_of(member.vni, member.network_id, present.get(member.network_id), lose)
        yield from self._orphan_addresses(inventory.networks)
        yield from self._orphan_networks(inventory.networks)

    def _orphan_networks(self, networks: Iterable[DockerNetwork]) -> Iterator[Orphan]:
        # What Docker has is adopted.
        name = self._networks.driver_name
        ours = {cidr for network in networks if network.driver == name for cidr in network.subnets}
        for vni, network in list(self._cluster.networks.items()):
            used = vni in self._cluster.members or any(pool.cidr in ours for pool in network.pools)
            if not used and not self._networks.keeps(network):
                yield Orphan(f"network with VNI {vni}, which no host has", partial(self._networks.remove_unused, vni))

    def _orphans_of(
        self, vni: int, network_id: str, found: DockerNetwork | None, lose: Callable[[str], None]
    ) -> Iterator[Orphan]:
        """What Docker does not have of a network that this host has, or all of it."""
        attached = {endpoint.id for endpoint in found.endpoints} if found else set()
        missing = [e for e in self._cluster.local_endpoints(vni, self._me.id) if e.id not in attached]
        alive = [endpoint for endpoint in missing if self._driver.is_alive(endpoint.id)]
        for endpoint in missing:
            if endpoint not in alive:
                what = f"endpoint {endpoint.id[:12]} (VNI {vni})"
                yield Orphan(what, partial(self._collect_endpoint, network_id, endpoint))
        if found is None and not alive:
            yield Orphan(f"network {network_id[:12]} (VNI {vni})", partial(lose, network_id))

    def _orphan_addresses(self, networks: Iterable[DockerNetwork]) -> Iterator[Orphan]:
        prefix = pending_prefix(self._me.id)
        used = {(subnet, address) for n in networks for subnet in n.subnets for address in n.addresses}
        for entry, (cidr, address) in readable(_pending, self._store.list(prefix).entries):
            if (cidr, address) not in used:
                what = f"address {address} of pool {cidr}"
                yield Orphan(what, partial(self._release, cidr, address), entry.revision)

    def _orphan_pools(self, pools: Iterable[Entry], networks: Iterable[DockerNetwork]) -> Iterator[Orphan]:
        used = {POOLS + subnet for n in networks for subnet in n.subnets}
        for entry, claim in readable(PoolClaim.read, (entry for entry in pools if entry.key not in used)):
            if self._me.id in claim.users:
                cidr, seen = ip_network(claim.cidr), entry.revision
                release = partial(self._ipam.release_pool, cidr, entirely=True, revision=seen)
                yield Orphan(f"pool {claim.cidr}", release, seen)

    def _collect_endpoint(self, network_id: str, endpoint: Endpoint) -> None:
        """Its addresses become pending, and are released here if Docker's own request for that does not come."""
        network = self._cluster.networks.get(endpoint.vni)
        self._driver.delete_endpoint(network_id, endpoint.id)
        for address in endpoint.addresses:
            if network and (cidr := network.cidr_of(address)):
                self._release(cidr, address)

    def _release(self, cidr: str, address: str) -> None:
        self._ipam.release_address(PoolId(LOCAL_SPACE, ip_network(cidr)), ip_address(address))


def _pending(mark: Entry) -> tuple[str, str]:
    """CIDR of the pool, and the address."""
    with reading(mark.key):
        *_, network, bits, address = mark.key.split("/")
        return str(ip_network(f"{network}/{bits}")), str(ip_address(address))
