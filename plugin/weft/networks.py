"""The networks of this host's engine: founded, joined, left and removed.

A network is the cluster's: the first host that asks for one founds it, the others join it, by its pools, its VNI or its
name. A host that leaves takes its endpoints along, and the last one the network. Every change is one transaction that
holds only if nobody was quicker; who lost thinks again.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address, ip_network
from time import monotonic
from typing import NamedTuple, Protocol

from weft.cluster import Cluster
from weft.dataplane import IPV6_MIN_MTU
from weft.errors import UNKNOWN, Conflict, Exhausted, InvalidRequest, NotFound
from weft.ipam import SPACES, Ipam, check_usable
from weft.model import (
    NETWORKS,
    POOLS,
    VNI_AUTO_MIN,
    VNI_USER_MAX,
    Allocation,
    Binding,
    Endpoint,
    Host,
    IPNetwork,
    Member,
    Network,
    Pool,
    PoolClaim,
    binding_key,
    endpoint_names_key,
    endpoint_names_prefix,
    endpoints_prefix,
    mac_key,
    members_prefix,
    name_key,
    network_key,
    readable,
)
from weft.options import NetworkOptions, parse_options
from weft.store import Condition, Delete, DeleteAll, Entry, KeyIs, Listing, NoneNewer, Put, Store, Write
from weft.topology import Limit

log = logging.getLogger(__name__)

NOT_IN_SWARM = (
    "option weft.network is not for Docker Swarm, whose networks are on all nodes by themselves: "
    "type the --subnet of the network instead, or leave it out"
)
_PREFIX = "eth"
"""Of interfaces, as with Docker's own networks."""
ATTEMPTS = 50
"""Times that a transaction which lost a race is thought through again."""
_PRUNE_SECONDS = 5.0
"""The engine deletes one network after the other when it prunes, each within that time, and then says so."""
_MOST_REMOVALS = 1000


class Attachments(Protocol):
    """What is needed of the data plane; see `attachments.Attachments`."""

    def check(self, *, encrypted: bool = False) -> None:
        """Raise an error if this host cannot make the devices of a network, or not of one that is encrypted."""
        ...

    def limit(self, *, encrypted: bool = False, here: bool = False) -> Limit:
        """The largest MTU that a network can have on all hosts, or on this one."""
        ...

    def check_port(self, port: int, *, encrypted: bool) -> None:
        """Raise `Conflict` if something else has the UDP port here, or as WireGuard on another host."""
        ...

    def detach(self, endpoint_id: str) -> None:
        """Remove the endpoint's veth."""
        ...


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """One element of CreateNetwork's IPv4Data or IPv6Data."""

    space: str
    pool: Pool


@dataclass(frozen=True, slots=True)
class NetworkRequest:
    network_id: str
    pools: tuple[PoolRequest, ...]
    options: NetworkOptions
    internal: bool


@dataclass(frozen=True, slots=True)
class Bound:
    """The network that an id of this engine stands for, and the condition that it still does."""

    network: Network
    unchanged: KeyIs


class Removal(NamedTuple):
    """A network was removed here at that time, by the monotonic clock, and retired: that generation of it."""

    asked: float
    vni: int
    generation: int


