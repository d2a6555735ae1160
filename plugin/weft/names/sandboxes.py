"""Which endpoint of a sandbox brings the static route to the resolver.

A container on an internal network has no default route, so Join gives it a route to the resolver over the network
itself, where the bridge has the resolver's address. The same route on a second network of a sandbox would be refused by
the kernel ("file exists"), connect would fail, and the container could never be started again. So it is given to one
endpoint of a sandbox only, and that is kept in a file beside the data plane: weft may be restarted between two Joins.
A file stays if the engine never tells that the endpoint left; sandboxes have random ids, so it keeps nobody else out.
"""

from __future__ import annotations

import logging
from pathlib import Path

from weft.cluster import Cluster

log = logging.getLogger(__name__)


class ResolverRoutes:
    """See `api.Routes`.

    :param me: id of this host.
    :param address: the resolver's; "" if there is none.
    :param folder: where the sandboxes' files are; must not outlive a reboot.
    """

    def __init__(self, cluster: Cluster, me: str, address: str, folder: Path) -> None:
        self._cluster = cluster
        self._me = me
        self._address = address
        self._folder = folder

    def take(self, network_id: str, endpoint_id: str, sandbox: str) -> str | None:
        network = self._cluster.networks.get(self._cluster.bindings.get((self._me, network_id), 0))
        sandbox = Path(sandbox).name
        if not (self._address and network and network.internal and sandbox):
            return None
        if all(":" in pool.cidr for pool in network.pools):
            return None
        return f"{self._address}/32" if self._claim(sandbox, endpoint_id) else None

    def release(self, endpoint_id: str) -> None:
        try:
            for file in self._folder.glob("*"):
                if file.read_text() == endpoint_id:
                    file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("routes to the resolver: %s", error)

    def _claim(self, sandbox: str, endpoint_id: str) -> bool:
        """True if this endpoint is the sandbox's first, or asks again."""
        try:
            self._folder.mkdir(exist_ok=True)
            try:
                with (self._folder / sandbox).open("x") as file:
                    file.write(endpoint_id)
            except FileExistsError:
                return (self._folder / sandbox).read_text() == endpoint_id
        except OSError as error:
            log.warning("no route to the resolver for sandbox %s: %s", sandbox, error)
            return False
        return True
