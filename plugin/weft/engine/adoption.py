"""The opposite of collecting: what Docker has here and the store has not is found again.

That happens when the store was lost or restored from an older backup, or when the cluster has forgotten a host that was
cut off and now returns. A network is made again as the engine once asked for it: it joins the network that has its
subnets, or founds it. Then its endpoints, as far as a running container uses them, are recorded with their addresses.
An address that was given to somebody else meanwhile cannot be used by two: the container here loses its connection,
but only after its holder had the time to be collected. A restored backup has holders that are long gone.

Only what was missing from the store for a while is adopted: what is made or removed right now is in one of the two a
moment before the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address, ip_network

from weft.cluster import Cluster
from weft.driver import Driver, EndpointRequest
from weft.engine.inventory import DockerEndpoint, DockerNetwork, Inventory
from weft.engine.sweeper import Outcome, Patience
from weft.errors import Conflict, Taken, WeftError
from weft.ipam import LOCAL_SPACE, Ipam, PoolId
from weft.model import Host, Network, Pool, binding_key, endpoint_key
from weft.networks import NetworkRequest, PoolRequest
from weft.options import parse_options
from weft.store import Entry, Store

log = logging.getLogger(__name__)

_GRACE_SECONDS = 1.5
_RETRY_SECONDS = 10.0
MARGIN_SECONDS = 10.0
"""For what any host's collector takes beyond its grace."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Something that Docker has and the store has not, and how to record it.

    :param cut_off: what to do, and why, if its address stays another's; None: that one goes by itself.
    """

    what: str
    adopt: Callable[[], None]
    cut_off: Callable[[Taken], None] | None = None


class Adoption:
    """See `sweeper.Sweep`.

    :param patience: seconds that a container's address must be another's before the container loses its connection:
        more than any host takes to collect what is dead.
    """

    def __init__(
        self,
        store: Store,
        host: Host,
        cluster: Cluster,
        driver: Driver,
        ipam: Ipam,
        *,
        patience: float,
        grace: float = _GRACE_SECONDS,
    ) -> None:
        self.found_networks = False
        """Set when a network was adopted: what had to be refused for want of it can be done now."""
        self._store = store
        self._me = host
        self._cluster = cluster
        self._driver = driver
        self._networks = driver.networks
        self._ipam = ipam
        self._grace = grace
        self._patience = Patience(grace)
        self._taken = Patience(patience)

    def forget(self) -> None:
        self._patience.forget()
        self._taken.forget()

    def sweep(self, inventory: Inventory, pools: Sequence[Entry]) -> Outcome:
        lost = list(self._lost(inventory))
        lasting = self._patience.lasting(one.what for one in lost)
        failing: dict[str, WeftError] = {}
        for one in lost:
            if one.what in lasting:
                try:
                    one.adopt()
                except WeftError as error:
                    failing[one.what] = error
        self._cut_off(lost, failing)
        if not lost:
            return Outcome()
        texts = {
            what: f"{what}, which Docker has here, is not known to the cluster: {error}"
            for what, error in failing.items()
        }
        return Outcome(_RETRY_SECONDS if len(failing) == len(lost) else self._grace, texts)

    def _cut_off(self, lost: Sequence[Lost], failing: Mapping[str, WeftError]) -> None:
        """A container goes without its address when that has been another's for so long that it is no leftover."""
        taken = [(one, error) for one in lost if isinstance(error := failing.get(one.what), Taken)]
        lasting = self._taken.lasting(one.what for one, _ in taken if one.cut_off)
        for one, error in taken:
            if one.cut_off and one.what in lasting:
                one.cut_off(error)

    def _lost(self, inventory: Inventory) -> Iterator[Lost]:
        bound = self._cluster.memberships(self._me.id)
        for found in inventory.networks:
            vni = bound.get(found.id)
            if vni is not None:
                yield from self._lost_endpoints(vni, found)
            elif found.driver == self._networks.driver_name and found.scope == "local":
                yield Lost(f"network {found.name} ({found.id[:12]})", partial(self._adopt_network, found))

    def _lost_endpoints(self, vni: int, found: DockerNetwork) -> Iterator[Lost]:
        known = self._cluster.endpoints.get(vni, {})
        attached = {endpoint.id for endpoint in found.endpoints}
        corpses = [one for one in self._cluster.local_endpoints(vni, self._me.id) if one.id not in attached]
        for endpoint in found.endpoints:
            if endpoint.id not in known and self._driver.is_alive(endpoint.id):
                what = f"container {endpoint.container} on network {found.name}"
                waits = any(map(endpoint.rivals, corpses))
                cut_off = None if waits else partial(self._disconnect, found, endpoint)
                yield Lost(what, partial(self._adopt_endpoint, vni, found, endpoint), cut_off)

    def _adopt_network(self, found: DockerNetwork) -> None:
        if self._store.get(binding_key(self._me.id, found.id)):
            return  # the cluster in memory is late
        try:
            pools = tuple(PoolRequest(LOCAL_SPACE, self._reserve(found, pool)) for pool in found.pools)
            # What `weft.network` named is lost as well; the subnets say which network it is.
            options = replace(parse_options(found.published.options), network=None)
            network = self._make(NetworkRequest(found.id, pools, options, found.internal))
        except WeftError:
            self._release(found)
            raise
        self.found_networks = True
        log.warning(
            "Docker network %s (%s) was unknown to the cluster and is %s now", found.name, found.id, network.title
        )

    def _make(self, request: NetworkRequest) -> Network:
        """With the VNI that was asked for, unless that is another network's by now."""
        if request.options.vni:
            with suppress(Conflict):
                return self._networks.create(request, revive=False)
        without = replace(request, options=replace(request.options, vni=None))
        return self._networks.create(without, revive=False)

    def _reserve(self, found: DockerNetwork, pool: Pool) -> Pool:
        """As the engine asks for a new network's pool, its gateway and its auxiliary addresses."""
        cidr = ip_network(pool.cidr)
        pool_id = self._ipam.request_pool(LOCAL_SPACE, cidr, None, v6=cidr.version == 6)
        gateway = self._ipam.request_gateway(pool_id, ip_address(pool.gateway) if pool.gateway else None)
        for address in pool.auxiliary.values():
            self._ipam.request_address(pool_id, ip_address(address))
        return Pool(pool.cidr, str(gateway), pool.auxiliary)

    def _release(self, found: DockerNetwork) -> None:
        for pool in found.pools:
            cidr = ip_network(pool.cidr)
            for address in pool.auxiliary.values():
                self._ipam.release_address(PoolId(LOCAL_SPACE, cidr), ip_address(address))
            self._ipam.release_pool(cidr)

    def _adopt_endpoint(self, vni: int, found: DockerNetwork, endpoint: DockerEndpoint) -> None:
        if self._store.get(endpoint_key(vni, endpoint.id)):
            return
        self._driver.create_endpoint(EndpointRequest(found.id, endpoint.id, endpoint.addresses, endpoint.mac))
        log.warning("container %s was unknown to the cluster and is recorded again", endpoint.container)

    def _disconnect(self, found: DockerNetwork, endpoint: DockerEndpoint, why: Taken) -> None:
        self._driver.detach(endpoint.id)
        log.error(
            "container %s is cut off from network %s: %s; restart the container to give it a new address",
            endpoint.container,
            found.name,
            why.fact,
        )
