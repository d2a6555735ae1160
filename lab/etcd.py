"""An etcd cluster on the lab's switch: each member is a machine of its own, beside the hosts and not on one.

So a host can lose the store without losing another host, and a member can lose the others without losing the hosts.
"""

import json
import shutil
import ssl
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from socket import socket
from typing import Any

from lab.certificates import Certificates
from lab.daemon import Daemon
from lab.machine import Machine
from lab.plan import CLIENT_PORT, Plan, in_url
from lab.process import LabError, all_at_once, wait_until
from lab.underlay import Underlay

_PEER_PORT = 2380
_PATIENCE = 2.0
"""Seconds to wait for a member's answer."""
_ROOT = "/weft/v1/"
"""What weft's keys begin with, unless WEFT_STORE says otherwise."""
_PASSWORD = "correct horse"
"""Of etcd's users, root and weft."""
_MACHINE = """
mount -n -t proc proc /proc
mount -n -t tmpfs -o mode=755 tmpfs /run
"""


class Member(Machine):
    """One etcd process with its data, on a machine of its own."""

    def __init__(self, plan: Plan, index: int, underlay: Underlay) -> None:
        super().__init__(plan, plan.members[index], index, underlay)
        self.etcd = Daemon("etcd", self._namespaces, self.data / "etcd.log")
        self._scheme = "https" if plan.secure else "http"
        self._client_url = f"{self._scheme}://{in_url(self.address)}:{CLIENT_PORT}"

    @property
    def daemons(self) -> list[Daemon]:
        return [self.etcd]

    def boot(self) -> None:
        """Returns when the member serves, for which most of the members have to boot."""
        self.power_on()
        self.run("sh", "-ec", _MACHINE)
        self.plug_in()
        self.start()

    def start(self) -> None:
        peers = {
            name: f"{self._scheme}://{in_url(self._plan.address(i))}:{_PEER_PORT}"
            for i, name in self._plan.members.items()
        }
        options = {
            "name": self.name,
            "data-dir": self.data / "etcd",
            "listen-client-urls": self._client_url,
            "advertise-client-urls": self._client_url,
            "listen-peer-urls": peers[self.name],
            "initial-advertise-peer-urls": peers[self.name],
            "initial-cluster": ",".join(f"{name}={url}" for name, url in peers.items()),
        }
        argv = ["etcd", *(f"--{option}={value}" for option, value in options.items()), *self._tls()]
        self.etcd.start(argv, env=self._environment(), ready=self.serves, timeout=30)

    def _tls(self) -> list[str]:
        """As docs/etcd.md says."""
        if not self._plan.secure:
            return []
        folder = self._plan.certificates
        files = {"cert-file": "server.crt", "key-file": "server.key", "trusted-ca-file": "ca.crt"}
        named = [f"--{kind}{option}={folder / file}" for kind in ("", "peer-") for option, file in files.items()]
        return [*named, "--client-cert-auth", "--peer-client-cert-auth", "--bcrypt-cost=4"]

    def start_missing(self) -> None:
        if not self.etcd.pid:
            self.start()

    def kill(self) -> None:
        self.etcd.signal("KILL", timeout=10)

    def freeze(self) -> None:
        """It stops in its tracks, while its kernel goes on taking what is sent to it."""
        self.etcd.freeze()

    def thaw(self) -> None:
        self.etcd.thaw()

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """This member's answer over its JSON gateway, asked on its own machine, whatever is cut."""
        login = path != "auth/authenticate" and self._plan.password.exists()
        token = self.call("auth/authenticate", {"name": "root", "password": _PASSWORD})["token"] if login else ""
        connection = HTTPConnection(self.address)
        connection.sock = self._dial()
        with closing(connection):
            connection.request("POST", f"/v3/{path}", json.dumps(body), {"Authorization": token} if token else {})
            response = connection.getresponse()
            answer: dict[str, Any] = json.load(response)
        if response.status != 200:
            raise LabError(f"{self.name}: {path}: {answer.get('message')}")
        return answer

    def _dial(self) -> socket:
        plain = self._namespaces.dial(self.address, CLIENT_PORT, timeout=_PATIENCE)
        if not self._plan.secure:
            return plain
        folder = self._plan.certificates
        context = ssl.create_default_context(cafile=folder / "ca.crt")
        context.load_cert_chain(folder / "client.crt", folder / "client.key")
        return context.wrap_socket(plain, server_hostname=self.address)

    def serves(self) -> bool:
        """Whether it answers, with most of the members behind it."""
        return self._answer("kv/range", {"key": _base64("x")}) is not None

    def leads(self) -> bool:
        status = self._answer("maintenance/status", {})
        return status is not None and status.get("leader") == status["header"]["member_id"]

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """None if it does not run, is frozen, or says no."""
        try:
            return self.call(path, body) if self.etcd.pid else None
        except (LabError, OSError, HTTPException):
            return None


