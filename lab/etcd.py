"""An etcd cluster on the lab's switch: each member is a machine of its own, beside the hosts and not on one.

So a host can lose the store without losing another host, and a member can lose the others without losing the hosts.
"""

import json
import shutil
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from typing import Any

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
_MACHINE = """
mount -n -t proc proc /proc
mount -n -t tmpfs -o mode=755 tmpfs /run
"""


class Member(Machine):
    """One etcd process with its data, on a machine of its own."""

    def __init__(self, plan: Plan, index: int, underlay: Underlay) -> None:
        super().__init__(plan, plan.members[index], index, underlay)
        self.etcd = Daemon("etcd", self._namespaces, self.data / "etcd.log")
        self._client_url = f"http://{in_url(self.address)}:{CLIENT_PORT}"

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
        peers = {name: f"http://{in_url(self._plan.address(i))}:{_PEER_PORT}" for i, name in self._plan.members.items()}
        options = {
            "name": self.name,
            "data-dir": self.data / "etcd",
            "listen-client-urls": self._client_url,
            "advertise-client-urls": self._client_url,
            "listen-peer-urls": peers[self.name],
            "initial-advertise-peer-urls": peers[self.name],
            "initial-cluster": ",".join(f"{name}={url}" for name, url in peers.items()),
        }
        argv = ["etcd", *(f"--{option}={value}" for option, value in options.items())]
        self.etcd.start(argv, env=self._environment(), ready=self.serves, timeout=30)

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
        connection = HTTPConnection(self.address)
        connection.sock = self._namespaces.dial(self.address, CLIENT_PORT, timeout=_PATIENCE)
        with closing(connection):
            connection.request("POST", f"/v3/{path}", json.dumps(body))
            response = connection.getresponse()
            answer: dict[str, Any] = json.load(response)
        if response.status != 200:
            raise LabError(f"{self.name}: {path}: {answer.get('message')}")
        return answer

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

    def boot(self) -> None:
        if self.members and not shutil.which("etcd"):
            raise LabError("etcd is missing: lab/setup.sh installs what the lab needs")
        all_at_once(Member.boot, self.members)

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
        start = f"{_ROOT}{prefix}"
        end = start[:-1] + chr(ord(start[-1]) + 1)
        member = self._first(Member.serves, "no member of etcd serves")
        found = member.call("kv/range", {"key": _base64(start), "range_end": _base64(end)}).get("kvs", [])
        return {_text(one["key"]).removeprefix(_ROOT): _text(one.get("value", "")) for one in found}

    def put(self, key: str, value: str) -> None:
        """Past weft, as nobody should."""
        member = self._first(Member.serves, "no member of etcd serves")
        member.call("kv/put", {"key": _base64(_ROOT + key), "value": _base64(value)})

    def delete(self, prefix: str) -> None:
        start = f"{_ROOT}{prefix}"
        end = start[:-1] + chr(ord(start[-1]) + 1)
        member = self._first(Member.serves, "no member of etcd serves")
        member.call("kv/deleterange", {"key": _base64(start), "range_end": _base64(end)})

    def _first(self, fits: Callable[[Member], bool], otherwise: str) -> Member:
        for member in self.members:
            if fits(member):
                return member
        raise LabError(otherwise)


def _base64(text: str) -> str:
    return b64encode(text.encode()).decode()


def _text(encoded: str) -> str:
    return b64decode(encoded).decode()
