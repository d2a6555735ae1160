"""The network driver's use cases for endpoints: what the engine asks, in domain words.

Every method decides what this host can decide alone, plus at most one store transaction that changes something; none
waits for another host or calls the Docker API. All are idempotent by the engine's ids. An error leaves nothing
behind, since the engine does not undo a call that failed (moby daemon/libnetwork/drivers/remote/driver.go).
What can fail is done in `create_endpoint`: from Engine 29 on, a failing Join costs the container its network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from typing import Protocol

from weft.cluster import Cluster
from weft.dataplane import Port
from weft.errors import UNKNOWN, Conflict, InvalidRequest, NotFound, Taken, WeftError
from weft.ipam import GLOBAL_SPACE, LOCAL_SPACE, Ipam, check_usable
from weft.model import MACS, Allocation, Endpoint, Host, Network, address_key, endpoint_key, mac_key, network_key
from weft.networks import ATTEMPTS, Networks, cidr_of, forgotten, keys_of
from weft.store import Condition, Delete, Entry, KeyIs, Put, Store, ValueIs, Write


class Attachments(Protocol):
    """What is needed of the data plane; see `attachments.Attachments`."""

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
class EndpointRequest:
    """`addresses` as IPAM gave them, plain; `mac` as the user gave it, or ""; `rate` in bit/s, 0: no limit, None: the
    network's."""

    network_id: str
    endpoint_id: str
    addresses: tuple[str, ...]
    mac: str
    rate: int | None = None


class Driver:
    """The endpoints of one host's engine."""

    def __init__(
        self, store: Store, host: Host, ipam: Ipam, attachments: Attachments, cluster: Cluster, networks: Networks
    ) -> None:
        self._store = store
        self._host = host
        self._ipam = ipam
        self._attachments = attachments
        self._cluster = cluster
        self.networks = networks

    def create_endpoint(self, request: EndpointRequest) -> Endpoint:
        """Record the endpoint, take over its addresses, and make its veth."""
        network = self.networks.bound(request.network_id).network
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
        network = self.networks.bound(network_id).network
        entry = self._store.get(endpoint_key(network.vni, endpoint_id))
        if entry is None:
            raise NotFound(f"endpoint {endpoint_id[:12]} of {network.title} {UNKNOWN}")
        return self._attachments.attach(network, Endpoint.read(entry))

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
            network = self.networks.bound(network_id).network
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
        writes: list[Write] = [Delete(one) for one in keys_of(endpoint) if not one.startswith(MACS)]
        present = self._store.get(network_key(endpoint.vni))
        cidrs = {a: Network.read(present).cidr_of(a) for a in endpoint.addresses} if present else {}
        addresses = [address_key(cidr, address) for address, cidr in cidrs.items() if cidr]
        for held in self._store.get_many([mac_key(endpoint.vni, endpoint.mac), *addresses]).values():
            if _holder(held) == endpoint.id:
                conditions.append(KeyIs(held.key, held.revision))
                writes.append(Delete(held.key))
        return self._store.transact(conditions, writes)

    def _endpoint_of(self, network: Network, request: EndpointRequest) -> Endpoint:
        if not request.addresses:
            raise InvalidRequest(f"endpoint {request.endpoint_id[:12]} has no address: weft's IPAM must give it one")
        for address in request.addresses:
            check_usable(ip_network(cidr_of(network, address)), ip_address(address))
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

    def _record(self, network_id: str, network: Network, endpoint: Endpoint) -> bool:
        """Write the endpoint and make its addresses and MAC its own; False if that was done before.

        The first guess is that nobody has the endpoint or the MAC, and that the addresses are as RequestAddress left
        them; what comes back of a wrong one is thought through.
        """
        mac = mac_key(network.vni, endpoint.mac)
        pools = [(cidr_of(network, address), address) for address in endpoint.addresses]
        given = [Allocation(*one, self._host.id, endpoint=endpoint.id) for one in pools]
        held = [replace(one, space=LOCAL_SPACE) for one in given]
        as_given = [ValueIs(one.key, replace(one, endpoint="").encode()) for one in held]
        conditions: list[Condition] = [KeyIs(endpoint.key, 0), KeyIs(mac, 0), *as_given]
        for _ in range(ATTEMPTS):
            bound = self.networks.bound(network_id).unchanged
            writes: list[Write] = [Put(endpoint.key, endpoint.encode()), Put(mac, endpoint.id)]
            for one in held:
                writes += [Put(one.key, one.encode()), Delete(one.pending_key)]
            keys = [endpoint.key, mac, *(one.key for one in given)]
            found = self._store.attempt([bound, *conditions], writes, [*keys, bound.key])
            if found is None:
                return True
            if _revision(found, bound.key) != bound.revision:
                self.networks.unbind(network_id)
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
            who = self._ipam.endpoint_name(network.vni, holder)
            where = self._ipam.host_name(held.host)
            raise Taken(f"address {held.address} of {network.title} is in use by {who} on host {where}")
        if held.host != self._host.id and held.space != GLOBAL_SPACE:
            where = self._ipam.host_name(held.host)
            raise Taken(f"address {held.address} of {network.title} was given to another host, {where}")

    def _check_mac(self, network: Network, endpoint: Endpoint, entry: Entry | None) -> None:
        holder = self._store.get(endpoint_key(network.vni, entry.value)) if entry else None
        if entry and holder:
            who = self._ipam.endpoint_name(network.vni, entry.value)
            where = self._ipam.host_name(Endpoint.read(holder).host)
            raise Taken(f"MAC address {endpoint.mac} of {network.title} is in use by {who} on host {where}")

    def _forget(self, network: Network, endpoint: Endpoint, unchanged: Condition) -> bool:
        return self._store.transact([unchanged], forgotten(network, endpoint))


def _revision(found: Mapping[str, Entry], key: str) -> int:
    """Of a key among those that were looked for; 0 if it is absent."""
    return found[key].revision if key in found else 0


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
