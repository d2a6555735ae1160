"""Address spaces, pools and addresses: which are free, who holds them, and taking one atomically.

A PoolID is `<address space>/<pool>` or `<address space>/<pool>/<sub-pool>`: derived, hence stable for ever. Pools
never overlap in a cluster, so a pool names its network. Who owns what:

- A pool is claimed by every engine that asked for it, once for each of its networks, and by the weft network that
  CreateNetwork makes on it. (Networks of other drivers, such as macvlan, may use weft for their addresses only.) Its
  gateway and auxiliary addresses go with the pool, not with a ReleaseAddress: other hosts use them too.
- RequestAddress for an endpoint makes an allocation and marks it pending; the endpoint takes it over.

Docker Swarm asks in an address space of its own. Its leader, which may be another host at any time and asks for
everything again when it begins, chooses; the node that runs the task confirms in the local space. What it has belongs
to no host: the leader gives it back, whoever that is by then.

An address is one key made if absent: two hosts can never hold one. Choosing: three random probes, then a listing.
An address that was just released is avoided while others are free: peers may still have it cached.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import ip_address, ip_network
from time import monotonic
from typing import NoReturn

from weft.config import PoolRange
from weft.errors import UNKNOWN, Conflict, Exhausted, InvalidRequest, NotFound
from weft.model import (
    HOSTS,
    POOLS,
    Allocation,
    EndpointNames,
    Host,
    IPAddress,
    IPNetwork,
    Network,
    PoolClaim,
    address_key,
    endpoint_key,
    endpoint_names_key,
    network_key,
    pending_prefix,
    readable,
    unreadable,
)
from weft.store import Condition, Delete, DeleteAll, Entry, KeyIs, NoneNewer, Present, Put, Store, Write

LOCAL_SPACE = "weft-local"
GLOBAL_SPACE = "weft-global"
SPACES = (LOCAL_SPACE, GLOBAL_SPACE)
SWARM = "swarm"
"""The user of Docker Swarm's pools: no host's id, so no host collects them."""

_PROBES = 3
_AUTO_SPAN = 2**20
"""Automatic addresses come from the first million of a range: enough, and IPv6 addresses stay short to read."""
_COOLING_SECONDS = 60.0
_REMEMBERED = 4096
"""Pools whose text need not be parsed again: a new one is compared with all there are."""


@dataclass(frozen=True, slots=True)
class PoolId:
    """A parsed PoolID; `sub` is the --ip-range that this engine's automatic addresses come from."""

    space: str
    pool: IPNetwork
    sub: IPNetwork | None = None

    def __str__(self) -> str:
        return f"{self.space}/{self.pool}" + (f"/{self.sub}" if self.sub else "")

    @classmethod
    def parse(cls, text: str) -> PoolId:
        space, *rest = text.split("/")
        try:
            pool = ip_network("/".join(rest[:2]))
            sub = ip_network("/".join(rest[2:])) if rest[2:] else None
        except ValueError:
            raise NotFound(f"pool {text!r} is not one of weft's") from None
        if space not in SPACES or len(rest) not in (2, 4):
            raise NotFound(f"pool {text!r} is not one of weft's")
        return cls(space, pool, sub)

    @classmethod
    def find(cls, text: str) -> PoolId | None:
        """Like `parse`, but None for what is not ours: releasing that is nothing to do."""
        try:
            return cls.parse(text)
        except NotFound:
            return None

    @property
    def range(self) -> IPNetwork:
        return self.sub or self.pool


