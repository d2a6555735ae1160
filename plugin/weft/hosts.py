"""The hosts of the cluster: how one joins it, and how one that is gone is forgotten.

A host has a record, which stays, and a sign of life, which goes by itself when the host is silent. A silent host is
*unreachable*, not dead: its entries stay, so that an outage of the store or of a link takes nothing away. Its id, name
and underlay address are refused to others until it is forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from time import monotonic

from weft.cluster import Cluster
from weft.driver import Driver
from weft.errors import Conflict, NotFound
from weft.ipam import Ipam
from weft.model import (
    ALIVE,
    BINDINGS,
    ENGINES,
    HOSTS,
    POOLS,
    Allocation,
    Binding,
    Endpoint,
    Host,
    Member,
    address_key,
    endpoints_prefix,
    pending_prefix,
    readable,
)
from weft.probes.links import RESULTS, requests_prefix
from weft.schema import check_schema
from weft.store import Delete, DeleteAll, Entry, KeyIs, NoneNewer, Put, Store, Write

log = logging.getLogger(__name__)

LEASE_SECONDS = 10.0
"""A host that was silent for so long is unreachable."""
_SCHEMA_SECONDS = 60.0


class AddressInUse(Conflict):
    """Another host has this host's underlay address in its record."""


class TunnelInUse(Conflict):
    """Another host has in its record what has to be this host's alone in WireGuard."""


class TunnelAddressInUse(TunnelInUse):
    """Its address."""


class TunnelKeyInUse(TunnelInUse):
    """Its key, as a copy of its state folder has it. No host takes either of the two as a peer."""


class Unlike(Conflict):
    """The other hosts have otherwise what must be the same on all."""


class OtherFamily(Unlike):
    """Their underlay is of another address family."""


class OtherPool(Unlike):
    """Their WireGuard addresses are from another pool."""


class IdInUse(Conflict):
    """Another machine lives with this host's id; or this one did, a moment before it was restarted."""


