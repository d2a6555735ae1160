"""The local Docker Engine's API, read-only: which networks and endpoints it has, and when that changes.

The only importer of the Docker SDK. Never used from a handler: the engine holds locks while it calls us.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_interface, ip_network
from typing import Any

import docker
import requests

from weft.errors import EngineError

_TIMEOUT = 10


@dataclass(frozen=True, slots=True)
class EngineNetwork:
    """A Docker network.

    :param subnets: its CIDRs in canonical form; Docker may show them as they were typed.
    :param endpoints: EndpointIDs of the containers that are attached now.
    :param addresses: plain addresses of those containers, and the auxiliary ones.
    """

    id: str
    name: str
    subnets: frozenset[str]
    endpoints: frozenset[str]
    addresses: frozenset[str]


class DockerEngine:
    """See `collector.Engine`.

    :param url: `unix:///var/run/docker.sock` or `tcp://host:port`.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def networks(self, ids: Collection[str], subnets: Collection[str]) -> list[EngineNetwork]:
        """Those networks of these `ids` that exist, and all that have one of these subnets, whoever drives them."""
        with self._client() as client:
            ours = [n["Id"] for n in client.networks() if n["Id"] in ids or not _subnets(n).isdisjoint(subnets)]
            return [network for network in (_inspect(client, network_id) for network_id in ours) if network]

    def follow(self, changed: Callable[[], None]) -> None:
        """Call `changed` at every event about networks, until the engine goes away (`EngineError`)."""
        with self._client() as client:
            changed()
            for _ in client.events(filters={"type": "network"}, decode=True):
                changed()
        raise EngineError(f"the Docker Engine at {self._url} closed the event stream")

    @contextmanager
    def _client(self) -> Iterator[docker.APIClient]:
        client = None
        try:
            client = docker.APIClient(base_url=self._url, version="auto", timeout=_TIMEOUT)
            yield client
        except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
            raise EngineError(f"the Docker Engine at {self._url} does not answer: {error}") from error
        finally:
            if client is not None:
                client.close()


def _inspect(client: docker.APIClient, network_id: str) -> EngineNetwork | None:
    try:
        found = client.inspect_network(network_id)
    except docker.errors.NotFound:
        return None
    containers: list[dict[str, Any]] = list((found.get("Containers") or {}).values())
    configs = found["IPAM"].get("Config") or []
    addresses = [c.get(key) for c in containers for key in ("IPv4Address", "IPv6Address")]
    addresses += [a for config in configs for a in (config.get("AuxiliaryAddresses") or {}).values()]
    return EngineNetwork(
        id=found["Id"],
        name=found["Name"],
        subnets=_subnets(found),
        endpoints=frozenset(c["EndpointID"] for c in containers),
        addresses=frozenset(str(ip_interface(text).ip) for text in addresses if text),
    )


def _subnets(network: dict[str, Any]) -> frozenset[str]:
    configs = network["IPAM"].get("Config") or []
    return frozenset(str(ip_network(c["Subnet"], strict=False)) for c in configs if c.get("Subnet"))
