"""Endpoints' veths, made and removed at once in the thread of the handler that asks.

What endpoints share (bridge, VXLAN device, rows) is the agent's. The two meet here: an attachment is *pinned* from the
moment its handler begins until the agent has seen its endpoint in the store, and the agent removes nothing that a
pinned attachment needs. `step_lock` is held for single link steps only.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import replace
from errno import EEXIST, ENODEV
from time import monotonic

from weft import topology
from weft.cluster import Cluster
from weft.dataplane import Bridge, Link, Port, shaper_name
from weft.encryption import Encryption
from weft.errors import ConfigError, Conflict, KernelError, WeftError
from weft.identity import LocalHost
from weft.model import Endpoint, Host, Network
from weft.reconcile import Create, Kernel, Remove, Update, plan_links
from weft.topology import Limit

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_CHEAP_SECONDS = 0.1
_DUTY = 50
"""Looking up the routes to very many hosts may take one fiftieth of the time."""


class Attachments:
    """See `driver.Attachments`.

    :param port: UDP port of VXLAN.
    :param resolver: address at which containers ask for names; "" if nobody answers there.
    :param encryption: without it there are no encrypted networks.
    """

    def __init__(
        self,
        kernel: Kernel,
        cluster: Cluster,
        me: LocalHost,
        *,
        port: int,
        resolver: str = "",
        encryption: Encryption | None = None,
    ) -> None:
        self.step_lock = threading.Lock()
        self._kernel = kernel
        self._cluster = cluster
        self._me = me
        self._port = port
        self._resolver = resolver
        self._encryption = encryption
        self._pinned: dict[str, Endpoint] = {}
        self._pinning = threading.Lock()
        self._kept_mtu: dict[str, int] = {}
        """By endpoint, of those whose record does not tell it."""
        self._limiting: tuple[tuple[int, Host] | None, list[Host]] = (None, [])
        """Hosts that decide the networks' MTU, of this version of the cluster: a look at all of them is dear."""
        self._checked = False
        self._next_look = 0.0

    def check(self, *, encrypted: bool = False) -> None:
        if not self._checked:
            self._kernel.check()
            self._checked = True
        if encrypted:
            self._require_encryption()

    def limit(self, *, encrypted: bool = False, here: bool = False, paths: bool = False) -> Limit:
        hosts = self._hosts()
        return topology.limit(hosts[:1] if here else hosts, encrypted=encrypted, paths=paths)

    def _hosts(self) -> list[Host]:
        """This one, which is measured, and of those that can reach it the first by name for each MTU."""
        if not self._me.host.mtu:
            self.refresh_mtu()
        seen = self._cluster.version, self._me.host  # in this order: hosts that come meanwhile are of a later version
        known, hosts = self._limiting
        if seen != known:
            me = seen[1]
            others = [h for h in list(self._cluster.hosts.values()) if h.id != me.id and h.family == me.family]
            others.sort(key=lambda host: host.name, reverse=True)
            hosts = [me, *{(host.mtu, host.path_mtu): host for host in others}.values()]
            self._limiting = seen, hosts
        return hosts

    def refresh_mtu(self) -> bool:
        """Look again at what the underlay carries, unless that was dear a moment ago; True if it has changed."""
        before, began = self._me.host, monotonic()
        if before.mtu and began < self._next_look:
            return False
        others = [host for host in list(self._cluster.hosts.values()) if host.id != before.id]
        towards = [host.underlay for host in others if host.family == before.family]
        mtu = self._kernel.underlay_mtu(before.underlay, towards)
        seconds = monotonic() - began
        self._next_look = began + _DUTY * seconds if seconds > _CHEAP_SECONDS else began
        if mtu == before.mtu:
            return False
        if before.mtu:
            log.warning("the underlay's MTU changed from %d to %d", before.mtu, mtu)
        self._me.measure(mtu)
        return True

    def mtu(self, network: Network) -> int:
        """MTU of a network's new endpoints."""
        return network.mtu or topology.fitting_mtu(network, self._hosts())

    def check_port(self, port: int, *, encrypted: bool) -> None:
        if encrypted:
            return  # nothing else is where its socket is
        hosts = {self._me.host.name: self._encryption.port if self._encryption else 0}
        hosts |= {host.name: host.wg_port for host in list(self._cluster.hosts.values()) if host.id != self._me.id}
        if holder := next((name for name, taken in sorted(hosts.items()) if taken == port), ""):
            raise Conflict(f"option port={port}: that is WireGuard's on host {holder} (WEFT_WG_PORT); choose another")
        networks = list(self._cluster.networks.values())
        ours = {self._port, *(network.port for network in networks if not network.encrypted)}
        if port not in ours and not self._kernel.has_free_port(self._me.host.underlay, port):
            raise Conflict(
                f"option port={port}: another program has that UDP port on host {self._me.host.name} (see ss -lunp); "
                "choose another"
            )

    def with_mtu(self, endpoints: Iterable[Endpoint]) -> list[Endpoint]:
        """These local endpoints with the MTU that they keep; 0 if an older weft made one whose port is gone."""
        return [one if one.mtu else replace(one, mtu=self._first_mtu(one.id)) for one in endpoints]

    def _first_mtu(self, endpoint_id: str) -> int:
        """That of the port when it was first seen: the container keeps it, whatever becomes of the network's."""
        if endpoint_id not in self._kept_mtu and (port := self.port(endpoint_id)):
            self._kept_mtu[endpoint_id] = port.mtu
        return self._kept_mtu.get(endpoint_id, 0)

    def port(self, endpoint_id: str) -> Port | None:
        name = topology.port_name(endpoint_id)
        seen = self._kernel.observe_links([name]).get(name) if self._kernel.has_links([name]) else None
        return seen.link if seen and isinstance(seen.link, Port) else None

    def links(self, network: Network, endpoints: Iterable[Endpoint] = ()) -> list[Link]:
        """All that a network with these local endpoints has in this host's data plane."""
        mtu, endpoints = self.mtu(network), self.with_mtu(endpoints)
        own = [link for endpoint in endpoints for link in topology.endpoint_links(endpoint, mtu)]
        return [*self._devices(network, topology.device_mtu(mtu, endpoints)), *own]

    def _devices(self, network: Network, mtu: int) -> list[Link]:
        me = self._me.host
        local = me.wg_address if network.encrypted else me.underlay
        devices = topology.network_links(network, local=local, port=self._port, mtu=mtu, resolver=self._resolver)
        usable = not network.encrypted or (local and self._encryption and not self._encryption.breached)
        return [link for link in devices if usable or isinstance(link, Bridge)]

    def pin(self, endpoint: Endpoint) -> bool:
        with self._pinning:
            if rival := self._rival(endpoint.id):
                raise Conflict(
                    f"endpoint {endpoint.id} cannot have the interface {topology.port_name(endpoint.id)}, which "
                    f"{self._cluster.title(rival)} has ({rival.id}): start the container again, with another endpoint"
                )
            seen = endpoint.id in self._cluster.endpoints.get(endpoint.vni, ())
            if seen or endpoint.id in self._pinned:
                return False
            self._pinned[endpoint.id] = endpoint
            return True

    def _rival(self, endpoint_id: str) -> Endpoint | None:
        """Another endpoint of this host whose port has the name that this one's would have: a part of its id."""
        name, here = topology.port_name(endpoint_id), [*self.pinned(), *self._cluster.endpoints_of(self._me.host.id)]
        return next((one for one in here if topology.port_name(one.id) == name and one.id != endpoint_id), None)

    def attach(self, network: Network, endpoint: Endpoint) -> str:
        self.pin(endpoint)
        try:
            return self._attach(network, endpoint)
        except WeftError:
            self.unpin(endpoint.id)
            raise

    def attached(self, endpoint_id: str) -> str | None:
        present = self._kernel.has_links([topology.port_name(endpoint_id)]) and not self._rival(endpoint_id)
        return topology.peer_name(endpoint_id) if present else None

    def is_alive(self, endpoint_id: str) -> bool:
        name = topology.port_name(endpoint_id)
        return any(seen.carrier for seen in self._kernel.observe_links([name]).values())

    def detach(self, endpoint_id: str) -> None:
        self.unpin(endpoint_id)
        if not self._rival(endpoint_id):
            name = topology.port_name(endpoint_id)
            for one in (name, shaper_name(name)):
                self._kernel.perform(Remove(one, "endpoint deleted"))
        self._kept_mtu.pop(endpoint_id, None)

    def unpin(self, endpoint_id: str) -> None:
        self._pinned.pop(endpoint_id, None)

    def unpin_seen(self) -> None:
        """For the agent's loop: it has seen those endpoints that the mirror has."""
        for endpoint in self.pinned():
            if endpoint.id in self._cluster.endpoints.get(endpoint.vni, ()):
                self.unpin(endpoint.id)

    def pinned(self) -> list[Endpoint]:
        """Endpoints whose attachment is under way, or not yet seen by the agent."""
        return list(self._pinned.values())

    def _require_encryption(self) -> None:
        if self._encryption is None:
            raise ConfigError("this weft has no encryption")
        self._encryption.require()

    def _attach(self, network: Network, endpoint: Endpoint) -> str:
        if network.encrypted:
            self._require_encryption()
        [endpoint] = self.with_mtu([endpoint])
        links = topology.endpoint_links(endpoint, self.mtu(network))
        for attempt in range(_ATTEMPTS):
            try:
                with self.step_lock:
                    self._ensure_devices(network, endpoint)
                    self._ensure(links)
                return topology.peer_name(endpoint.id)
            except KernelError as error:
                if error.errno not in (EEXIST, ENODEV) or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _ensure(self, links: Iterable[Link]) -> None:
        """Make all of these, or none: a veth without its limit would be taken for one that has none."""
        made: list[Link] = []
        try:
            for link in links:
                if self._ensure_one(link):
                    made.append(link)
        except KernelError:
            for link in made:
                self._kernel.perform(Remove(link.name, "its endpoint failed"))
            raise

    def _ensure_one(self, link: Link) -> bool:
        """True if it had to be made."""
        try:
            self._kernel.perform(Create(link, "endpoint created"))
        except KernelError as error:
            if error.errno != EEXIST or not self._kernel.has_links([link.name]):
                raise
            self._kernel.perform(Update(link, "endpoint created again"))
            return False
        return True

    def _ensure_devices(self, network: Network, endpoint: Endpoint) -> None:
        names = topology.shared_names(network)
        # That an encrypted network's device is there says nothing: its socket may be where a plain one's is.
        if network.encrypted or not self._kernel.has_links(names):
            others = self.with_mtu(self._cluster.local_endpoints(network.vni, self._me.id))
            mtu = topology.device_mtu(self.mtu(network), [endpoint, *others])
            for step in plan_links(self._devices(network, mtu), self._kernel.observe_links(names)):
                self._kernel.perform(step)
