"""What can be told of this host and its cluster while no daemon runs: from its last snapshot on disk, and the kernel.

The snapshot is in the daemon's state folder. A managed plugin sees that through a mount, whose source the Docker Engine
tells. Nothing is written, and the store is not asked: whoever reads it may not be who runs the daemon.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from weft import __version__
from weft.agent import Agent
from weft.attachments import Attachments
from weft.cluster import Cluster
from weft.config import Settings
from weft.dataplane import vni_of
from weft.encryption import Encryption
from weft.engine.client import DockerEngine
from weft.errors import ConfigError, EngineError, WeftError
from weft.identity import LocalHost
from weft.kernel import LinuxKernel, has_namespaces
from weft.keys import KeyFile
from weft.model import Allocation, Host
from weft.snapshot import Snapshot, read_snapshot
from weft.status import addresses_of, endpoint_views, host_view, network_view
from weft.store import Store

log = logging.getLogger(__name__)

_NOT_KNOWN = "not known"


class Offline:
    """Reads when it is first asked. The answers have the shapes of the daemon's; what cannot be known is None."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @property
    def source(self) -> str:
        """Where all this is from, in words."""
        if self._snapshot is None:
            folder = self._settings.state
            return f"there is no snapshot in {folder} either (WEFT_STATE), so nothing is known of the cluster"
        when = datetime.fromtimestamp(self._snapshot.when).strftime("%Y-%m-%d %H:%M:%S")
        return f"this is what it last knew, of this host's networks, at {when} ({self._snapshot.path})"

    @property
    def state(self) -> Path:
        """The daemon's state folder, by its path on the host."""
        return self._snapshot.path.parent if self._snapshot else self._settings.state

    def hosts(self) -> list[dict[str, Any]]:
        hosts = sorted(self._cluster.hosts.values(), key=lambda host: host.name)
        return [{**host_view(host, self._cluster), "alive": None} for host in hosts]

    def networks(self) -> list[dict[str, Any]]:
        networks = sorted(self._cluster.networks.values(), key=lambda network: (network.name, network.vni))
        me = self._me or LocalHost(Host("", "", ""))
        return [network_view(network, self._cluster, me, _NOT_KNOWN) for network in networks]

    def endpoints(self) -> list[dict[str, Any]]:
        return endpoint_views(self._cluster)

    def addresses(self, name: str | None = None) -> dict[str, Any]:
        """Those of endpoints and gateways; what is only requested is in the store alone."""
        networks = [n for n in self._cluster.networks.values() if not name or name in (n.name, str(n.vni))]
        pools = {pool.cidr: network.vni for network in networks for pool in network.pools}
        return addresses_of(self._cluster, pools, self._taken({network.vni for network in networks}))

    def plan(self) -> list[dict[str, str]]:
        """What the daemon would do if it started now without the store."""
        if not has_namespaces(self._settings.run):
            return [
                {
                    "kind": "namespace",
                    "change": f"make the namespaces dp and wg in {self._settings.run}, with all in them",
                }
            ]
        if self._me is None:
            raise ConfigError(f"nothing can be planned: {self.source}")
        with closing(LinuxKernel(self._settings.run)) as kernel:
            kernel.open()
            found = self._agent(kernel, self._me).plan()
        return [{"kind": kind, "change": change} for kind, change in found]

    def status(self) -> dict[str, Any]:
        me = self._me.host if self._me else Host("", self._settings.hostname, "")
        links, rows = self._sizes()
        cluster = self._cluster
        return {
            "host": {
                "id": me.id,
                "name": me.name,
                "underlay": me.underlay,
                "version": me.version or __version__,
                "driver": self._settings.driver,
                "started": None,
            },
            "store": {"origin": self._snapshot.origin if self._snapshot else "", "problem": "", "seconds": None},
            "engine": {"problem": "", "version": ""},
            "agent": {
                "synced": None,
                "resynced": None,
                "seconds": None,
                "repaired": None,
                "links": links,
                "rows": rows,
                "problem": "",
            },
            "encryption": _NOT_KNOWN,
            "names": {"address": self._settings.dns, "answers": False, "problem": ""},
            "hosts": len(cluster.hosts),
            "alive": None,
            "networks": len(cluster.networks),
            "endpoints": sum(map(len, cluster.endpoints.values())),
            "problems": ["no weft daemon runs: containers keep their connections, and no new one can start"],
        }

    @cached_property
    def _snapshot(self) -> Snapshot | None:
        """The newest there is: of the service, or of a managed plugin."""
        folders = [self._settings.state]
        if self._settings.docker != "off":
            with suppress(EngineError):
                folders += DockerEngine(self._settings.docker, self._settings.driver).plugin_states()
        found = [read_snapshot(folder / "snapshot.json") for folder in dict.fromkeys(folders)]
        return max((one for one in found if one), key=lambda one: one.when, default=None)

    @cached_property
    def _cluster(self) -> Cluster:
        cluster = Cluster()
        if self._snapshot:
            cluster.load(self._snapshot.entries, certain=False)
        return cluster

    @cached_property
    def _me(self) -> LocalHost | None:
        if self._snapshot is None:
            return None
        with suppress(OSError):
            host = self._cluster.hosts.get((self._snapshot.path.parent / "host-id").read_text().strip())
            return LocalHost(host) if host else None
        return None

    def _agent(self, kernel: LinuxKernel, me: LocalHost) -> Agent:
        """One that is not started: it only plans."""
        assert self._snapshot
        settings, keys = self._settings, KeyFile(self._snapshot.path.parent / "wireguard.key")
        encryption = Encryption(
            kernel, self._cluster, me, keys, port=me.host.wg_port or settings.wg_port, publish=lambda: None
        )
        attachments = Attachments(
            kernel, self._cluster, me, port=settings.port, resolver=settings.dns, encryption=encryption
        )
        nobody = cast(Store, None)
        return Agent(
            nobody,
            self._cluster,
            kernel,
            me,
            attachments,
            monitor=kernel.monitor,
            resync=settings.resync,
            encryption=encryption,
        )

    def _sizes(self) -> tuple[int | None, int | None]:
        """How many links and rows are in the kernel; None if that cannot be seen."""
        if not has_namespaces(self._settings.run):
            return None, None
        try:
            with closing(LinuxKernel(self._settings.run)) as kernel:
                kernel.open()
                links = kernel.observe_links()
                return len(links), len(kernel.observe_rows([name for name in links if vni_of(name)]))
        except WeftError as error:
            log.warning("the data plane cannot be read: %s", error)
            return None, None

    def _taken(self, vnis: set[int]) -> Iterator[Allocation]:
        for vni in vnis:
            network = self._cluster.networks[vni]
            for pool in network.pools:
                if pool.gateway:
                    yield Allocation(pool.cidr, pool.gateway, "", "gateway")
                yield from (Allocation(pool.cidr, address, "", "auxiliary") for address in pool.auxiliary.values())
            for endpoint in self._cluster.endpoints.get(vni, {}).values():
                held = ((network.cidr_of(address), address) for address in endpoint.addresses)
                yield from (Allocation(cidr, a, endpoint.host, endpoint=endpoint.id) for cidr, a in held if cidr)
