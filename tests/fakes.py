"""Stand-ins that hold state, and that can fail the next calls of one kind."""

from __future__ import annotations

import errno
import itertools
import queue
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_network

from weft.dataplane import Bridge, KernelEvent, Link, News, Port, Row, RowEvent, Shaper, Tunnel
from weft.engine.inventory import DockerEndpoint, DockerNetwork, Inventory
from weft.errors import EngineError, KernelError, WeftError
from weft.keys import PrivateKey
from weft.model import Endpoint, IPNetwork, Network, Pool, Published
from weft.reconcile import Contact, Create, ObservedLink, ObservedTunnel, Remove, RowPlan, Step, TunnelPlan, Update


class FakeKernel:
    """A data-plane namespace in memory, with the kernel's habits: ports die with their rows, names are unique."""

    def __init__(self, *, mtu: int = 1500, routes: Iterable[str] = ()) -> None:
        self.links: dict[str, Link] = {}
        self.rows: set[Row] = set()
        self.mtu = mtu
        self.route_list = [ip_network(route) for route in routes]
        self.steps: list[Step] = []
        self.vxlan_error = 0
        self.carrier: set[str] = set()
        """Names of ports that a running container uses."""
        self.broken: set[str] = set()
        """Names of links that cannot be made."""
        self.wireguard = True
        """Whether this kernel has it."""
        self.tunnel: Tunnel | None = None
        self.beside: list[str] = []
        """Links in the WireGuard device's namespace that should not be there."""
        self.contacts: dict[str, Contact] = {}
        """With peers, by public key."""
        self.handshakes = 0
        """How often they were all begun anew."""
        self.deaf = 0
        """How many of those come to nothing."""
        self._failing: Counter[str] = Counter()

    def fail(self, method: str, times: int = 1) -> None:
        """Let the next calls of a method fail."""
        self._failing[method] += times

    def check(self) -> None:
        self._maybe_fail("check")
        if self.vxlan_error:
            raise KernelError("create VXLAN device vxcheck", self.vxlan_error, "load the vxlan module")

    def observe_links(self, names: Iterable[str] | None = None) -> dict[str, ObservedLink]:
        self._maybe_fail("observe_links")
        wanted = self.links.keys() if names is None else set(names)
        found = {name: link for name, link in sorted(self.links.items()) if name in wanted}
        return {name: ObservedLink(link, carrier=name in self.carrier) for name, link in found.items()}

    def perform(self, step: Step) -> None:
        self._maybe_fail("perform")
        self.steps.append(step)
        match step:
            case Create(link):
                self._create(link)
            case Update(link):
                self.links[link.name] = link
            case Remove(name):
                self._remove(name)

    def has_links(self, names: Iterable[str]) -> bool:
        return all(name in self.links for name in names)

    def observe_rows(self, devices: Iterable[str]) -> set[Row]:
        self._maybe_fail("observe_rows")
        wanted = set(devices)
        return {row for row in self.rows if row.device in wanted}

    def write_rows(self, plan: RowPlan) -> None:
        self._maybe_fail("write_rows")
        for row in plan.put:
            if row.device not in self.links:
                raise KernelError(f"put {row}", errno.ENODEV)
            self.rows -= {old for old in self.rows if old.key == row.key}
            self.rows.add(row)
        self.rows -= set(plan.delete)

    def intruders(self) -> list[str]:
        return self.beside

    def ensure_tunnel(self) -> None:
        self._maybe_fail("ensure_tunnel")
        if not self.wireguard:
            raise KernelError("create WireGuard device", errno.EOPNOTSUPP, "install wireguard-go")
        self.tunnel = self.tunnel or Tunnel("", "", 0, 1420)

    def observe_tunnel(self) -> ObservedTunnel | None:
        return ObservedTunnel(self.tunnel, "kernel", contacts=self.contacts) if self.tunnel else None

    def has_tunnel(self, address: str) -> bool:
        return self.tunnel is not None and self.tunnel.address == address

    def configure_tunnel(self, tunnel: Tunnel, private: PrivateKey) -> None:
        assert self.tunnel
        assert private.public == tunnel.key
        self.tunnel = replace(tunnel, peers=self.tunnel.peers)

    def write_peers(self, plan: TunnelPlan) -> None:
        assert self.tunnel
        put = {peer.address: peer for peer in plan.put}
        stay = {p for p in self.tunnel.peers if p.key not in plan.delete and p.address not in put}
        self.tunnel = replace(self.tunnel, peers=frozenset({*stay, *put.values()}))

    def shake_hands(self, private: PrivateKey) -> None:
        assert self.tunnel
        assert private.public == self.tunnel.key
        self.handshakes += 1
        if self.handshakes > self.deaf:
            self.contacts = {peer.key: Contact(time.time()) for peer in self.tunnel.peers}

    def routes(self) -> list[IPNetwork]:
        return self.route_list

    def has_free_port(self, address: str, port: int) -> bool:
        return True

    def underlay_mtu(self, address: str, towards: Iterable[str] = ()) -> int:
        return self.mtu

    def _create(self, link: Link) -> None:
        if link.name in self.links:
            raise KernelError(f"create {link.name}", errno.EEXIST)
        if link.name in self.broken:
            raise KernelError(f"create {link.name}", errno.EIO)
        needs = link.source if isinstance(link, Shaper) else "" if isinstance(link, Bridge) else link.bridge
        if needs and needs not in self.links:
            raise KernelError(f"create {link.name}", errno.ENODEV)
        self.links[link.name] = link

    def _remove(self, name: str) -> None:
        self.rows = {row for row in self.rows if row.device != name}
        if isinstance(self.links.pop(name, None), Bridge):
            for link in list(self.links.values()):
                if isinstance(link, Port) and link.bridge == name:
                    self.links[link.name] = Port(link.name, "", link.mtu)

    def _maybe_fail(self, method: str) -> None:
        if self._failing[method]:
            self._failing[method] -= 1
            raise KernelError(method, errno.EIO)


