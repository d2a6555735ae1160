"""The network driver's use cases: what the engine asks, in domain words.

Every method decides what this host can decide alone, plus at most one store transaction that changes something; none
waits for another host or calls the Docker API. All are idempotent by the engine's ids. An error leaves nothing
behind, since the engine does not undo a call that failed (moby daemon/libnetwork/drivers/remote/driver.go).
What can fail is done in `create_endpoint`: from Engine 29 on, a failing Join costs the container its network.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address, ip_network
from typing import Protocol

from weft.cluster import Cluster
from weft.dataplane import IPV6_MIN_MTU, Port
from weft.errors import UNKNOWN, Conflict, Exhausted, InvalidRequest, NotFound, Taken, WeftError
from weft.ipam import GLOBAL_SPACE, LOCAL_SPACE, SPACES, Ipam, check_usable
from weft.model import (
    MACS,
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
    address_key,
    binding_key,
    endpoint_key,
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
from weft.store import Condition, Delete, DeleteAll, Entry, KeyIs, Listing, NoneNewer, Put, Store, ValueIs, Write
from weft.topology import Limit

NOT_IN_SWARM = (
    "option weft.network is not for Docker Swarm, whose networks are on all nodes by themselves: "
    "type the --subnet of the network instead, or leave it out"
)
_PREFIX = "eth"
"""Of interfaces, as with Docker's own networks."""
_ATTEMPTS = 50
"""Times that a transaction which lost a race is thought through again."""


class Attachments(Protocol):
    """What the driver needs of the data plane; see `attachments.Attachments`."""

    def check(self, *, encrypted: bool = False) -> None:
        """Raise an error if this host cannot make the devices of a network, or not of one that is encrypted."""
        ...

    def limit(self, *, encrypted: bool = False, here: bool = False) -> Limit:
        """The largest MTU that a network can have on all hosts, or on this one."""
        ...

    def check_port(self, port: int, *, encrypted: bool) -> None:
        """Raise `Conflict` if something else has the UDP port here, or as WireGuard on another host."""
        ...

    def mtu(self, network: Network) -> int:
        """The MTU of an endpoint that is made now."""
        ...

    def port(self, endpoint_id: str) -> Port | None:
        """The endpoint's veth as it is, if it is there."""
        ...

    def pin(self, endpoint: Endpoint) -> bool:
        """Claim what the endpoint needs in the data plane until the agent has seen it in the store; False if it has, or
        that was done before. `Conflict` if another endpoint of this host has an interface of the same name."""
        ...

    def unpin(self, endpoint_id: str) -> None:
        """Give that up."""
        ...

    def attach(self, network: Network, endpoint: Endpoint) -> str:
        """Make sure the network's devices and the endpoint's veth exist; return the name of the container's end."""
        ...

    def attached(self, endpoint_id: str) -> str | None:
        """Name of the container's end if the endpoint's veth exists."""
        ...

    def is_alive(self, endpoint_id: str) -> bool:
        """True if both ends of the endpoint's veth are up."""
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
class EndpointRequest:
    """`addresses` as IPAM gave them, plain; `mac` as the user gave it, or ""; `rate` in bit/s, 0: no limit, None: the
    network's."""

    network_id: str
    endpoint_id: str
    addresses: tuple[str, ...]
    mac: str
    rate: int | None = None


@dataclass(frozen=True, slots=True)
class _Bound:
    """The network that an id of this engine stands for, and the condition that it still does."""

    network: Network
    unchanged: KeyIs


