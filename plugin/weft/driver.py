"""The network driver's use cases: what the engine asks, in domain words.

Every method decides what this host can decide alone, plus at most one store transaction that changes something; none
waits for another host or calls the Docker API. All are idempotent by the engine's ids. An error leaves nothing
behind, since the engine does not undo a call that failed (moby daemon/libnetwork/drivers/remote/driver.go).
What can fail is done in `create_endpoint`: from Engine 29 on, a failing Join costs the container its network.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from typing import Protocol

from weft.errors import Conflict, Exhausted, InvalidRequest, NotFound, WeftError
from weft.ipam import GLOBAL_SPACE, SPACES, Ipam, check_usable
from weft.model import (
    NETWORKS,
    POOLS,
    VNI_AUTO_MIN,
    VNI_MAX,
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
    network_key,
)
from weft.options import NetworkOptions, parse_options
from weft.store import Condition, Delete, DeleteAll, Entry, KeyIs, Listing, NoneNewer, Put, Store, Write

_ATTEMPTS = 50
"""Times that a transaction which lost a race is thought through again."""


class Attachments(Protocol):
    """What the driver needs of the data plane; see `attachments.Attachments`."""

    def check(self) -> None:
        """Raise `KernelError` if this host cannot make the devices of a network."""
        ...

    def largest_mtu(self) -> int:
        """The largest MTU that fits this host's underlay."""
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
    """`addresses` as IPAM gave them, plain; `mac` as the user gave it, or ""."""

    network_id: str
    endpoint_id: str
    addresses: tuple[str, ...]
    mac: str