class Hosts:
    """Use cases about hosts; any thread may call."""

    def __init__(self, store: Store, cluster: Cluster, driver: Driver, ipam: Ipam) -> None:
        self._store = store
        self._cluster = cluster
        self._driver = driver
        self._ipam = ipam
        self._next_check = 0.0
        """When to look again whether the store is of our version."""

    def all(self) -> list[Host]:
        return [host for _, host in readable(Host.read, self._store.list(HOSTS).entries)]

    def register(self, me: Host, instance: str) -> None:
        """Give a sign of life and publish the record; `Conflict` names the host that has its id, name, address or key.

        `ConfigError` if the store belongs to another version of weft.

        :param instance: tells this run of the machine from others (`identity.instance`).
        """
        if monotonic() >= self._next_check:
            check_schema(self._store)
            self._next_check = monotonic() + _SCHEMA_SECONDS
        if not self._store.beat(me.alive_key, instance, LEASE_SECONDS):
            self._take_over(me, instance)
        while not (self._cluster.loaded and self._cluster.hosts.get(me.id) == me):
            listing = self._store.list(HOSTS)
            hosts = [host for _, host in readable(Host.read, listing.entries)]
            _refuse_double(me, hosts)
            self._refuse_unlike(me, hosts)
            # NoneNewer: no other host has registered meanwhile.
            alone = [NoneNewer(HOSTS, listing.revision)]
            if me in hosts or self._store.transact(alone, [Put(me.key, me.encode())]):
                return

    def _refuse_unlike(self, me: Host, hosts: Sequence[Host]) -> None:
        """One VXLAN device cannot reach both families, and one WireGuard device has one route, to its own pool.

        Only hosts that are alive count, so that a cluster can change over.
        """
        others = [host for host in hosts if (host.family, host.wg_pool) != (me.family, me.wg_pool)]
        alive = {entry.key for entry in self._store.list(ALIVE).entries} if others else set()
        for other in others:
            if other.id == me.id or other.alive_key not in alive:
                continue
            if other.family != me.family:
                raise OtherFamily(
                    f"the underlay address {me.underlay} of this host is IPv{me.family}, but that of {other.title} is "
                    f"IPv{other.family}, and a cluster has one of both: give this host an IPv{other.family} address "
                    f"(WEFT_UNDERLAY, or WEFT_UNDERLAY_FAMILY=ipv{other.family} if it has both), or stop weft on all "
                    f"hosts and start it with WEFT_UNDERLAY_FAMILY=ipv{me.family}"
                )
            raise OtherPool(
                f"the WireGuard pool of this host is {me.wg_pool}, but that of {other.title} is {other.wg_pool}, and "
                f"all hosts of a cluster have the same: set WEFT_WG_POOL={other.wg_pool} on this host, or stop weft on "
                f"all hosts and start it with WEFT_WG_POOL={me.wg_pool}"
            )

    def withdraw(self, me: Host, is_here: Callable[[str], bool]) -> None:
        """Give up the address in this host's record if it has that one no more: two may have swapped theirs."""
        entry = self._store.get(me.key)
        if entry and not is_here(Host.read(entry).underlay):
            self._store.transact([KeyIs(entry.key, entry.revision)], [Delete(entry.key)])

    def _take_over(self, me: Host, instance: str) -> None:
        """The id shows another machine's sign of life. It is our own from before a reboot if the address is ours."""
        entry = self._store.get(me.key)
        other = Host.read(entry) if entry else None
        if other is None or other.underlay == me.underlay:
            self._store.transact([], [Delete(me.alive_key)])
            if self._store.beat(me.alive_key, instance, LEASE_SECONDS):
                return
        raise IdInUse(
            f"the id of this host, {me.id[:12]}, is in use by {other.title if other else 'another machine'}: if this "
            "machine was made from a copy of that one, delete the files host-id and wireguard.key in its state folder "
            "(WEFT_STATE)"
        )

    def find(self, name_or_id: str) -> Host:
        """See `find_host`; as the store has them."""
        return find_host(self.all(), name_or_id)

    def forget(self, host: Host, *, force: bool = False) -> None:
        """Collect all that a host has: endpoints, addresses, its parts of networks and pools, and its record.

        :param force: even if it has given a sign of life within the last seconds.
        """
        if force:
            self._store.transact([], [Delete(host.alive_key)])
        gone = KeyIs(host.alive_key, 0)
        bound = readable(Binding.read, self._store.list(f"{BINDINGS}{host.id}/").entries)
        bindings = {entry.key: binding.vni for entry, binding in bound}
        mirrored = {*self._cluster.memberships(host.id).values(), *self._cluster.local_networks(host.id)}
        for vni in mirrored.union(bindings.values()):
            for entry, endpoint in readable(Endpoint.read, self._store.list(endpoints_prefix(vni)).entries):
                if endpoint.host == host.id:
                    self._attempt(host, lambda key=entry.key: self._driver.drop_endpoint(key, gone))  # type: ignore[misc]
            keys = [key for key, network in bindings.items() if network == vni]
            self._write(host, [Delete(Member(vni, host.id, "").key), *map(Delete, keys)])
            self._driver.networks.remove_unused(vni)
        for entry in self._pending(host):
            self._store.transact([gone, KeyIs(entry.key, entry.revision)], [Delete(entry.key)])
        for entry in self._store.list(POOLS).entries:
            self._attempt(host, lambda key=entry.key: self._ipam.drop_claim(key, host.id, gone))  # type: ignore[misc]
        rest: list[Write] = [DeleteAll(pending_prefix(host.id)), DeleteAll(f"{BINDINGS}{host.id}/")]
        rest += [Delete(RESULTS + host.id), DeleteAll(requests_prefix(host.id))]
        self._write(host, [*rest, Delete(host.key), Delete(ENGINES + host.id)])
        log.warning("%s is forgotten, with all that it had", host.title)

    def _write(self, host: Host, writes: Sequence[Write]) -> None:
        self._attempt(host, lambda: self._store.transact([KeyIs(host.alive_key, 0)], writes))

    def _attempt(self, host: Host, work: Callable[[], bool]) -> None:
        """Do what others may get in the way of, unless it is the host itself: then it lives."""
        while not work():
            if self._store.get(host.alive_key):
                raise Conflict(
                    f"{host.title} is alive: stop weft there first; if that machine is surely off, add --force"
                )

    def _pending(self, host: Host) -> Iterator[Entry]:
        """The addresses that the host had taken, but no endpoint of it held."""
        prefix = pending_prefix(host.id)
        for mark in self._store.list(prefix).entries:
            cidr, address = mark.key.removeprefix(prefix).rsplit("/", 1)
            entry = self._store.get(address_key(cidr, address))
            if entry and Allocation.read(entry).host == host.id:
                yield entry


def find_host(hosts: Collection[Host], name_or_id: str) -> Host:
    """The host of this name, address, or id (or beginning of it); `NotFound` lists those there are."""
    found = [h for h in hosts if name_or_id in (h.id, h.name, h.underlay)]
    found = found or [h for h in hosts if name_or_id and h.id.startswith(name_or_id)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(sorted(h.name for h in hosts))
    raise NotFound(f"{'several hosts are' if found else 'no host is'} called {name_or_id!r} (known: {known})")


def _refuse_double(me: Host, hosts: Sequence[Host]) -> None:
    for other in hosts:
        if other.id != me.id and other.underlay == me.underlay:
            raise AddressInUse(
                f"the underlay address {me.underlay} of this host is {other.title}'s: choose another (WEFT_UNDERLAY); "
                f"if that host is gone for good, type weft host forget {other.id[:12]} on any other"
            )
        if other.id != me.id and me.wg_address and other.wg_address == me.wg_address:
            raise TunnelAddressInUse(f"the WireGuard address {me.wg_address} of this host is {other.title}'s")
        if other.id != me.id and me.wg_key and other.wg_key == me.wg_key:
            raise TunnelKeyInUse(
                f"the WireGuard key of this host is {other.title}'s as well: one machine was made from a copy of the "
                "other"
            )
        if other.id != me.id and other.name == me.name:
            raise Conflict(
                f"the name {me.name} of this host is {other.title}'s: choose another (WEFT_HOSTNAME); if that host is "
                f"gone for good, type weft host forget {other.id[:12]} on any other"
            )