class FakeMonitor:
    """Kernel events that a test sends by hand."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[KernelEvent | None] = queue.SimpleQueue()

    def __call__(self, news: News) -> FakeMonitor:
        self._news = news
        return self

    def __iter__(self) -> Iterator[KernelEvent]:
        events: Iterator[KernelEvent] = iter(self.events.get, None)
        for event in events:
            if isinstance(event, RowEvent):
                yield from (RowEvent(row, event.present) for row in self._news([event.row], event.present))
            else:
                yield event

    def close(self) -> None:
        self.events.put(None)


class FakeEngine:
    """A Docker Engine: networks made and removed by the test, or through its API, which calls the driver.

    :param create: what creating a network makes the engine ask of the driver; raises `WeftError` if that refuses.
    :param delete: what removing one makes it tell the driver.
    """

    def __init__(
        self,
        create: Callable[[str, Network], object] = lambda _id, _network: None,
        delete: Callable[..., object] = lambda _id, *_cidrs: None,
    ) -> None:
        self.present: dict[str, DockerNetwork] = {}
        self.answers = True
        self.refused: list[tuple[str, str]] = []
        """Names of containers that are to run, and why their start failed."""
        self.unfit: dict[str, str] = {}
        """Names of those that cannot be started, and why."""
        self.starts: list[str] = []
        """Names of those that were to be started, each time."""
        self.id = "none-1"
        self.read: list[str] = []
        """Ids of the networks that were read, each time."""
        self.changes: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """Ids that `follow` tells; "prune" that networks were; None ends it."""
        self._create = create
        self._delete = delete
        self._numbers = itertools.count(1)

    def add(self, network_id: str, name: str, *subnets: str, driver: str = "weft", **published: object) -> None:
        pools = tuple(Pool(subnet) for subnet in subnets)
        spec = Published(**published)  # type: ignore[arg-type]
        self.present[network_id] = DockerNetwork(network_id, name, driver, "local", False, pools, spec)

    def attach(self, network_id: str, endpoint: Endpoint) -> None:
        """A container runs with this endpoint."""
        found = self.present[network_id]
        here = DockerEndpoint(endpoint.id, f"c-{endpoint.id[:4]}", endpoint.mac, endpoint.addresses)
        self.present[network_id] = replace(found, endpoints=(*found.endpoints, here))

    def detach(self, network_id: str) -> None:
        self.present[network_id] = replace(self.present[network_id], endpoints=())

    def inventory(
        self,
        ids: Collection[str],
        subnets: Collection[str],
        before: Inventory | None = None,
        changed: Collection[str] = (),
    ) -> Inventory:
        self._maybe_silent()
        kept = {one.id: one for one in before.networks if one.id not in changed} if before else {}
        read = [one for one in self.present if one in changed or not before]
        self.read += read
        found = kept | {one: replace(self.present[one], complete=True) for one in read}
        return Inventory(self.id, tuple(found.values()), fresh=before is None)

    def refused_starts(self, why: str) -> dict[str, str]:
        self._maybe_silent()
        return {name: name for name, reason in self.refused if why in reason}

    def start(self, container_id: str) -> str:
        self._maybe_silent()
        self.starts.append(container_id)
        self.refused = [one for one in self.refused if one[0] != container_id]
        if problem := self.unfit.get(container_id, ""):
            self.refused.append((container_id, problem))
        return problem

    def create(self, network: Network) -> str:
        self._maybe_silent()
        if any(found.name == network.name for found in self.present.values()):
            raise EngineError(f"network with name {network.name} already exists")
        network_id = f"made{next(self._numbers)}"
        try:
            self._create(network_id, network)
        except WeftError as error:
            raise EngineError(str(error)) from error
        assert network.published
        self.present[network_id] = DockerNetwork(
            network_id, network.name, "weft", "local", network.internal, network.pools, network.published
        )
        return network_id

    def remove(self, network_id: str) -> bool:
        self._maybe_silent()
        found = self.present.get(network_id)
        if found and found.endpoints:
            return False
        if found:
            self._delete(network_id, *sorted(found.subnets))
            del self.present[network_id]
        return True

    def follow(self, changed: Callable[[str], None], pruned: Callable[[], None]) -> None:
        changed("")
        for network_id in iter(self.changes.get, None):
            if network_id == "prune":
                pruned()
            else:
                changed(network_id)
        raise EngineError("the Docker Engine closed the event stream")

    def _maybe_silent(self) -> None:
        if not self.answers:
            raise EngineError("the Docker Engine does not answer")


class OpenGate:
    """Every call is let through at once; see `api.Gate`."""

    def admit(self) -> None:
        pass

    def finish(self, what: str, work: Callable[[], object]) -> None:
        work()