class Etcd:
    """The members, and what weft keeps there, read past weft."""

    def __init__(self, plan: Plan, underlay: Underlay) -> None:
        self.members = [Member(plan, index, underlay) for index in plan.members]
        self._plan = plan

    def boot(self) -> None:
        if self.members and not shutil.which("etcd"):
            raise LabError("etcd is missing: lab/setup.sh installs what the lab needs")
        if self._plan.secure:
            Certificates(self._plan.certificates, [member.address for member in self.members])
        all_at_once(Member.boot, self.members)
        if self._plan.secure:
            self._want_users()

    def _want_users(self) -> None:
        """weft's may do what docs/etcd.md says, and nothing else."""
        start, end = _range("/weft/")
        for name, role in (("root", "root"), ("weft", "weft")):
            self._call("auth/role/add", {"name": role})
            self._call("auth/user/add", {"name": name, "password": _PASSWORD})
            self._call("auth/user/grant", {"user": name, "role": role})
        permission = {"permType": "READWRITE", "key": start, "range_end": end}
        self._call("auth/role/grant", {"name": "weft", "perm": permission})
        self._call("auth/enable", {})
        self._plan.password.write_text(f"{_PASSWORD}\n")

    def start(self) -> None:
        all_at_once(Member.start, self.members)

    def kill(self) -> None:
        all_at_once(Member.kill, self.members)

    def freeze(self) -> None:
        all_at_once(Member.freeze, self.members)

    def thaw(self) -> None:
        all_at_once(Member.thaw, self.members)
        wait_until(lambda: all(member.serves() for member in self.members), "etcd, which was frozen", timeout=30)

    @property
    def leader(self) -> Member:
        return self._first(Member.leads, "no member of etcd leads")

    def entries(self, prefix: str = "") -> dict[str, str]:
        """Values by key, without what all keys begin with, as they stand at one moment."""
        start, end = _range(_ROOT + prefix)
        found = self._call("kv/range", {"key": start, "range_end": end}).get("kvs", [])
        return {_text(one["key"]).removeprefix(_ROOT): _text(one.get("value", "")) for one in found}

    def put(self, key: str, value: str) -> None:
        """Past weft, as nobody should."""
        self._call("kv/put", {"key": _base64(_ROOT + key), "value": _base64(value)})

    def delete(self, prefix: str) -> None:
        start, end = _range(_ROOT + prefix)
        self._call("kv/deleterange", {"key": start, "range_end": end})

    def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._first(Member.serves, "no member of etcd serves").call(path, body)

    def _first(self, fits: Callable[[Member], bool], otherwise: str) -> Member:
        for member in self.members:
            if fits(member):
                return member
        raise LabError(otherwise)


def _base64(text: str) -> str:
    return b64encode(text.encode()).decode()


def _range(prefix: str) -> tuple[str, str]:
    """Of all keys that begin with it."""
    return _base64(prefix), _base64(prefix[:-1] + chr(ord(prefix[-1]) + 1))


def _text(encoded: str) -> str:
    return b64decode(encoded).decode()
