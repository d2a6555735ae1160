"""Hosts that share one store, each with a kernel in memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.fakes import FakeKernel, FakeMonitor
from weft.agent import Agent
from weft.attachments import Attachments
from weft.cluster import Cluster
from weft.config import from_environment
from weft.driver import Driver, EndpointRequest
from weft.encryption import Encryption
from weft.errors import WeftError
from weft.identity import LocalHost
from weft.ipam import LOCAL_SPACE, Ipam, PoolId
from weft.keys import KeyFile
from weft.model import Endpoint, Host, Network, Pool
from weft.networks import NetworkRequest, Networks, PoolRequest
from weft.options import NetworkOptions, parse_options
from weft.store import Put
from weft.store.sqlite import SqliteStore


def together(*work: Callable[[], object]) -> None:
    """Do all of it at once, each in a thread of its own, and wait for the end."""
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "weft.db")
    yield opened
    opened.close()


class FakeHost:
    """One host's weft without its edges: call the driver as the engine would."""

    def __init__(
        self, store: SqliteStore, number: int, kernel: FakeKernel, *, mirror: bool = True, probes: bool = False
    ) -> None:
        self.store = store
        self.kernel = kernel
        self.record = Host(f"{number:032x}", f"h{number}", f"192.168.78.{number}", mtu=kernel.mtu)
        store.transact([], [Put(self.record.key, self.record.encode())])
        ranges = from_environment({}).pools
        self.ipam = Ipam(store, self.record.id, ranges=ranges, host_routes=kernel.routes, rng=random.Random(number))
        self.me = LocalHost(self.record)
        self.cluster = Cluster(self.record.id)
        self.encryption = Encryption(
            kernel,
            self.cluster,
            self.me,
            KeyFile(Path(store.path).with_name(f"{number}.key")),
            port=51820,
            publish=self.publish,
        )
        self.attachments = Attachments(kernel, self.cluster, self.me, port=4789, encryption=self.encryption)
        rng = random.Random(number)
        parts = store, self.record, self.ipam, self.attachments, self.cluster
        self.driver = Driver(*parts, Networks(*parts, mirror=mirror, rng=rng))
        self.monitor = FakeMonitor()
        self.agent = Agent(
            store,
            self.cluster,
            kernel,
            self.me,
            self.attachments,
            monitor=self.monitor,
            resync=3600,
            encryption=self.encryption,
            probes=probes,
        )

    def publish(self) -> None:
        """What registering does."""
        self.store.transact([], [Put(self.me.host.key, self.me.host.encode())])

    def create_network(
        self, network_id: str, *cidrs: str, internal: bool = False, **options: int | str | bool
    ) -> Network:
        """RequestPool, gateway and CreateNetwork, in the engine's order."""
        pools = []
        for cidr in cidrs:
            pool_id = PoolId.parse(f"{LOCAL_SPACE}/{cidr}")
            self.ipam.request_pool(LOCAL_SPACE, pool_id.pool, None, v6=pool_id.pool.version == 6)
            gateway = self.ipam.request_gateway(pool_id, None)
            pools.append(PoolRequest(LOCAL_SPACE, Pool(cidr, str(gateway))))
        asked = NetworkOptions(**options)  # type: ignore[arg-type]
        return self.driver.networks.create(NetworkRequest(network_id, tuple(pools), asked, internal))

    def mirror_network(self, network_id: str, network: Network) -> None:
        """What the engine asks when the mirror tells it to make a network; it takes back what it asked for in vain."""
        pools = [pool.cidr for pool in network.pools]
        assert network.published
        typed = asdict(parse_options(network.published.options))
        try:
            self.create_network(network_id, *pools, internal=network.internal, **typed)
        except WeftError:
            self.remove_network(network_id, *pools)
            raise

    def remove_network(self, network_id: str, *cidrs: str) -> None:
        """ReleaseAddress of the gateway, ReleasePool and DeleteNetwork, in the engine's order."""
        for cidr in cidrs:
            pool_id = PoolId.parse(f"{LOCAL_SPACE}/{cidr}")
            self.ipam.release_address(pool_id, pool_id.pool[1])
            self.ipam.release_pool(pool_id.pool)
        self.driver.networks.delete(network_id)

    def run(self, network_id: str, endpoint_id: str, cidr: str, *, mac: str = "", rate: int | None = None) -> Endpoint:
        """RequestAddress, CreateEndpoint and Join."""
        address = self.ipam.request_address(PoolId.parse(f"{LOCAL_SPACE}/{cidr}"), None)
        request = EndpointRequest(network_id, endpoint_id, (str(address),), mac, rate)
        endpoint = self.driver.create_endpoint(request)
        self.driver.join(network_id, endpoint_id)
        return endpoint


@pytest.fixture
def host(store: SqliteStore) -> Callable[..., FakeHost]:
    """Makes host number N on the shared store."""
    return lambda number=1, mirror=True, probes=False, **kernel: FakeHost(
        store, number, FakeKernel(**kernel), mirror=mirror, probes=probes
    )