class Driver:
    """The driver of one host.

    :param name: what users type after `-d`, for commands in messages.
    """

    def __init__(
        self,
        store: Store,
        host: Host,
        ipam: Ipam,
        attachments: Attachments,
        *,
        name: str = "weft",
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._host = host
        self._ipam = ipam
        self._attachments = attachments
        self._name = name
        self._random = rng or random.Random()

    # Networks

    def create_network(self, request: NetworkRequest) -> Network:
        """Make the network, or join the one that owns its pools (or has its VNI) if they are compatible."""
        self._check_request(request)
        self._attachments.check()
        for _ in range(_ATTEMPTS):
            bound = self._bound(request.network_id)
            if bound is not None:
                self._check_compatible(bound, request)
                return bound
            pools = self._store.list(POOLS)
            owner = self._owner(request, pools)
            made = self._found(request, pools) if owner is None else self._join_network(owner, request)
            if made is not None:
                return made
        raise Conflict("too many hosts are changing this network at once: try again")

    def delete_network(self, network_id: str) -> None:
        """Forget this host's part; the last host's part takes the network, its pools and its addresses along."""
        binding = self._store.get(binding_key(self._host.id, network_id))
        if binding is None:
            return
        vni = Binding.read(binding).vni
        for endpoint in self._endpoints(vni):
            if endpoint.host == self._host.id:
                self._attachments.detach(endpoint.id)
                self._forget(endpoint)
        self._store.transact([], [Delete(binding.key), Delete(Member(vni, self._host.id, network_id).key)])
        self.remove_unused(vni)

    def remove_unused(self, vni: int) -> bool:
        """Remove a network that no host's engine has any more."""
        entry = self._store.get(network_key(vni))
        if entry is None:
            return False
        network = Network.read(entry)
        prefixes = endpoints_prefix(vni), endpoint_names_prefix(vni), mac_key(vni, "")
        writes: list[Write] = [Delete(entry.key), *map(DeleteAll, prefixes)]
        unused: list[Condition] = [NoneNewer(members_prefix(vni), 0), KeyIs(entry.key, entry.revision)]
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
        networks = [Network.read(entry) for entry in self._store.list(NETWORKS).entries]
        found = [n for n in networks if name_or_vni in (str(n.vni), n.name)]
        if len(found) == 1:
            return found[0]
        if found:
            vnis = ", ".join(str(n.vni) for n in found)
            raise Conflict(f"several networks are called {name_or_vni}: name one by its VNI ({vnis})")
        known = ", ".join(sorted(n.name or str(n.vni) for n in networks)) or "none"
        raise NotFound(f"there is no weft network {name_or_vni!r} (known: {known})")

    def allocate_network(self, options: Mapping[str, str]) -> dict[str, str]:
        """Options for a Swarm network's nodes: the user's, and the VNI that all nodes are to use.

        What a Swarm manager gets back here replaces the user's options (moby cnmallocator).
        """
        asked = parse_options(options)
        return {**options, "weft.vni": str(asked.vni or self._free_vni())}

    # Endpoints

    def create_endpoint(self, request: EndpointRequest) -> Endpoint:
        """Record the endpoint, take over its addresses, and make its veth."""
        network = self._network(request.network_id)
        endpoint = self._endpoint_of(network, request)
        fresh = self._record(network, endpoint)
        try:
            self._attachments.attach(network, endpoint)
        except WeftError:
            if fresh:
                self._forget(endpoint)
            raise
        return endpoint

    def join(self, network_id: str, endpoint_id: str) -> str:
        """Name of the interface that the engine is to move into the container."""
        # Most often the veth is there, and no store is needed: a Join that fails costs the container its network.
        if name := self._attachments.attached(endpoint_id):
            return name
        network = self._network(network_id)
        entry = self._store.get(endpoint_key(network.vni, endpoint_id))
        if entry is None:
            raise NotFound(f"endpoint {endpoint_id[:12]} of {network.title} is not known to weft")
        return self._attachments.attach(network, Endpoint.read(entry))

    def is_alive(self, endpoint: Endpoint) -> bool:
        """True if a running container uses the endpoint's veth."""
        return self._attachments.is_alive(endpoint.id)

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
        network = self._bound(network_id)
        entry = self._store.get(endpoint_key(network.vni, endpoint_id)) if network else None
        if entry is not None:
            self._forget(Endpoint.read(entry))

    def drop_writes(self, endpoint: Endpoint) -> list[Write]:
        """Writes that take away an endpoint of a host that is gone, with its addresses."""
        writes: list[Write] = [*map(Delete, _keys_of(endpoint))]
        entry = self._store.get(network_key(endpoint.vni))
        network = Network.read(entry) if entry else None
        for address in endpoint.addresses:
            cidr = network.cidr_of(address) if network else None
            held = self._store.get(address_key(cidr, address)) if cidr else None
            if held and Allocation.read(held).space != GLOBAL_SPACE:  # else Swarm takes it back
                writes.append(Delete(held.key))
        return writes

    # Creating a network

    def _check_request(self, request: NetworkRequest) -> None:
        if not request.pools:
            raise InvalidRequest("the network has no subnet: weft needs at least one IPv4 or IPv6 pool")
        for one in request.pools:
            if one.space not in SPACES:
                raise InvalidRequest(
                    f"addresses come from another IPAM driver ({one.space or 'none'}), which would give two hosts the "
                    f"same address: type docker network create -d {self._name} --ipam-driver {self._name} "
                    f"--subnet {one.pool.cidr} NAME"
                )
            self._check_pool(one.pool)
        self._check_disjoint([ip_network(one.pool.cidr) for one in request.pools])
        largest = self._attachments.largest_mtu()
        if request.options.mtu and request.options.mtu > largest:
            raise InvalidRequest(
                f"option mtu={request.options.mtu} does not fit this host's underlay: {largest} is the most"
            )

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
        cidrs = {one.pool.cidr for one in request.pools}
        claims = (PoolClaim.read(entry) for entry in pools.entries)
        vnis = {claim.vni for claim in claims if claim.vni and claim.cidr in cidrs}
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
        )
        for pool in network.pools:
            self._ipam.refuse_overlap(ip_network(pool.cidr), pools.entries)
        writes: list[Write] = [Put(network.key, network.encode()), *self._membership(network, request.network_id)]
        for pool in network.pools:
            writes += self._owned(pool, network.vni, pools)
        # Nobody has claimed a pool since they were looked at, or this is thought through again.
        unchanged: list[Condition] = [KeyIs(network.key, 0), NoneNewer(POOLS, pools.revision)]
        return network if self._store.transact(unchanged, writes) else None

    def _join_network(self, owner: Entry, request: NetworkRequest) -> Network | None:
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
        largest = self._attachments.largest_mtu()
        if network.mtu > largest:
            wrong.append(f"its mtu is {network.mtu}, but {largest} is the most that this host's underlay carries")
        if options.vni not in (None, network.vni):
            wrong.append(f"its VNI is {network.vni}, not {options.vni}")
        if options.mtu not in (None, network.mtu):
            wrong.append(f"its mtu is {network.mtu or 'automatic'}, not {options.mtu}")
        if request.internal != network.internal:
            wrong.append("it is internal" if network.internal else "it is not internal")
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
        claims = (PoolClaim.read(entry) for entry in pools.entries)
        before = next((claim for claim in claims if claim.cidr == pool.cidr), PoolClaim(pool.cidr))
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
            vni = self._random.randint(VNI_AUTO_MIN, VNI_MAX)
            if self._store.get(network_key(vni)) is None:
                return vni
        raise Exhausted("no free VNI was found: choose one with -o weft.vni=NUMBER")

    def _titles(self, vnis: Iterable[int]) -> str:
        entries = {vni: self._store.get(network_key(vni)) for vni in sorted(vnis)}
        return ", ".join(Network.read(e).title if e else f"VNI {vni}" for vni, e in entries.items())

    def _bound(self, network_id: str) -> Network | None:
        binding = self._store.get(binding_key(self._host.id, network_id))
        entry = self._store.get(network_key(Binding.read(binding).vni)) if binding else None
        return Network.read(entry) if entry else None

    def _network(self, network_id: str) -> Network:
        network = self._bound(network_id)
        if network is None:
            raise NotFound(f"Docker network {network_id[:12]} is not known to weft: remove it and create it again")
        return network

    # Creating an endpoint

    def _endpoint_of(self, network: Network, request: EndpointRequest) -> Endpoint:
        if not request.addresses:
            raise InvalidRequest(f"endpoint {request.endpoint_id[:12]} has no address: weft's IPAM must give it one")
        for address in request.addresses:
            check_usable(ip_network(self._cidr_of(network, address)), ip_address(address))
        return Endpoint(
            id=request.endpoint_id,
            vni=network.vni,
            mac=request.mac or mac_of(request.addresses[0]),
            addresses=request.addresses,
            host=self._host.id,
        )

    def _cidr_of(self, network: Network, address: str) -> str:
        cidr = network.cidr_of(address)
        if cidr is None:
            raise InvalidRequest(f"address {address} is in none of the pools of {network.title}")
        return cidr

    def _record(self, network: Network, endpoint: Endpoint) -> bool:
        """Write the endpoint and make its addresses and MAC its own; False if that was done before."""
        for _ in range(_ATTEMPTS):
            present = self._store.get(endpoint.key)
            if present is not None:
                if Endpoint.read(present) == endpoint:
                    return False
                raise Conflict(f"endpoint {endpoint.id[:12]} of {network.title} exists with other addresses")
            conditions: list[Condition] = [KeyIs(endpoint.key, 0)]
            writes: list[Write] = [Put(endpoint.key, endpoint.encode())]
            for address in endpoint.addresses:
                self._take_over(network, endpoint, address, conditions, writes)
            self._take_mac(network, endpoint, conditions, writes)
            if self._store.transact(conditions, writes):
                return True
        raise Conflict(f"endpoint {endpoint.id[:12]} of {network.title} is being changed by others: try again")

    def _take_over(
        self, network: Network, endpoint: Endpoint, address: str, conditions: list[Condition], writes: list[Write]
    ) -> None:
        """Add what makes an address that IPAM gave to this host the endpoint's own."""
        held = Allocation(self._cidr_of(network, address), address, self._host.id, endpoint=endpoint.id)
        entry = self._store.get(held.key)
        if entry is not None:
            before = Allocation.read(entry)
            self._check_allocation(network, before, endpoint)
            held = replace(held, space=before.space)
        conditions.append(KeyIs(held.key, entry.revision if entry else 0))
        writes += [Put(held.key, held.encode()), Delete(held.pending_key)]

    def _check_allocation(self, network: Network, held: Allocation, endpoint: Endpoint) -> None:
        if held.kind != "endpoint":
            raise Conflict(f"address {held.address} is the {held.kind} address of {network.title}")
        holder = held.endpoint if held.endpoint != endpoint.id else ""
        if holder and self._store.get(endpoint_key(network.vni, holder)):
            raise Conflict(f"address {held.address} of {network.title} is in use by endpoint {holder[:12]}")
        if held.host != self._host.id and held.space != GLOBAL_SPACE:
            raise Conflict(f"address {held.address} of {network.title} was given to another host")

    def _take_mac(self, network: Network, endpoint: Endpoint, conditions: list[Condition], writes: list[Write]) -> None:
        key = mac_key(network.vni, endpoint.mac)
        entry = self._store.get(key)
        if entry is not None and self._store.get(endpoint_key(network.vni, entry.value)):
            raise Conflict(
                f"MAC address {endpoint.mac} of {network.title} is in use by endpoint {entry.value[:12]}: give another"
            )
        conditions.append(KeyIs(key, entry.revision if entry else 0))
        writes.append(Put(key, endpoint.id))

    def _forget(self, endpoint: Endpoint) -> None:
        """Delete the record; its addresses become pending: the engine releases them next, or they are collected."""
        writes: list[Write] = [*map(Delete, _keys_of(endpoint))]
        entry = self._store.get(network_key(endpoint.vni))
        if entry is not None:
            network = Network.read(entry)
            for address in endpoint.addresses:
                held = Allocation(self._cidr_of(network, address), address, endpoint.host)
                writes.append(Put(held.pending_key, ""))
        # Unless it is gone already: its MAC and addresses may be another's by now.
        present = self._store.get(endpoint.key)
        if present is not None:
            self._store.transact([KeyIs(endpoint.key, present.revision)], writes)

    def _endpoints(self, vni: int) -> list[Endpoint]:
        return [Endpoint.read(entry) for entry in self._store.list(endpoints_prefix(vni)).entries]


def _keys_of(endpoint: Endpoint) -> tuple[str, str, str]:
    """What goes with an endpoint."""
    return endpoint.key, endpoint_names_key(endpoint.vni, endpoint.id), mac_key(endpoint.vni, endpoint.mac)


def mac_of(address: str) -> str:
    """The MAC of an address: 02:42 (locally administered, as Docker's own) and its last four bytes.

    An address that moves to another host or container keeps its MAC, so no cache anywhere goes stale.
    """
    return (b"\x02\x42" + ip_address(address).packed[-4:]).hex(":")
