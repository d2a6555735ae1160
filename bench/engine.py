"""The engine's side of the plugin protocol, without an engine: what it would ask to start and to remove a container."""

import json
import socket
from http.client import HTTPConnection
from pathlib import Path
from secrets import token_hex
from typing import Any

from lab.process import LabError

_PATIENCE = 20.0


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("weft", timeout=_PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_PATIENCE)
        self.sock.connect(str(self._path))


class Engine:
    """Of one network on one host.

    :param path: weft's socket.
    """

    def __init__(self, path: Path, network_id: str, pool: str) -> None:
        self._path = path
        self._network_id = network_id
        self._pool = pool

    def request_address(self, wanted: str = "") -> str:
        answer = self._call("IpamDriver.RequestAddress", PoolID=self._pool_id, Address=wanted, Options={})
        return str(answer["Address"]).partition("/")[0]

    def create_endpoint(self, address: str) -> str:
        """Returns the endpoint's id."""
        endpoint = token_hex(32)
        interface = {"Address": f"{address}/{self._pool.partition('/')[2]}"}
        self._call("NetworkDriver.CreateEndpoint", **self._endpoint(endpoint), Interface=interface, Options={})
        return endpoint

    def join(self, endpoint: str) -> None:
        self._call("NetworkDriver.Join", **self._endpoint(endpoint), SandboxKey="/var/run/docker/netns/b", Options={})

    def delete_endpoint(self, endpoint: str) -> None:
        self._call("NetworkDriver.DeleteEndpoint", **self._endpoint(endpoint))

    def release_address(self, address: str) -> None:
        self._call("IpamDriver.ReleaseAddress", PoolID=self._pool_id, Address=address)

    @property
    def _pool_id(self) -> str:
        return f"weft-local/{self._pool}"

    def _endpoint(self, endpoint: str) -> dict[str, str]:
        return {"NetworkID": self._network_id, "EndpointID": endpoint}

    def _call(self, name: str, **body: object) -> dict[str, Any]:
        connection = _UnixConnection(self._path)
        try:
            connection.request("POST", f"/{name}", json.dumps(body))
            answer: dict[str, Any] = json.load(connection.getresponse())
        finally:
            connection.close()
        if error := answer.get("Err") or answer.get("Error"):
            raise LabError(f"{name}: {error}")
        return answer
