"""Endpoints' veths, made and removed at once in the thread of the handler that asks.

What endpoints share (bridge, VXLAN device, rows) is the agent's. The two meet here: an attachment is *pinned* from the
moment its handler begins until the agent has seen its endpoint in the store, and the agent removes nothing that a
pinned attachment needs. `step_lock` is held for single link steps only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from errno import EEXIST, ENODEV

from weft import topology
from weft.dataplane import Link, Vxlan, device_names
from weft.encryption import Encryption
from weft.errors import ConfigError, KernelError, WeftError
from weft.identity import LocalHost
from weft.model import Endpoint, Network
from weft.reconcile import Create, Kernel, Remove, Update, plan_links

_ATTEMPTS = 3


class Attachments:
    """See `driver.Attachments`.

    :param port: UDP port of VXLAN.
    :param resolver: address at which containers ask for names; "" if nobody answers there.
    :param encryption: without it there are no encrypted networks.
    """

    def __init__(
        self, kernel: Kernel, me: LocalHost, *, port: int, resolver: str = "", encryption: Encryption | None = None
    ) -> None:
        self.step_lock = threading.Lock()
        self._kernel = kernel
        self._me = me
        self._port = port
        self._resolver = resolver
        self._encryption = encryption
        self._pinned: dict[str, Endpoint] = {}
        self._underlay_mtu = 0
        self._checked = False

    def check(self, *, encrypted: bool = False) -> None:
        if not self._checked:
            self._kernel.check()
            self._checked = True
        if encrypted:
            self._require_encryption()

    def largest_mtu(self, *, encrypted: bool = False) -> int:
        underlay = self._underlay_mtu or self.refresh_mtu()
        return underlay - topology.overhead(self._me.host.underlay, encrypted=encrypted)

    def refresh_mtu(self) -> int:
        """Read the underlay's MTU again."""
        self._underlay_mtu = self._kernel.underlay_mtu(self._me.host.underlay)
        if self._encryption:
            self._encryption.underlay_mtu = self._underlay_mtu
        return self._underlay_mtu

    def mtu(self, network: Network) -> int:
        """MTU of a network's devices on this host."""
        return network.mtu or self.largest_mtu(encrypted=network.encrypted)

    def links(self, network: Network, endpoints: Iterable[Endpoint] = ()) -> list[Link]:
        """All that a network with these local endpoints has in this host's data plane."""
        mtu, me = self.mtu(network), self._me.host
        local = me.wg_address if network.encrypted else me.underlay
        devices: list[Link] = [
            *topology.network_links(network, local=local, port=self._port, mtu=mtu, resolver=self._resolver)
        ]
        if network.encrypted and not (local and self._encryption and not self._encryption.breached):
            devices = [link for link in devices if not isinstance(link, Vxlan)]
        return [*devices, *(topology.endpoint_port(endpoint, mtu) for endpoint in endpoints)]

    def attach(self, network: Network, endpoint: Endpoint) -> str:
        self._pinned[endpoint.id] = endpoint
        try:
            return self._attach(network, endpoint)
        except WeftError:
            self.unpin(endpoint.id)
            raise

    def attached(self, endpoint_id: str) -> str | None:
        return topology.peer_name(endpoint_id) if self._kernel.has_links([topology.port_name(endpoint_id)]) else None

    def is_alive(self, endpoint_id: str) -> bool:
        name = topology.port_name(endpoint_id)
        return any(seen.carrier for seen in self._kernel.observe_links([name]).values())

    def detach(self, endpoint_id: str) -> None:
        self.unpin(endpoint_id)
        self._kernel.perform(Remove(topology.port_name(endpoint_id), "endpoint deleted"))

    def unpin(self, endpoint_id: str) -> None:
        self._pinned.pop(endpoint_id, None)

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
        port = topology.endpoint_port(endpoint, self.mtu(network))
        for attempt in range(_ATTEMPTS):
            try:
                with self.step_lock:
                    self._ensure_devices(network)
                    self._kernel.perform(Create(port, "endpoint created"))
                return port.peer
            except KernelError as error:
                if error.errno == EEXIST and self._kernel.has_links([port.name]):
                    self._kernel.perform(Update(port, "endpoint created again"))
                    return port.peer
                if error.errno not in (EEXIST, ENODEV) or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _ensure_devices(self, network: Network) -> None:
        names = device_names(network.vni)
        # That an encrypted network's device is there says nothing: its socket may be where a plain one's is.
        if network.encrypted or not self._kernel.has_links(names):
            for step in plan_links(self.links(network), self._kernel.observe_links(names)):
                self._kernel.perform(step)
