"""The local Docker Engine's API, read-only: which networks, endpoints and containers it has, and when that changes.

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

from weft.containers import Attachment, Container, Outline
from weft.errors import EngineError

_TIMEOUT = 10
_GATEWAY_NETWORK = "docker_gwbridge"
_GATEWAY_NAME = "gateway_"
_CONTAINER_EVENTS = ["start", "die", "rename", "connect", "disconnect"]


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

    def outlines(self) -> dict[str, Outline]:
        """See `containers.Engine`."""
        with self._client() as client:
            return {found["Id"]: _outline(found) for found in client.containers()}

    def container(self, container_id: str) -> Container | None:
        """See `containers.Engine`."""
        with self._client() as client:
            try:
                found = client.inspect_container(container_id)
            except docker.errors.NotFound:
                return None
        return _container(found) if found["State"]["Running"] else None

    def gateways(self) -> dict[str, str]:
        """See `containers.Engine`."""
        with self._client() as client:
            try:
                found = client.inspect_network(_GATEWAY_NETWORK)
            except docker.errors.NotFound:  # it is made with the first container that needs it
                return {}
        holders = (found.get("Containers") or {}).values()
        return {
            str(ip_interface(holder["IPv4Address"]).ip): holder["Name"].removeprefix(_GATEWAY_NAME)
            for holder in holders
            if holder["Name"].startswith(_GATEWAY_NAME) and holder["IPv4Address"]
        }

    def follow_containers(self, began: Callable[[], None], changed: Callable[[str], None]) -> None:
        """See `containers.Engine`."""
        with self._client() as client:
            events = client.events(filters={"type": ["container", "network"], "event": _CONTAINER_EVENTS}, decode=True)
            began()
            for event in events:
                actor = event["Actor"]
                changed(actor["ID"] if event["Type"] == "container" else actor["Attributes"]["container"])
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


def _outline(found: dict[str, Any]) -> Outline:
    """A container's own name is the one without a link's container before it."""
    name = next((name[1:] for name in found["Names"] if name.count("/") == 1), "")
    networks = (found.get("NetworkSettings") or {}).get("Networks") or {}
    return Outline(name, frozenset(network["EndpointID"] for network in networks.values() if network["EndpointID"]))


def _container(found: dict[str, Any]) -> Container:
    settings = found["NetworkSettings"]
    return Container(
        id=found["Id"],
        name=found["Name"].removeprefix("/"),
        hostname=found["Config"].get("Hostname") or "",
        sandbox=settings.get("SandboxKey") or "",
        attachments=tuple(
            Attachment(
                network_id=network["NetworkID"],
                network=name,
                endpoint=network["EndpointID"],
                aliases=tuple(dict.fromkeys([*(network.get("Aliases") or ()), *(network.get("DNSNames") or ())])),
                addresses=tuple(a for a in (network.get("IPAddress"), network.get("GlobalIPv6Address")) if a),
            )
            for name, network in (settings.get("Networks") or {}).items()
            if network["EndpointID"]
        ),
    )