class Ipam:
    """The allocator of one host.

    :param host: id of this host.
    :param ranges: where pools come from when the user gives no --subnet.
    :param host_routes: destinations that this host already routes elsewhere; automatic pools avoid them.
    """

    def __init__(
        self,
        store: Store,
        host: str,
        *,
        ranges: Iterable[PoolRange],
        host_routes: Callable[[], Iterable[IPNetwork]],
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._host = host
        self._ranges = tuple(ranges)
        self._host_routes = host_routes
        self._random = rng or random.Random()
        self._cooling = _Cooling()

    # Pools

    def request_pool(self, space: str, pool: IPNetwork | None, sub: IPNetwork | None, *, v6: bool) -> PoolId:
        """Reserve `pool`, or a free one of the family if it is None. Asking again for the same pool is the same."""
        if space not in SPACES:
            raise InvalidRequest(f"address space {space!r} is not one of weft's ({', '.join(SPACES)})")
        if pool is None:
            return PoolId(space, self._reserve_any(6 if v6 else 4, self._user(space)))
        _check_pool(pool)
        self._reserve(pool, self._user(space))
        return PoolId(space, pool, sub)

    def network_pool(self, space: str, network: Network, sub: IPNetwork | None, *, v6: bool) -> PoolId:
        """The PoolID of an existing network's (first) pool of a family."""
        for pool in network.pools:
            cidr = ip_network(pool.cidr)
            if cidr.version == (6 if v6 else 4):
                self._refuse_routed(cidr)
                self._reserve(cidr, self._user(space))
                return PoolId(space, cidr, sub)
        raise NotFound(f"{network.title} has no IPv{6 if v6 else 4} pool")

    def _user(self, space: str) -> str:
        return self._host if space == LOCAL_SPACE else SWARM

    def _refuse_routed(self, pool: IPNetwork) -> None:
        """The engine repeats a request without --subnet for as long as the answer overlaps a route of the host."""
        for route in self._host_routes():
            if _overlap(route, pool):
                raise Conflict(
                    f"pool {pool} overlaps this host's route to {route}: type --subnet {pool} to use it anyway"
                )

    def release_pool(
        self, pool: IPNetwork, *, space: str = LOCAL_SPACE, entirely: bool = False, revision: int = 0
    ) -> None:
        """Take back one request of this host, or Swarm's, for a pool (all if `entirely`); the last frees all in it.

        A weft network's pool stays with the network.

        :param revision: if not 0, do nothing unless the claim is still the one of this revision.
        """
        while (entry := self._store.get(POOLS + str(pool))) is not None:
            claim, user = PoolClaim.read(entry), self._user(space)
            count = claim.users.get(user, 0)
            if not count or revision not in (0, entry.revision):
                return
            left = claim.used(user, -count if entirely else -1)
            if self._store.transact([KeyIs(entry.key, entry.revision)], self._with(left)):
                return

    def drop_claim(self, key: str, host: str, gone: Condition) -> bool:
        """Take back all requests of another host, which is `gone`, for the pool at a key of the store.

        False if something changed meanwhile, or the host is not gone.
        """
        entry = self._store.get(key)
        claim = PoolClaim.read(entry) if entry else None
        if entry is None or claim is None or host not in claim.users:
            return True
        left = claim.used(host, -claim.users[host])
        return self._store.transact([gone, KeyIs(entry.key, entry.revision)], self._with(left))

    def _with(self, claim: PoolClaim) -> list[Write]:
        """Writes that leave a pool with this claim; the last one frees all in it."""
        if claim.users or claim.vni:
            return [Put(claim.key, claim.encode())]
        return [Delete(claim.key), *self.free_all(claim.cidr)]

    def free_all(self, cidr: str) -> list[Write]:
        """Writes that free every address of a pool. Other hosts drop what they have pending in it by themselves."""
        return [DeleteAll(address_key(cidr, "")), DeleteAll(pending_prefix(self._host) + cidr + "/")]

    def refuse_overlap(self, pool: IPNetwork, entries: Iterable[Entry]) -> None:
        """Raise `Conflict` if a claimed pool other than `pool` itself overlaps it."""
        for entry, other in readable(_cidr, entries):
            if _overlap(other, pool) and other != pool:
                raise Conflict(f"pool {pool} overlaps {other} of {self._owner(entry)}: choose another --subnet")

    def _reserve(self, pool: IPNetwork, user: str) -> None:
        key = POOLS + str(pool)
        while True:
            listing = self._store.list(POOLS)
            self.refuse_overlap(pool, listing.entries)
            entry = next((entry for entry in listing.entries if entry.key == key), None)
            claim = PoolClaim.read(entry) if entry else PoolClaim(str(pool))
            if user in claim.users and (claim.vni or user == SWARM):
                return  # asked again for what it has, as an engine that replays does: the network keeps the pool
            # NoneNewer: nobody has reserved an overlapping pool since the listing was read, nor changed this one.
            unchanged: list[Condition] = [
                KeyIs(key, entry.revision if entry else 0),
                NoneNewer(POOLS, listing.revision),
            ]
            if self._store.transact(unchanged, [Put(key, claim.used(user, 1).encode())]):
                return

    def _reserve_any(self, version: int, user: str) -> IPNetwork:
        routes = [route for route in self._host_routes() if route.version == version]
        while True:
            listing = self._store.list(POOLS)
            taken = [*routes, *(pool for _, pool in readable(_cidr, listing.entries))]
            pool = self._first_free([net for net in taken if net.version == version], version)
            claim = PoolClaim(str(pool)).used(user, 1)
            if self._store.transact([NoneNewer(POOLS, listing.revision)], [Put(claim.key, claim.encode())]):
                return pool

    def _first_free(self, taken: list[IPNetwork], version: int) -> IPNetwork:
        for r in self._ranges:
            if r.base.version == version and (pool := _free_subnet(r, taken)):
                return pool
        ranges = ", ".join(str(r.base) for r in self._ranges if r.base.version == version) or "none configured"
        raise Exhausted(
            f"no free IPv{version} pool is left in weft's ranges ({ranges}): give --subnet, or extend WEFT_POOLS"
        )

    def _owner(self, entry: Entry) -> str:
        claim = PoolClaim.read(entry)
        network = self._store.get(network_key(claim.vni)) if claim.vni else None
        if network is None:
            return f"a network of host {', '.join(map(self.host_name, claim.users)) or '?'}"
        record = Network.read(network)
        return f"{record.title}, made on host {record.creator}"

    # Addresses

    def request_gateway(self, pool_id: PoolId, wanted: IPAddress | None) -> IPAddress:
        """The gateway address of a pool: the one it has, else `wanted` or the lowest free address, for all hosts."""
        if wanted is not None:
            check_usable(pool_id.pool, wanted)
        while True:
            entry = self._claim_entry(pool_id)
            claim = PoolClaim.read(entry)
            if claim.gateway:
                return _same_gateway(claim, wanted)
            address = wanted or self._lowest_free(pool_id)
            gateway = Allocation(str(pool_id.pool), str(address), self._host, "gateway", space=pool_id.space)
            chosen = replace(claim, gateway=str(address))
            free = [KeyIs(entry.key, entry.revision), KeyIs(gateway.key, 0)]
            if self._store.transact(free, [Put(gateway.key, gateway.encode()), Put(entry.key, chosen.encode())]):
                return address
            if wanted is not None and (holder := self._store.get(gateway.key)):
                self._refuse(pool_id, Allocation.read(holder))

    def request_address(self, pool_id: PoolId, wanted: IPAddress | None) -> IPAddress:
        """An address for an endpoint: `wanted` or any free one.

        An address that an endpoint of this host holds already is confirmed, since an engine that starts asks again
        for what it has; if it is a second container that asks, CreateEndpoint refuses it.
        """
        if wanted is not None:
            self._take(pool_id, wanted)
            return wanted
        for address in self._candidates(pool_id):
            if self._try(pool_id, address) is None:
                return address
        raise Exhausted(self._full(pool_id))

    def release_address(self, pool_id: PoolId, address: IPAddress) -> None:
        """Free an address of this host that no endpoint holds; anything else is left alone.

        This host's pending mark goes unless it is still true: another host may have freed the pool meanwhile. An
        address that Swarm gives up while an endpoint has it, as of a node that is silent, goes with that endpoint.
        """
        while not self._release(pool_id, address):
            pass  # somebody changed it meanwhile

    def _release(self, pool_id: PoolId, address: IPAddress) -> bool:
        ours = Allocation(str(pool_id.pool), str(address), self._host)
        key, mark, claim = ours.key, ours.pending_key, POOLS + ours.cidr
        found = self._store.get_many([key, mark, claim])
        entry = found.get(key)
        allocation = Allocation.read(entry) if entry else None
        unchanged: list[Condition] = [KeyIs(key, entry.revision if entry else 0)]
        if allocation and self._may_release(pool_id, allocation):
            holder = _holder_key(allocation, found.get(claim))
            # Most often it is gone; else that is what comes back.
            free = [*unchanged, KeyIs(holder, 0)] if holder else unchanged
            self._cooling.add(address)
            held = self._store.attempt(free, [Delete(key), Delete(mark)], [key, holder] if holder else [key])
            if held is None or holder not in held:
                return held is None
            if allocation.space == GLOBAL_SPACE:
                return self._store.transact(unchanged, [Put(key, replace(allocation, space=LOCAL_SPACE).encode())])
        return mark not in found or self._store.transact(unchanged, [Delete(mark)])

    def _may_release(self, pool_id: PoolId, allocation: Allocation) -> bool:
        """Whether it is ours to free, unless a living endpoint holds it."""
        if allocation.kind != "endpoint":
            return False  # it goes with its pool
        if GLOBAL_SPACE in (allocation.space, pool_id.space):
            return allocation.space == pool_id.space  # Swarm's leader gave it, and takes it back
        return allocation.host == self._host

    def _claim_entry(self, pool_id: PoolId) -> Entry:
        entry = self._store.get(f"{POOLS}{pool_id.pool}")
        if entry is None:
            raise _no_pool(pool_id)
        return entry

    def _try(self, pool_id: PoolId, address: IPAddress) -> Entry | None:
        """Take an address, or return what has it; it is pending until an endpoint has it, unless it is Swarm's."""
        a = Allocation(str(pool_id.pool), str(address), self._host, space=pool_id.space)
        marks = [Put(a.pending_key, "")] if pool_id.space == LOCAL_SPACE else []
        claim = POOLS + a.cidr
        free: list[Condition] = [Present(claim), KeyIs(a.key, 0)]
        while (found := self._store.attempt(free, [Put(a.key, a.encode()), *marks], [claim, a.key])) is not None:
            if claim not in found:
                raise _no_pool(pool_id)
            if a.key in found:
                return found[a.key]
        return None

    def _take(self, pool_id: PoolId, address: IPAddress) -> None:
        """Take this very address, or say why not."""
        check_usable(pool_id.pool, address)
        if entry := self._try(pool_id, address):
            allocation = Allocation.read(entry)
            if not self._confirms(pool_id, allocation):
                self._refuse(pool_id, allocation)

    def _refuse(self, pool_id: PoolId, held: Allocation) -> NoReturn:
        raise Conflict(
            f"address {held.address} of pool {pool_id.pool} is taken, {self._describe(held)}: choose another, or let "
            "weft choose"
        )

    def _lowest_free(self, pool_id: PoolId) -> IPAddress:
        used = self._used(pool_id.pool)
        for address in pool_id.pool.hosts():
            if str(address) not in used:
                return address
        raise Exhausted(self._full(pool_id))

    def _confirms(self, pool_id: PoolId, allocation: Allocation) -> bool:
        if allocation.kind == "endpoint" and allocation.space == GLOBAL_SPACE:
            return True  # Swarm's, asked for by the node, or once more by a leader that begins
        if allocation.kind == "auxiliary":
            return True  # a second host makes the same network with the same --aux-address
        return allocation.kind == "endpoint" and allocation.host == self._host and self._holder(allocation)

    def _holder(self, allocation: Allocation) -> bool:
        """True if a living endpoint holds the address."""
        if not allocation.endpoint:
            return False
        holder = _holder_key(allocation, self._store.get(POOLS + allocation.cidr))
        return self._store.get(holder) is not None

    def _describe(self, allocation: Allocation) -> str:
        if allocation.kind != "endpoint":
            return f"it is the network's {allocation.kind} address"
        what = "a container that is starting"
        if allocation.endpoint:
            claim = self._store.get(POOLS + allocation.cidr)
            what = self.endpoint_name(PoolClaim.read(claim).vni if claim else 0, allocation.endpoint)
        return f"{what} on host {self.host_name(allocation.host)} has it"

    def host_name(self, host: str) -> str:
        """How messages call a host, by its id."""
        entry = self._store.get(HOSTS + host)
        return Host.read(entry).name if entry else host

    def endpoint_name(self, vni: int, endpoint: str) -> str:
        """How messages call an endpoint, by its id: by its container, once Docker has told weft."""
        found = self._store.get_many([endpoint_names_key(vni, endpoint)]).values()
        names = next((names for _, names in readable(EndpointNames.read, found)), None)
        return f"container {names.container}" if names and names.container else f"endpoint {endpoint[:12]}"

    def _candidates(self, pool_id: PoolId) -> Iterator[IPAddress]:
        """Addresses to try, most promising first; ends when none is free."""
        first, last = _automatic_bounds(pool_id)
        span = last - first + 1
        if span <= 0:
            return
        for _ in range(_PROBES):
            address = pool_id.pool[first + self._random.randrange(span)]
            if address not in self._cooling:
                yield address
        used = self._used(pool_id.pool)
        start = self._random.randrange(span)
        in_turn = (pool_id.pool[first + (start + i) % span] for i in range(span))
        cooling = []
        for address in in_turn:
            if str(address) not in used:
                if address in self._cooling:
                    cooling.append(address)
                else:
                    yield address
        yield from cooling

    def _used(self, pool: IPNetwork) -> set[str]:
        prefix = address_key(str(pool), "")
        return {entry.key.removeprefix(prefix) for entry in self._store.list(prefix).entries}

    def _full(self, pool_id: PoolId) -> str:
        first, last = _automatic_bounds(pool_id)
        entries = self._store.list(address_key(str(pool_id.pool), "")).entries
        inside = [a for _, a in readable(Allocation.read, entries) if ip_address(a.address) in pool_id.range]
        held = sum(a.kind == "endpoint" for a in inside)
        total = last - first + 1 - (len(inside) - held)
        where = f"pool {pool_id.pool}" + (f", range {pool_id.sub}," if pool_id.sub else "")
        return f"{where} is full: {held} of {total} addresses in use; remove containers, or make a larger network"


def _holder_key(allocation: Allocation, claim: Entry | None) -> str:
    """Where the endpoint is that an address names, if it lives; "" if it names none."""
    if not allocation.endpoint:
        return ""
    return endpoint_key(PoolClaim.read(claim).vni if claim else 0, allocation.endpoint)


def _no_pool(pool_id: PoolId) -> NotFound:
    return NotFound(f"pool {pool_id.pool} {UNKNOWN}: its network was removed")


class _Cooling:
    """Addresses that were released a moment ago."""

    def __init__(self) -> None:
        self._released: dict[IPAddress, float] = {}
        self._lock = threading.Lock()

    def add(self, address: IPAddress) -> None:
        now = monotonic()
        with self._lock:
            self._released = {a: t for a, t in self._released.items() if now - t < _COOLING_SECONDS}
            self._released[address] = now

    def __contains__(self, address: IPAddress) -> bool:
        return monotonic() - self._released.get(address, -_COOLING_SECONDS) < _COOLING_SECONDS


def _same_gateway(claim: PoolClaim, wanted: IPAddress | None) -> IPAddress:
    gateway = ip_address(claim.gateway)
    if wanted not in (None, gateway):
        raise Conflict(f"the gateway of pool {claim.cidr} is {gateway}: type --gateway {gateway}, or leave it out")
    return gateway


def _check_pool(pool: IPNetwork) -> None:
    """Raise `InvalidRequest` for a subnet that containers cannot live in."""
    if pool.prefixlen > pool.max_prefixlen - 2:
        raise InvalidRequest(f"subnet {pool} is too small: give at least a /{pool.max_prefixlen - 2}")
    if pool.prefixlen < 8 or pool.is_multicast or pool.is_loopback or pool.is_unspecified:
        raise InvalidRequest(f"subnet {pool} is not one that containers can have addresses of: choose a private one")


def usable_bounds(pool: IPNetwork) -> tuple[int, int]:
    """Offsets of the first and last address that a host may have: not the network's own, nor IPv4's broadcast."""
    hosts_only = pool.prefixlen < pool.max_prefixlen - 1
    return (1 if hosts_only else 0), pool.num_addresses - (2 if hosts_only and pool.version == 4 else 1)


def check_usable(pool: IPNetwork, address: IPAddress) -> None:
    """Raise `InvalidRequest` unless a host on `pool` may have `address`."""
    if address not in pool:
        raise InvalidRequest(f"address {address} is not in pool {pool}: choose one that is")
    first, last = usable_bounds(pool)
    if not first <= int(address) - int(pool.network_address) <= last:
        raise InvalidRequest(f"address {address} is the network or broadcast address of pool {pool}: choose another")


def _automatic_bounds(pool_id: PoolId) -> tuple[int, int]:
    first, last = usable_bounds(pool_id.pool)
    start = int(pool_id.range.network_address) - int(pool_id.pool.network_address)
    first, last = max(first, start), min(last, start + pool_id.range.num_addresses - 1)
    return first, min(last, first + _AUTO_SPAN - 1)


def _cidr(entry: Entry) -> IPNetwork:
    try:  # not `reading`: this is done for every pool of the cluster
        return _parsed(entry.key.removeprefix(POOLS))
    except ValueError as error:
        raise unreadable(entry.key, error) from error


@lru_cache(_REMEMBERED)
def _parsed(cidr: str) -> IPNetwork:
    return ip_network(cidr)


def _span(pool: IPNetwork) -> tuple[int, int]:
    return int(pool.network_address), int(pool.broadcast_address)


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    """As `overlaps`, six times quicker."""
    (first, last), (start, end) = _span(one), _span(other)
    return one.version == other.version and first <= end and start <= last


def _free_subnet(r: PoolRange, taken: list[IPNetwork]) -> IPNetwork | None:
    """The lowest free subnet of a range, in one pass over what is taken."""
    step = 1 << (r.base.max_prefixlen - r.size)
    position, end = _span(r.base)
    for first, last in sorted(map(_span, taken)):
        if first >= position + step:
            break
        if last >= position:
            position = -(-(last + 1) // step) * step
    return type(r.base)((position, r.size)) if position < end else None
