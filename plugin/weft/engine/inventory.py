"""What a Docker Engine has, as far as weft compares it with the store. Values that `engine.py` reads."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from weft.model import Endpoint, Network, Pool, Published


@dataclass(frozen=True, slots=True)
class DockerEndpoint:
    """A running container's attachment. `container` is its name, `addresses` are plain, IPv4 first."""

    id: str
    container: str
    mac: str
    addresses: tuple[str, ...]

    def rivals(self, recorded: Endpoint) -> bool:
        """True if an endpoint in the store has an address, or the MAC, of this one."""
        return recorded.mac == self.mac or not set(recorded.addresses).isdisjoint(self.addresses)


@dataclass(frozen=True, slots=True)
class DockerNetwork:
    """A Docker network as `docker network inspect` shows it.

    :param pools: subnets in canonical form; Docker may show them as they were typed, and not every gateway.
    :param endpoints: of running containers; not read for networks that have nothing to do with weft.
    :param complete: the endpoints were read.
    """

    id: str
    name: str
    driver: str
    scope: str
    internal: bool
    pools: tuple[Pool, ...]
    published: Published
    endpoints: tuple[DockerEndpoint, ...] = ()
    complete: bool = False

    @property
    def subnets(self) -> set[str]:
        return {pool.cidr for pool in self.pools}

    @property
    def addresses(self) -> set[str]:
        """Those of its containers, and the auxiliary ones."""
        return {a for e in self.endpoints for a in e.addresses} | {a for p in self.pools for a in p.auxiliary.values()}


@dataclass(frozen=True, slots=True)
class Inventory:
    """All networks of an engine.

    :param engine: identity of the engine's own store. Another one means that the engine has forgotten everything.
    :param version: the engine's release.
    :param fresh: all of it was read just now.
    """

    engine: str
    networks: tuple[DockerNetwork, ...]
    version: str = ""
    fresh: bool = True


class Engine(Protocol):
    """What weft asks of the local Docker Engine. Every method may raise `EngineError`. Not for handlers: the engine
    holds locks while it calls them."""

    def inventory(
        self,
        ids: Collection[str],
        subnets: Collection[str],
        before: Inventory | None = None,
        changed: Collection[str] = (),
    ) -> Inventory:
        """All networks; with endpoints those of our driver, of these `ids`, or with one of these subnets.

        :param before: what was read before; since then, just the networks with the ids `changed` have come, gone or
            become others. (None: all is read: a request for each)
        """
        ...

    def create(self, network: Network) -> str:
        """Make a published network with our driver, as it is elsewhere; return the engine's id for it. The engine calls
        the driver meanwhile."""
        ...

    def remove(self, network_id: str) -> bool:
        """Remove a network; False if a container uses it. The engine calls the driver meanwhile."""
        ...

    def refused_starts(self, why: str) -> dict[str, str]:
        """The containers that a policy restarts and whose last start failed with `why`: names by id."""
        ...

    def start(self, container_id: str) -> str:
        """Start a container; return why the engine refuses, or "". The engine calls the driver meanwhile."""
        ...

    def follow(self, changed: Callable[[str], None], pruned: Callable[[], None]) -> None:
        """Call `changed` with "" now, and with the id of each network that changes or has another container; and
        `pruned` after a prune has deleted networks. Ends only by an error."""
        ...