class Driver:
    """The driver of one host.

    :param name: what users type after `-d`, for commands in messages.
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
        name: str = "weft",
        mirror: bool = True,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._host = host
        self._ipam = ipam
        self._attachments = attachments
        self._cluster = cluster
        self.name = name
        self._mirror = mirror
        self._bindings: dict[str, _Bound] = {}
        """By this engine's NetworkID."""
        self._generations: dict[str, int] = {}
        """What those networks were when this host joined them, by NetworkID."""
        self._expected: Network | None = None
        self._mirrored: set[str] = set()
        """NetworkIDs that the mirror makes or removes: their DeleteNetwork is not a user's."""
        self._random = rng or random.Random()

    # Networks

    def create_network(self, request: NetworkRequest, *, revive: bool = True) -> Network:
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
        for _ in range(_ATTEMPTS):
            self._bindings.pop(request.network_id, None)  # the cluster may have forgotten this host
            with suppress(NotFound):
                network = self._bound(request.network_id).network
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
        return partial(self._leave, network_id, retire=self._generation(network_id) if meant else None)

    def delete_network(self, network_id: str) -> None:
        """See `deletion`."""
        self.deletion(network_id)()

    def forget_network(self, network_id: str) -> None:
        """Forget this host's part of a network that nobody meant to remove."""
        self._leave(network_id, retire=None)

    def keeps(self, network: Network) -> bool:
        """True if a network stays though no engine has it: this host's mirror is about to make it."""
        return self._mirror and network.wanted

    def _generation(self, network_id: str) -> int | None:
        """The network's as far as this host knows: the store may be away."""
        network = self._cluster.networks.get(self._cluster.bindings.get((self._host.id, network_id), 0))
        joined = self._generations.get(network_id)
        return joined if network is None else max(network.generation, joined or 0)

    def _leave(self, network_id: str, *, retire: int | None) -> None:
        """Forget this host's part of a network, which retires if it still is of this generation."""
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
                self._forget(Network.read(present), endpoint, KeyIs(entry.key, entry.revision))
        while not self._drop_membership(binding.key, Member(vni, self._host.id, network_id), retire):
            pass  # somebody changed the network
        self.remove_unused(vni)

    def _drop_membership(self, binding: str, member: Member, retire: int | None) -> bool:
        writes: list[Write] = [Delete(binding), Delete(member.key)]
        entry = self._store.get(network_key(member.vni))
        network = Network.read(entry) if entry else None
        if entry is None or network is None or not network.wanted or network.generation != retire:
            return self._store.transact([], writes)
        writes.append(Put(entry.key, replace(network, retired=True).encode()))
        return self._store.transact([KeyIs(entry.key, entry.revision)], writes)

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

    def find_network(self, name_or_vni: str) -> Network:
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

    def allocate_network(self, options: Mapping[str, str], pools: Sequence[IPNetwork]) -> dict[str, str]:
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

    # Endpoints

    def create_endpoint(self, request: EndpointRequest) -> Endpoint:
        """Record the endpoint, take over its addresses, and make its veth."""
        network = self._bound(request.network_id).network
        endpoint = self._endpoint_of(network, request)
        pinned = self._attachments.pin(endpoint)
        try:
            fresh = self._record(request.network_id, network, endpoint)
        except WeftError:
            if pinned:
                self._attachments.unpin(endpoint.id)
            raise
        try:
            self._attachments.attach(network, endpoint)
        except WeftError:
            if fresh:
                self.forget_endpoint(request.network_id, endpoint.id)
            raise
        return endpoint

    def join(self, network_id: str, endpoint_id: str) -> str:
        """Name of the interface that the engine is to move into the container."""
        # Most often the veth is there, and no store is needed: a Join that fails costs the container its network.
        if name := self._attachments.attached(endpoint_id):
            return name
        network = self._bound(network_id).network
        entry = self._store.get(endpoint_key(network.vni, endpoint_id))
        if entry is None:
            raise NotFound(f"endpoint {endpoint_id[:12]} of {network.title} {UNKNOWN}")
        return self._attachments.attach(network, Endpoint.read(entry))

    def interface_prefix(self, network_id: str) -> str:
        """What the name of an interface in a container begins with. The store is not needed for that."""
        bound, vni = self._bindings.get(network_id), self._cluster.bindings.get((self._host.id, network_id), 0)
        network = bound.network if bound else self._cluster.networks.get(vni)
        return (network and network.ifname) or _PREFIX

    def is_alive(self, endpoint_id: str) -> bool:
        """True if a running container uses the endpoint's veth."""
        return self._attachments.is_alive(endpoint_id)

    def delete_endpoint(self, network_id: str, endpoint_id: str) -> None:
        """Remove the endpoint's veth and forget it. Its addresses stay taken until they are released."""
        try:
            self.detach(endpoint_id)
        finally:
            self.forget_endpoint(network_id, endpoint_id)

    def detach(self, endpoint_id: str) -> None:
        """Remove the endpoint's veth; the store is not needed for that."""
        self._attachments.detach(endpoint_id)

    def forget_endpoint(self, network_id: str, endpoint_id: str) -> None:
        """Delete the record; its addresses become pending: the engine releases them next, or they are collected."""
        with suppress(NotFound):
            network = self._bound(network_id).network
            known = self._cluster.endpoints.get(network.vni, {}).get(endpoint_id)
            if known and self._forget(network, known, ValueIs(known.key, known.encode())):
                return  # it was as the mirror has it
            if entry := self._store.get(endpoint_key(network.vni, endpoint_id)):
                self._forget(network, Endpoint.read(entry), KeyIs(entry.key, entry.revision))

    def drop_endpoint(self, key: str, gone: Condition) -> bool:
        """Take away the endpoint at a key of the store, of a host that is `gone`, with what is its own and no other's.

        False if something changed meanwhile, or the host is not gone.
        """
        entry = self._store.get(key)
        if entry is None:
            return True
        endpoint = Endpoint.read(entry)
        conditions = [gone, KeyIs(entry.key, entry.revision)]
        writes: list[Write] = [Delete(one) for one in _keys_of(endpoint) if not one.startswith(MACS)]
        present = self._store.get(network_key(endpoint.vni))
        cidrs = {a: Network.read(present).cidr_of(a) for a in endpoint.addresses} if present else {}
        addresses = [address_key(cidr, address) for address, cidr in cidrs.items() if cidr]
        for held in self._store.get_many([mac_key(endpoint.vni, endpoint.mac), *addresses]).values():
            if _holder(held) == endpoint.id:
                conditions.append(KeyIs(held.key, held.revision))
                writes.append(Delete(held.key))
        return self._store.transact(conditions, writes)

    # Creating a network

    def _check_request(self, request: NetworkRequest) -> None:
        if not request.pools:
            raise InvalidRequest("the network has no subnet: weft needs at least one IPv4 or IPv6 pool")
        for one in request.pools:
            if one.space not in SPACES:
                raise InvalidRequest(
                    f"addresses come from another IPAM driver ({one.space or 'none'}), which would give two hosts the "
                    f"same address: type docker network create -d {self.name} --ipam-driver {self.name} "
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
            vnis.add(self.find_network(options.network).vni)
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
        for _ in range(_ATTEMPTS):
            vni = self._random.randint(VNI_AUTO_MIN, VNI_USER_MAX)
            if self._store.get(network_key(vni)) is None:
                return vni
        raise Exhausted("no free VNI was found: choose one with -o weft.vni=NUMBER")

    def _titles(self, vnis: Iterable[int]) -> str:
        entries = {vni: self._store.get(network_key(vni)) for vni in sorted(vnis)}
        return ", ".join(Network.read(e).title if e else f"VNI {vni}" for vni, e in entries.items())

    def _bound(self, network_id: str) -> _Bound:
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
            bound = self._bindings[network_id] = _Bound(Network.read(entry), unchanged)
        return bound

    # Creating an endpoint

    def _endpoint_of(self, network: Network, request: EndpointRequest) -> Endpoint:
        if not request.addresses:
            raise InvalidRequest(f"endpoint {request.endpoint_id[:12]} has no address: weft's IPAM must give it one")
        for address in request.addresses:
            check_usable(ip_network(self._cidr_of(network, address)), ip_address(address))
        port = self._attachments.port(request.endpoint_id)  # of one that the store has lost: it keeps what it has
        rate = network.rate if request.rate is None else request.rate
        return Endpoint(
            id=request.endpoint_id,
            vni=network.vni,
            mac=request.mac or mac_of(request.addresses[0]),
            addresses=request.addresses,
            host=self._host.id,
            mtu=port.mtu if port else self._attachments.mtu(network),
            rate=port.rate if port else rate,
        )

    def _cidr_of(self, network: Network, address: str) -> str:
        cidr = network.cidr_of(address)
        if cidr is None:
            raise InvalidRequest(f"address {address} is in none of the pools of {network.title}")
        return cidr

    def _record(self, network_id: str, network: Network, endpoint: Endpoint) -> bool:
        """Write the endpoint and make its addresses and MAC its own; False if that was done before.

        The first guess is that nobody has the endpoint or the MAC, and that the addresses are as RequestAddress left
        them; what comes back of a wrong one is thought through.
        """
        mac = mac_key(network.vni, endpoint.mac)
        pools = [(self._cidr_of(network, address), address) for address in endpoint.addresses]
        given = [Allocation(*one, self._host.id, endpoint=endpoint.id) for one in pools]
        held = [replace(one, space=LOCAL_SPACE) for one in given]
        as_given = [ValueIs(one.key, replace(one, endpoint="").encode()) for one in held]
        conditions: list[Condition] = [KeyIs(endpoint.key, 0), KeyIs(mac, 0), *as_given]
        for _ in range(_ATTEMPTS):
            bound = self._bound(network_id).unchanged
            writes: list[Write] = [Put(endpoint.key, endpoint.encode()), Put(mac, endpoint.id)]
            for one in held:
                writes += [Put(one.key, one.encode()), Delete(one.pending_key)]
            keys = [endpoint.key, mac, *(one.key for one in given)]
            found = self._store.attempt([bound, *conditions], writes, [*keys, bound.key])
            if found is None:
                return True
            if _revision(found, bound.key) != bound.revision:
                self._bindings.pop(network_id, None)
            if present := found.get(endpoint.key):
                if replace(Endpoint.read(present), mtu=endpoint.mtu, rate=endpoint.rate) == endpoint:
                    return False
                raise Conflict(f"endpoint {endpoint.id[:12]} of {network.title} exists with other addresses")
            held = [self._taken_over(network, endpoint, one, found.get(one.key)) for one in given]
            self._check_mac(network, endpoint, found.get(mac))
            conditions = [KeyIs(key, _revision(found, key)) for key in keys]
        raise Conflict(f"endpoint {endpoint.id[:12]} of {network.title} is being changed by others: try again")

    def _taken_over(self, network: Network, endpoint: Endpoint, given: Allocation, entry: Entry | None) -> Allocation:
        """What makes an address that IPAM gave to this host the endpoint's own."""
        if entry is None:
            return given
        before = Allocation.read(entry)
        self._check_allocation(network, before, endpoint)
        return replace(given, space=before.space)

    def _check_allocation(self, network: Network, held: Allocation, endpoint: Endpoint) -> None:
        if held.kind != "endpoint":
            raise Taken(f"address {held.address} is the {held.kind} address of {network.title}")
        holder = held.endpoint if held.endpoint != endpoint.id else ""
        if holder and self._store.get(endpoint_key(network.vni, holder)):
            where = self._ipam.host_name(held.host)
            raise Taken(
                f"address {held.address} of {network.title} is in use by endpoint {holder[:12]} on host {where}"
            )
        if held.host != self._host.id and held.space != GLOBAL_SPACE:
            where = self._ipam.host_name(held.host)
            raise Taken(f"address {held.address} of {network.title} was given to another host, {where}")

    def _check_mac(self, network: Network, endpoint: Endpoint, entry: Entry | None) -> None:
        if entry is not None and self._store.get(endpoint_key(network.vni, entry.value)):
            raise Taken(
                f"MAC address {endpoint.mac} of {network.title} is in use by endpoint {entry.value[:12]}: give another"
            )

    def _forget(self, network: Network, endpoint: Endpoint, unchanged: Condition) -> bool:
        """False unless it is `unchanged`: if it is gone already, its MAC and addresses may be another's by now."""
        writes: list[Write] = [*map(Delete, _keys_of(endpoint))]
        for address in endpoint.addresses:
            held = Allocation(self._cidr_of(network, address), address, endpoint.host)
            writes.append(Put(held.pending_key, ""))
        return self._store.transact([unchanged], writes)


def _revision(found: Mapping[str, Entry], key: str) -> int:
    """Of a key among those that were looked for; 0 if it is absent."""
    return found[key].revision if key in found else 0


def _keys_of(endpoint: Endpoint) -> tuple[str, str, str]:
    """What goes with an endpoint."""
    return endpoint.key, endpoint_names_key(endpoint.vni, endpoint.id), mac_key(endpoint.vni, endpoint.mac)


def _holder(entry: Entry) -> str:
    """The endpoint that a MAC or an address belongs to; none if Swarm gave the address, and takes it back itself."""
    if entry.key.startswith(MACS):
        return entry.value
    allocation = Allocation.read(entry)
    return allocation.endpoint if allocation.space != GLOBAL_SPACE else ""


def mac_of(address: str) -> str:
    """The MAC of an address: 02:42 (locally administered, as Docker's own) and its last four bytes.

    An address that moves to another host or container keeps its MAC, so no cache anywhere goes stale. Of an IPv6
    address with more than four bytes after the subnet it is a hash: another one may have the same last four.
    """
    packed = ip_address(address).packed
    last = packed[-4:] if not any(packed[-8:-4]) else hashlib.sha256(packed).digest()[:4]
    return (b"\x02\x42" + last).hex(":")
