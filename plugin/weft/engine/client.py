"""The local Docker Engine's API: which networks, endpoints and containers it has, when that changes, and making and
removing networks.

The only importer of the Docker SDK. Never used from a handler: the engine holds locks while it calls us.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import docker
import requests

from weft.engine.containers import Attachment, Container, Outline
from weft.engine.inventory import DockerEndpoint, DockerNetwork, Inventory
from weft.errors import EngineError
from weft.model import Network, Pool, Published

_TIMEOUT = 10
_CHANGE_TIMEOUT = 120
"""Creating and removing take several calls of the engine to our own driver, which may wait for the store."""
_OLDEST = ("20.10", "1.41")
"""The oldest engine that weft is made for, and its API."""
_WITHOUT_IPV4 = ("28.0", "1.48")
"""The first engine that has networks of IPv6 alone."""
_GATEWAY_NETWORK = "docker_gwbridge"
_GATEWAY_NAME = "gateway_"
_CONTAINER_EVENTS = ["start", "die", "rename", "connect", "disconnect"]


class _Client(docker.APIClient):  # type: ignore[misc]
    def make_network(self, asked: dict[str, Any]) -> str:
        """`create_network` with a body of ours, since that of the SDK does not know `EnableIPv4`; returns the id."""
        reply = self._result(self._post_json(self._url("/networks/create"), data=asked), json=True)
        return str(reply["Id"])


class DockerEngine:
    """See `inventory.Engine`.

    :param url: `unix:///var/run/docker.sock` or `tcp://host:port`.
    :param driver: the name under which this engine knows our driver, for networks and for their addresses.
    """

    def __init__(self, url: str, driver: str) -> None:
        self._url = url
        self._driver = driver

    def inventory(
        self,
        ids: Collection[str],
        subnets: Collection[str],
        before: Inventory | None = None,
        changed: Collection[str] = (),
    ) -> Inventory:
        with self._client() as client:
            if before is None:
                networks = tuple(map(_network, client.networks()))
                # Docker makes `none` once, in a store that it has just begun, and keeps it from then on.
                engine = next((network.id for network in networks if network.name == "none"), "")
                before = Inventory(engine, networks, client.version()["Version"], fresh=True)
            else:
                before = replace(before, fresh=False)
            asked = {*changed}.union(
                network.id
                for network in before.networks
                if not network.complete  # the list lacks the endpoints
                and (network.driver == self._driver or network.id in ids or not network.subnets.isdisjoint(subnets))
            )
            kept = [network for network in before.networks if network.id not in asked]
            return replace(before, networks=(*kept, *filter(None, (_inspect(client, one) for one in sorted(asked)))))

    def create(self, network: Network) -> str:
        published = network.published or Published()
        pools = [
            {
                "Subnet": pool.cidr,
                "IPRange": published.ranges.get(pool.cidr),
                "Gateway": published.gateways.get(pool.cidr),
                "AuxiliaryAddresses": dict(pool.auxiliary),
            }
            for pool in network.pools
        ]
        asked = {
            "Name": network.name,
            "Driver": self._driver,
            "Options": dict(published.options),
            "IPAM": {"Driver": self._driver, "Options": dict(published.ipam_options), "Config": pools},
            "CheckDuplicate": True,
            "Internal": network.internal,
            "Labels": dict(published.labels),
            "EnableIPv6": published.ipv6,
            "Attachable": published.attachable,
        }
        subnets = [pool.cidr for pool in network.pools]
        with self._client(_CHANGE_TIMEOUT) as client:
            if subnets and all(":" in cidr for cidr in subnets):
                release, api = _WITHOUT_IPV4
                if docker.utils.version_lt(client.api_version, api):
                    raise EngineError(f"network {network.name} has no IPv4: it takes Docker Engine {release} or newer")
                asked["EnableIPv4"] = False
            try:
                return client.make_network(asked)
            except docker.errors.APIError as error:
                raise EngineError(f"Docker refuses to create network {network.name}: {error.explanation}") from error

    def remove(self, network_id: str) -> bool:
        with self._client(_CHANGE_TIMEOUT) as client:
            try:
                client.remove_network(network_id)
            except docker.errors.NotFound:
                return True
            except docker.errors.APIError as error:
                if error.status_code == requests.codes.forbidden:
                    return False
                raise EngineError(f"Docker refuses to remove network {network_id[:12]}: {error.explanation}") from error
            return True

    def refused_starts(self, why: str) -> dict[str, str]:
        found = {}
        with self._client() as client:
            for exited in client.containers(all=True, filters={"status": "exited"}):
                with suppress(docker.errors.NotFound):  # it was removed meanwhile
                    container = client.inspect_container(exited["Id"])
                    if why in container["State"]["Error"] and _restarts(container):
                        found[container["Id"]] = container["Name"].removeprefix("/")
        return found

    def start(self, container_id: str) -> str:
        with self._client(_CHANGE_TIMEOUT) as client:
            try:
                client.start(container_id)
            except docker.errors.APIError as error:
                return str(error.explanation)
            return ""

    def follow(self, changed: Callable[[str], None], pruned: Callable[[], None]) -> None:
        with self._client() as client:
            events = client.events(filters={"type": "network"}, decode=True)
            changed("")
            for event in events:
                if event["Action"] == "prune":
                    pruned()
                changed(event["Actor"]["ID"])
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

    def report(self) -> dict[str, Any]:
        """All about this engine, for whoever is to help. Other plugins' settings are not ours to show."""
        with self._client() as client:
            plugins = [plugin for plugin in client.plugins() if list(_state_folders(plugin["Settings"]))]
            shown = ("Id", "Names", "Image", "State", "Status", "NetworkSettings")
            return {
                "version": client.version(),
                "info": client.info(),
                "networks": [_inspected(client, network["Id"]) for network in client.networks()],
                "containers": [{name: c.get(name) for name in shown} for c in client.containers(all=True)],
                "plugins": plugins,
            }

    def plugin_states(self) -> list[Path]:
        """Where managed plugins that are weft keep their state, on the host."""
        with self._client() as client:
            plugins = [plugin["Settings"] for plugin in client.plugins()]
        return [folder for settings in plugins for folder in _state_folders(settings)]

    @contextmanager
    def _client(self, timeout: int = _TIMEOUT) -> Iterator[_Client]:
        client = None
        try:
            client = _Client(base_url=self._url, version="auto", timeout=timeout)
            client.trust_env = False  # to look for proxies in it takes as long as all else about a request
            self._check_age(client.api_version)
            yield client
        except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
            raise EngineError(f"the Docker Engine at {self._url} does not answer: {error}") from error
        finally:
            if client is not None:
                client.close()

    def _check_age(self, api: str) -> None:
        release, oldest = _OLDEST
        if docker.utils.version_lt(api, oldest):
            raise EngineError(
                f"the Docker Engine at {self._url} is too old for weft (API {api}): upgrade it to {release} or newer"
            )


