"""Compares this host's part of the store with what its Docker Engine has: learns names, collects leftovers.

The engine never repeats a delete that failed or was never sent (it crashed, or we were down), so whatever only the
store knows is collected: networks, endpoints with their veths, addresses, pool reservations. Never while the engine
does not answer, and only after an object was missing for the whole grace period: what is being created is in the
store first and in Docker's lists a moment later. And never an endpoint whose veth is up at both ends: a container uses
it, so this engine is not the one that runs it, or lies.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address, ip_network
from time import monotonic
from typing import Protocol

from weft.cluster import Cluster
from weft.driver import Driver
from weft.errors import EngineError, WeftError
from weft.ipam import LOCAL_SPACE, Ipam, PoolId
from weft.model import (
    BINDINGS,
    POOLS,
    Binding,
    Endpoint,
    Host,
    Network,
    PoolClaim,
    network_key,
    pending_prefix,
    reading,
)
from weft.store import Entry, KeyIs, Put, Store

log = logging.getLogger(__name__)

_IDLE_SECONDS = 60.0
_RETRY_SECONDS = 2.0


class DockerNetwork(Protocol):
    """A network as the engine has it; see `engine.EngineNetwork`."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def subnets(self) -> Collection[str]: ...
    @property
    def endpoints(self) -> Collection[str]: ...
    @property
    def addresses(self) -> Collection[str]: ...


class Engine(Protocol):
    """What the collector asks of the Docker Engine. Both methods may raise `EngineError`."""

    def networks(self, ids: Collection[str], subnets: Collection[str]) -> Iterable[DockerNetwork]:
        """Those networks of these `ids` that exist, and all that have one of these subnets, whoever drives them."""
        ...

    def follow(self, changed: Callable[[], None]) -> None:
        """Call `changed` now and at every change of networks; ends only by an error."""
        ...


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
    """One per host.

    :param grace: seconds that Docker must not know an object before it is collected.
    """

    def __init__(
        self,
        store: Store,
        host: Host,
        cluster: Cluster,
        driver: Driver,
        ipam: Ipam,
        engine: Engine,
        *,
        grace: float,
    ) -> None:
        self._store = store
        self._me = host
        self._cluster = cluster
        self._driver = driver
        self._ipam = ipam
        self._engine = engine
        self._grace = grace
        self._first_missed: dict[tuple[str, int], float] = {}
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="collector", daemon=True)

    def start(self) -> None:
        threading.Thread(target=self._follow, name="engine-events", daemon=True).start()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout=5)

    def _follow(self) -> None:
        failing = False
        while not self._stopping.is_set():
            try:
                self._engine.follow(self._wake.set)
            except EngineError as error:
                if not failing:
                    log.warning("%s; names and clean-up wait for it", error)
                failing = True
            except Exception:
                log.exception("following the engine's events met a bug; trying again")
            self._stopping.wait(_RETRY_SECONDS)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(self._grace / 2 if self._first_missed else _IDLE_SECONDS)
            self._wake.clear()
            try:
                self.sweep()
            except WeftError as error:
                log.debug("no clean-up now: %s", error)
                # What was missing before the silence may be something else of that name after it.
                self._first_missed.clear()
            except Exception:
                log.exception("the collector met a bug")
                self._stopping.wait(_IDLE_SECONDS)

    def sweep(self) -> None:
        """Compare once; collect what has been missing for the grace period."""
        bindings = [Binding.read(e) for e in self._store.list(f"{BINDINGS}{self._me.id}/").entries]
        pools = self._store.list(POOLS).entries
        subnets = {entry.key.removeprefix(POOLS) for entry in pools}
        networks = {n.id: n for n in self._engine.networks({b.network_id for b in bindings}, subnets)}
        for binding in bindings:
            if binding.network_id in networks:
                self._learn_name(binding.vni, networks[binding.network_id].name)
        orphans = [*self._orphans(bindings, networks), *self._orphan_pools(pools, networks.values())]
        now = monotonic()
        self._first_missed = {orphan.key: self._first_missed.get(orphan.key, now) for orphan in orphans}
        for orphan in orphans:
            if now - self._first_missed[orphan.key] >= self._grace and not self._stopping.is_set():
                self._collect(orphan)

    def _collect(self, orphan: Orphan) -> None:
        log.warning("collecting %s: Docker does not have it", orphan.what)
        try:
            orphan.collect()
        except WeftError as error:
            log.warning("%s stays for now: %s", orphan.what, error)

    def _learn_name(self, vni: int, name: str) -> None:
        """The engine never tells the driver a network's name; the first host that learns it records it."""
        entry = self._store.get(network_key(vni))
        if entry and not (network := Network.read(entry)).name:
            self._store.transact(
                [KeyIs(entry.key, entry.revision)], [Put(entry.key, replace(network, name=name).encode())]
            )

    def _orphans(self, bindings: Iterable[Binding], networks: dict[str, DockerNetwork]) -> Iterator[Orphan]:
        for binding in bindings:
            found = networks.get(binding.network_id)
            local = self._cluster.local_endpoints(binding.vni, self._me.id)
            known = found.endpoints if found else ()
            missing = [e for e in local if e.id not in known]
            alive = [e for e in missing if self._driver.is_alive(e)]
            for endpoint in missing:
                if endpoint not in alive:
                    what = f"endpoint {endpoint.id[:12]} (VNI {binding.vni})"
                    yield Orphan(what, partial(self._collect_endpoint, binding.network_id, endpoint))
            if found is None and not alive:
                what = f"network {binding.network_id[:12]} (VNI {binding.vni})"
                yield Orphan(what, partial(self._driver.delete_network, binding.network_id))
        yield from self._orphan_addresses(networks.values())
        for vni in list(self._cluster.networks):
            if vni not in self._cluster.members:
                yield Orphan(f"network with VNI {vni}, which no host has", partial(self._driver.remove_unused, vni))

    def _orphan_addresses(self, networks: Iterable[DockerNetwork]) -> Iterator[Orphan]:
        prefix = pending_prefix(self._me.id)
        used = {(subnet, address) for n in networks for subnet in n.subnets for address in n.addresses}
        for entry in self._store.list(prefix).entries:
            with reading(entry.key):
                cidr, address = entry.key.removeprefix(prefix).rsplit("/", 1)
                ip_network(cidr), ip_address(address)
            if (cidr, address) not in used:
                what = f"address {address} of pool {cidr}"
                yield Orphan(what, partial(self._release, cidr, address), entry.revision)

    def _orphan_pools(self, pools: Iterable[Entry], networks: Iterable[DockerNetwork]) -> Iterator[Orphan]:
        used = {subnet for n in networks for subnet in n.subnets}
        for entry in pools:
            claim = PoolClaim.read(entry)
            if self._me.id in claim.users and claim.cidr not in used:
                release = partial(self._ipam.release_pool, ip_network(claim.cidr), entirely=True)
                yield Orphan(f"pool {claim.cidr}", release, entry.revision)

    def _collect_endpoint(self, network_id: str, endpoint: Endpoint) -> None:
        """Its addresses become pending, and are released here if Docker's own request for that does not come."""
        network = self._cluster.networks.get(endpoint.vni)
        self._driver.delete_endpoint(network_id, endpoint.id)
        for address in endpoint.addresses:
            if network and (cidr := network.cidr_of(address)):
                self._release(cidr, address)

    def _release(self, cidr: str, address: str) -> None:
        self._ipam.release_address(PoolId(LOCAL_SPACE, ip_network(cidr)), ip_address(address))