class Networks:
    """The networks of one host's engine.

    :param driver_name: what users type after `-d`, for commands in messages.
    :param mirror: who removes a network here, removes it on all hosts.
    """

    def __init__(
        self,
        store: Store,
        host: Host,
        ipam: Ipam,
        attachments: Attachments,
        cluster: Cluster,
        *,
        driver_name: str = "weft",
        mirror: bool = True,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._host = host
        self._ipam = ipam
        self._attachments = attachments
        self._cluster = cluster
        self.driver_name = driver_name
        self._mirror = mirror
        self._bindings: dict[str, Bound] = {}
        """By this engine's NetworkID."""
        self._generations: dict[str, int] = {}
        """What those networks were when this host joined them, by NetworkID."""
        self._expected: Network | None = None
        self._mirrored: set[str] = set()
        """NetworkIDs that the mirror makes or removes: their DeleteNetwork is not a user's."""
        self._removals: deque[Removal] = deque(maxlen=_MOST_REMOVALS)
        self._random = rng or random.Random()

    def create(self, request: NetworkRequest, *, revive: bool = True) -> Network:
        """Make the network, or join the one that owns its pools (or has its VNI) if they are compatible.

        :param revive: joining a retired network makes all hosts want it again.
        """
        self._check_request(request)
        self._attachments.check(encrypted=request.options.encrypted)
        expected = self._expects(request)
        if expected:
            self._mirrored.add(request.network_id)  # the engine may give it up after all
            # It is known which network is meant, and under another number than was typed if the store was lost.
            request = replace(request, options=replace(request.options, network=None, vni=None))
        for _ in range(ATTEMPTS):
            self.unbind(request.network_id)  # the cluster may have forgotten this host
            with suppress(NotFound):
                network = self.bound(request.network_id).network
                self._check_compatible(network, request)
                return network
            pools = self._store.list(POOLS)
            owner = self._owner(request, pools)
            if expected:
                self._check_expected(expected, owner)
            made = self._found(request, pools) if owner is None else self._join_network(owner, request, revive)
            if made is not None:
                self._generations[request.network_id] = made.generation
                return made
        raise Conflict("too many hosts are changing this network at once: try again")

    @contextmanager
    def expecting(self, network: Network) -> Iterator[None]:
        """While the engine is told to make a network that other hosts have: if that has gone, none is founded anew."""
        self._expected = network
        try:
            yield
        finally:
            self._expected = None
            self._mirrored.clear()

    @contextmanager
    def removing(self, network_id: str) -> Iterator[None]:
        """While the engine is told to remove a network."""
        self._mirrored.add(network_id)
        try:
            yield
        finally:
            self._mirrored.clear()

    def deletion(self, network_id: str) -> Callable[[], None]:
        """What deletes a network here, perhaps later than it was asked; what that means elsewhere is decided now.

        Who removes a network removes it everywhere: it retires, unless somebody makes it again before the deletion is
        done. The last host takes all that it has along.
        """
        meant = self._mirror and network_id not in self._mirrored
        generation = self._generation(network_id) if meant else None
        return partial(self._leave, network_id, retire=generation, asked=monotonic())

    def delete(self, network_id: str) -> None:
        """See `deletion`."""
        self.deletion(network_id)()

    def forget(self, network_id: str) -> None:
        """Forget this host's part of a network that nobody meant to remove."""
        self._leave(network_id, retire=None)

    def spare_used(self, pruned: float) -> None:
        """Docker has pruned here, at that time of the monotonic clock: what other hosts use is wanted again.

        It prunes what is unused on this host, and says so only when it has deleted that: so the last deletions, one
        shortly before the other, were no user's.
        """
        for removal in sorted(self._removals, reverse=True):
            if pruned - removal.asked > _PRUNE_SECONDS:
                break
            if removal.asked <= pruned:
                pruned = removal.asked
                while not self._spare(removal):
                    pass  # somebody changed the network

    def _spare(self, removal: Removal) -> bool:
        entry = self._store.get(network_key(removal.vni))
        if entry is None or not (network := Network.read(entry)).retired or network.generation != removal.generation:
            return True
        listed = readable(Endpoint.read, self._store.list(endpoints_prefix(removal.vni)).entries)
        users = {endpoint.host for _, endpoint in listed}
        if not users:
            return True
        if not self._store.transact([KeyIs(entry.key, entry.revision)], [Put(entry.key, network.revived().encode())]):
            return False
        names = ", ".join(sorted(host.name for host in list(self._cluster.hosts.values()) if host.id in users))
        log.warning("%s was pruned here, but is in use on %s: it stays, and is made here again", network.title, names)
        return True

    def keeps(self, network: Network) -> bool:
        """True if a network stays though no engine has it: this host's mirror is about to make it."""
        return self._mirror and network.wanted

    def _generation(self, network_id: str) -> int | None:
        """The network's as far as this host knows: the store may be away."""
        network = self._cluster.networks.get(self._cluster.bindings.get((self._host.id, network_id), 0))
        joined = self._generations.get(network_id)
        return joined if network is None else max(network.generation, joined or 0)

    def _leave(self, network_id: str, *, retire: int | None, asked: float = 0.0) -> None:
        """Forget this host's part of a network, which retires if it still is of this generation.

        :param asked: when that was asked for, by the monotonic clock.
        """
        binding = self._store.get(binding_key(self._host.id, network_id))
        if binding is None:
            return
        vni = Binding.read(binding).vni
        self._bindings.pop(network_id, None)
        self._generations.pop(network_id, None)
        present = self._store.get(network_key(vni))
        listed = self._store.list(endpoints_prefix(vni)).entries if present else ()
        for entry, endpoint in readable(Endpoint.read, listed):
            if present and endpoint.host == self._host.id:
                self._attachments.detach(endpoint.id)
                writes = forgotten(Network.read(present), endpoint)
                self._store.transact([KeyIs(entry.key, entry.revision)], writes)
        while not self._drop_membership(binding.key, Member(vni, self._host.id, network_id), retire, asked):
            pass  # somebody changed the network
        self.remove_unused(vni)

    def _drop_membership(self, binding: str, member: Member, retire: int | None, asked: float) -> bool:
        writes: list[Write] = [Delete(binding), Delete(member.key)]
        entry = self._store.get(network_key(member.vni))
        network = Network.read(entry) if entry else None
        if entry is None or network is None or not network.wanted or network.generation != retire:
            return self._store.transact([], writes)
        writes.append(Put(entry.key, replace(network, retired=True).encode()))
        if not self._store.transact([KeyIs(entry.key, entry.revision)], writes):
            return False
        self._removals.append(Removal(asked, network.vni, network.generation))
        return True

    def remove_unused(self, vni: int) -> bool:
        """Remove a network that no host's engine has any more."""
        entry = self._store.get(network_key(vni))
        if entry is None or self.keeps(network := Network.read(entry)):
            return False
        if self._store.list(members_prefix(vni)).entries:
            return False
        prefixes = endpoints_prefix(vni), endpoint_names_prefix(vni), mac_key(vni, "")
        writes: list[Write] = [Delete(entry.key), *map(DeleteAll, prefixes)]
        unused: list[Condition] = [NoneNewer(members_prefix(vni), 0), KeyIs(entry.key, entry.revision)]
        name = self._store.get(name_key(network.name)) if network.published else None
        if name and name.value == str(vni):
            unused.append(KeyIs(name.key, name.revision))
            writes.append(Delete(name.key))
        for pool in network.pools:
            claimed = self._store.get(POOLS + pool.cidr)
            claim = PoolClaim.read(claimed) if claimed else None
            unused.append(KeyIs(POOLS + pool.cidr, claimed.revision if claimed else 0))
            if claim and claim.users:  # another network has it, for its addresses only
                writes.append(Put(claim.key, replace(claim, vni=0).encode()))
            else:
                writes += [Delete(POOLS + pool.cidr), *self._ipam.free_all(pool.cidr)]
        return self._store.transact(unused, writes)

    def find(self, name_or_vni: str) -> Network:
        """The network with this VNI or this name; `NotFound` lists those there are."""
        networks = [network for _, network in readable(Network.read, self._store.list(NETWORKS).entries)]
        found = [n for n in networks if name_or_vni in (str(n.vni), n.name)]
        if len(found) == 1:
            return found[0]
        if found:
            vnis = ", ".join(str(n.vni) for n in found)
            raise Conflict(f"several networks are called {name_or_vni}: name one by its VNI ({vnis})")
        known = ", ".join(sorted(n.name or str(n.vni) for n in networks)) or "none"
        raise NotFound(f"there is no weft network {name_or_vni!r} (known: {known})")

    def allocate(self, options: Mapping[str, str], pools: Sequence[IPNetwork]) -> dict[str, str]:
        """Options for a Swarm network's nodes: the user's, and the VNI that all nodes are to use.

        What a Swarm manager gets back here replaces the user's options (moby cnmallocator). Whether all fits is decided
        on the nodes: only there a user sees an error.
        """
        asked = parse_options(options)
        if asked.network is not None:
            raise InvalidRequest(NOT_IN_SWARM)
        claims = map(PoolClaim.read, self._store.get_many([POOLS + str(pool) for pool in pools]).values())
        present = next((claim.vni for claim in claims if claim.vni), None)
        return {**options, "weft.vni": str(asked.vni or present or self._free_vni())}

    # Creating a network

    def _check_request(self, request: NetworkRequest) -> None:
        if not request.pools:
            raise InvalidRequest("the network has no subnet: weft needs at least one IPv4 or IPv6 pool")
        for one in request.pools:
            if one.space not in SPACES:
                raise InvalidRequest(
                    f"addresses come from another IPAM driver ({one.space or 'none'}), which would give two hosts the "
                    f"same address: type docker network create -d {self.driver_name} --ipam-driver {self.driver_name} "
                    f"--subnet {one.pool.cidr} NAME"
                )
            self._check_pool(one.pool)
        self._check_disjoint([ip_network(one.pool.cidr) for one in request.pools])
        self._check_mtu(request)
        if request.options.port:
            self._attachments.check_port(request.options.port, encrypted=request.options.encrypted)

    def _check_mtu(self, request: NetworkRequest) -> None:
        mtu = request.options.mtu or 0
        limit = self._attachments.limit(encrypted=request.options.encrypted)
        if mtu > limit.mtu and not self._expects(request):
            raise InvalidRequest(
                f"option mtu={mtu} does not fit: {limit.mtu} is the most that the underlay of host {limit.host} carries"
            )
        if 0 < mtu < IPV6_MIN_MTU and any(":" in one.pool.cidr for one in request.pools):
            raise InvalidRequest(f"option mtu={mtu} is too small for IPv6, which needs {IPV6_MIN_MTU} (RFC 8200)")

    def _check_pool(self, pool: Pool) -> None:
        cidr = ip_network(pool.cidr)
        for address in (pool.gateway, *pool.auxiliary.values()):
            if address:
                check_usable(cidr, ip_address(address))

    def _check_disjoint(self, pools: Sequence[IPNetwork]) -> None:
        for index, pool in enumerate(pools):
            for other in pools[:index]:
                if pool.version == other.version and pool.overlaps(other):
                    raise InvalidRequest(f"subnets {other} and {pool} of one network overlap: leave one out")

    def _owner(self, request: NetworkRequest, pools: Listing) -> Entry | None:
        """The network that the request means: by option, by VNI, or by the pools; `Conflict` if those differ."""
        keys = {POOLS + one.pool.cidr for one in request.pools}
        claims = [PoolClaim.read(entry) for entry in pools.entries if entry.key in keys]
        vnis = {claim.vni for claim in claims if claim.vni}
        options = request.options
        if options.network is not None:
            vnis.add(self.find(options.network).vni)
        if options.vni is not None and (vnis or self._store.get(network_key(options.vni))):
            vnis.add(options.vni)
        if len(vnis) > 1:
            raise Conflict(
                f"subnet and options mean different networks ({self._titles(vnis)}): leave out --subnet, weft.vni or "
                "weft.network, or make them agree"
            )
        return self._store.get(network_key(vnis.pop())) if vnis else None

    def _found(self, request: NetworkRequest, pools: Listing) -> Network | None:
        """Make a new network; None if another host was quicker at something."""
        network = Network(
            vni=request.options.vni or self._free_vni(),
            name="",
            pools=tuple(one.pool for one in request.pools),
            mtu=request.options.mtu or 0,
            internal=request.internal,
            creator=self._host.name,
            encrypted=request.options.encrypted,
            **request.options.chosen(),
        )
        for pool in network.pools:
            self._ipam.refuse_overlap(ip_network(pool.cidr), pools.entries)
        writes: list[Write] = [Put(network.key, network.encode()), *self._membership(network, request.network_id)]
        for pool in network.pools:
            writes += self._owned(pool, network.vni, pools)
        # Nobody has claimed a pool since they were looked at, or this is thought through again.
        unchanged: list[Condition] = [KeyIs(network.key, 0), NoneNewer(POOLS, pools.revision)]
        return network if self._store.transact(unchanged, writes) else None

    def _expects(self, request: NetworkRequest) -> Network | None:
        """The network that the mirror makes, if the request is the engine's for that."""
        expected = self._expected
        asked = {one.pool.cidr for one in request.pools}
        return expected if expected and {pool.cidr for pool in expected.pools} == asked else None

    def _check_expected(self, expected: Network, owner: Entry | None) -> None:
        network = Network.read(owner) if owner else None
        if network is None or network.vni != expected.vni or not network.wanted:
            raise NotFound(f"{expected.title} was removed meanwhile")

    def _join_network(self, owner: Entry, request: NetworkRequest, revive: bool) -> Network | None:
        """Make this host a member of an existing network; None if it went away meanwhile."""
        network = Network.read(owner)
        self._check_compatible(network, request)
        member = Member(network.vni, self._host.id, request.network_id)
        present = self._store.get(member.key)
        if present is not None:
            other = Member.read(present).network_id
            raise Conflict(f"{network.title} is on this host already, as Docker network {other[:12]}")
        conditions: list[Condition] = [KeyIs(owner.key, owner.revision), KeyIs(member.key, 0)]
        writes = self._membership(network, request.network_id)
        if network.retired and revive:
            network = network.revived()
            writes.append(Put(owner.key, network.encode()))
        return network if self._store.transact(conditions, writes) else None

    def _check_compatible(self, network: Network, request: NetworkRequest) -> None:
        """Raise `Conflict` that names each difference between the network and what this host asks for."""
        options = request.options
        wanted, has = {p.pool.cidr: p.pool for p in request.pools}, {p.cidr: p for p in network.pools}
        wrong = []
        if wanted.keys() != has.keys():
            wrong.append(f"its subnets are {', '.join(has)}, not {', '.join(wanted)}")
        for cidr in wanted.keys() & has.keys():
            if wanted[cidr].gateway not in ("", has[cidr].gateway):
                wrong.append(f"its gateway is {has[cidr].gateway}, not {wanted[cidr].gateway}")
            if extra := set(wanted[cidr].auxiliary.values()) - set(has[cidr].auxiliary.values()):
                wrong.append(f"it does not reserve the auxiliary address {', '.join(sorted(extra))}")
        largest = self._attachments.limit(encrypted=network.encrypted, here=True).mtu
        if network.mtu > largest:
            wrong.append(f"its mtu is {network.mtu}, but {largest} is the most that this host's underlay carries")
        if options.vni not in (None, network.vni):
            wrong.append(f"its VNI is {network.vni}, not {options.vni}")
        if options.mtu not in (None, network.mtu):
            wrong.append(f"its mtu is {network.mtu or 'automatic'}, not {options.mtu}")
        if request.internal != network.internal:
            wrong.append("it is internal" if network.internal else "it is not internal")
        wrong += options.contradictions(network)
        if options.encrypted != network.encrypted:
            wrong.append("it is encrypted" if network.encrypted else "it is not encrypted")
        if wrong:
            raise Conflict(
                f"{network.title}, made on host {network.creator}, cannot be used like that: {'; '.join(wrong)}. "
                f"Type --subnet {' --subnet '.join(has)} and the same options, or choose another subnet"
            )

    def _membership(self, network: Network, network_id: str) -> list[Write]:
        member = Member(network.vni, self._host.id, network_id)
        binding = Binding(network.vni, network_id)
        return [Put(member.key, member.encode()), Put(binding.key(self._host.id), binding.encode())]

    def _owned(self, pool: Pool, vni: int, pools: Listing) -> list[Write]:
        """Writes that make a pool, its gateway and its auxiliary addresses the network's."""
        found = next((entry for entry in pools.entries if entry.key == POOLS + pool.cidr), None)
        before = PoolClaim.read(found) if found else PoolClaim(pool.cidr)
        claim = replace(before, vni=vni, gateway=pool.gateway)
        writes: list[Write] = [Put(claim.key, claim.encode())]
        kinds = {pool.gateway: "gateway", **dict.fromkeys(pool.auxiliary.values(), "auxiliary")}
        for address, kind in kinds.items():
            if address:
                held = Allocation(pool.cidr, address, self._host.id, kind)
                writes += [Put(held.key, held.encode()), Delete(held.pending_key)]
        return writes

    def _free_vni(self) -> int:
        for _ in range(ATTEMPTS):
            vni = self._random.randint(VNI_AUTO_MIN, VNI_USER_MAX)
            if self._store.get(network_key(vni)) is None:
                return vni
        raise Exhausted("no free VNI was found: choose one with -o weft.vni=NUMBER")

    def _titles(self, vnis: Iterable[int]) -> str:
        entries = {vni: self._store.get(network_key(vni)) for vni in sorted(vnis)}
        return ", ".join(Network.read(e).title if e else f"VNI {vni}" for vni, e in entries.items())

    def bound(self, network_id: str) -> Bound:
        """What an id of this engine stands for; `NotFound` if weft does not know.

        It is kept in memory, since handlers are in a hurry: only this host binds its ids, and what a driver asks of a
        network never changes. Who relies on it in a transaction adds `unchanged`.
        """
        bound = self._bindings.get(network_id)
        if bound is None:
            binding = self._store.get(binding_key(self._host.id, network_id))
            entry = self._store.get(network_key(Binding.read(binding).vni)) if binding else None
            if binding is None or entry is None:
                raise NotFound(f"Docker network {network_id[:12]} {UNKNOWN}: remove it and create it again")
            unchanged = KeyIs(binding.key, binding.revision)
            bound = self._bindings[network_id] = Bound(Network.read(entry), unchanged)
        return bound

    def unbind(self, network_id: str) -> None:
        """The store says something else than `bound`: ask it anew."""
        self._bindings.pop(network_id, None)

    def interface_prefix(self, network_id: str) -> str:
        """What the name of an interface in a container begins with. The store is not needed for that."""
        bound, vni = self._bindings.get(network_id), self._cluster.bindings.get((self._host.id, network_id), 0)
        network = bound.network if bound else self._cluster.networks.get(vni)
        return (network and network.ifname) or _PREFIX


def cidr_of(network: Network, address: str) -> str:
    """The pool that the address is in; `InvalidRequest` if it is in none."""
    cidr = network.cidr_of(address)
    if cidr is None:
        raise InvalidRequest(f"address {address} is in none of the pools of {network.title}")
    return cidr


def keys_of(endpoint: Endpoint) -> tuple[str, str, str]:
    """What goes with an endpoint."""
    return endpoint.key, endpoint_names_key(endpoint.vni, endpoint.id), mac_key(endpoint.vni, endpoint.mac)


def forgotten(network: Network, endpoint: Endpoint) -> list[Write]:
    """Writes that delete an endpoint. Its addresses become pending: the engine releases them, or they are collected.

    Only with a condition that it is unchanged: if it is gone already, its MAC and addresses may be another's by now.
    """
    writes: list[Write] = [*map(Delete, keys_of(endpoint))]
    for address in endpoint.addresses:
        held = Allocation(cidr_of(network, address), address, endpoint.host)
        writes.append(Put(held.pending_key, ""))
    return writes