def _state_folders(settings: dict[str, Any]) -> Iterator[Path]:
    """The folder, through whichever mount the plugin sees it."""
    env = dict(text.split("=", 1) for text in settings.get("Env") or [])
    if "WEFT_RUN" in env:
        state = Path(env.get("WEFT_STATE") or "/var/lib/weft")
        for mount in settings.get("Mounts") or []:
            if state.is_relative_to(mount["Destination"]):
                yield Path(mount["Source"]) / state.relative_to(mount["Destination"])


def _restarts(container: dict[str, Any]) -> bool:
    """True if the engine starts it at its own start."""
    return container["HostConfig"]["RestartPolicy"]["Name"] not in ("", "no")


def _inspect(client: docker.APIClient, network_id: str) -> DockerNetwork | None:
    found = _inspected(client, network_id)
    return replace(_network(found), complete=True) if found else None


def _inspected(client: docker.APIClient, network_id: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = client.inspect_network(network_id)
    except docker.errors.NotFound:
        return None
    return found


def _network(found: dict[str, Any]) -> DockerNetwork:
    ipam = found["IPAM"]
    configs = {str(ip_network(c["Subnet"], strict=False)): c for c in ipam.get("Config") or [] if c.get("Subnet")}
    pools = tuple(
        Pool(
            cidr,
            _address(config.get("Gateway")),
            {name: _address(text) for name, text in (config.get("AuxiliaryAddresses") or {}).items()},
        )
        for cidr, config in configs.items()
    )
    return DockerNetwork(
        id=found["Id"],
        name=found["Name"],
        driver=found.get("Driver") or "",
        scope=found.get("Scope") or "local",
        internal=bool(found.get("Internal")),
        pools=pools,
        published=Published(
            labels=found.get("Labels") or {},
            options=found.get("Options") or {},
            ipam_options=ipam.get("Options") or {},
            ranges={cidr: c["IPRange"] for cidr, c in configs.items() if c.get("IPRange")},
            gateways={pool.cidr: pool.gateway for pool in pools if pool.gateway},
            ipv6=bool(found.get("EnableIPv6")),
            attachable=bool(found.get("Attachable")),
        ),
        endpoints=tuple(map(_endpoint, (found.get("Containers") or {}).values())),
    )


def _endpoint(container: dict[str, Any]) -> DockerEndpoint:
    addresses = (_address(container.get(key)) for key in ("IPv4Address", "IPv6Address"))
    return DockerEndpoint(
        id=container["EndpointID"],
        container=container.get("Name") or "",
        mac=container.get("MacAddress") or "",
        addresses=tuple(address for address in addresses if address),
    )


def _address(text: str | None) -> str:
    """A plain address: Docker writes some with their prefix length."""
    return str(ip_interface(text).ip) if text else ""


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
