"""A real etcd cluster on this machine, whose members a test can kill, freeze and restart."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lab.certificates import Certificates

MISSING = "" if shutil.which("etcd") else "etcd is not installed: run lab/setup.sh"
"""Why there can be no etcd here."""
_READY_SECONDS = 60.0
_LOG_TAIL = 2000
_PORTS = range(20000, 32000)
"""Below those that the kernel gives to connections: one of these could take a member's port before it listens."""


def in_memory() -> TemporaryDirectory[str]:
    """A folder with no disk behind it: etcd waits for the disk at each write, and a busy one takes seconds."""
    return TemporaryDirectory(prefix="weft-etcd-", dir="/dev/shm")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a member runs: its address, and the command that leads into its namespace."""

    address: str = "127.0.0.1"
    enter: tuple[str, ...] = ()


class Member:
    """One etcd process with its data."""

    def __init__(self, number: int, place: Place, folder: Path, tls: Certificates | None) -> None:
        self.name = f"m{number}"
        self.tls = tls
        ports = _free_ports(2) if not place.enter else (2379, 2380)
        self.endpoint = f"{'https' if tls else 'http'}://{place.address}:{ports[0]}"
        self.peer = f"http://{place.address}:{ports[1]}"
        self._enter = place.enter
        self._folder = folder / self.name
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, members: Sequence[Member], options: Sequence[str] = ()) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "name": self.name,
            "data-dir": self._folder / "data",
            "listen-client-urls": self.endpoint,
            "advertise-client-urls": self.endpoint,
            "listen-peer-urls": self.peer,
            "initial-advertise-peer-urls": self.peer,
            "initial-cluster": ",".join(f"{member.name}={member.peer}" for member in members),
        }
        if self.tls:
            certificate, key = self.tls.server
            settings |= {"cert-file": certificate, "key-file": key, "trusted-ca-file": self.tls.ca}
            settings["client-cert-auth"] = "true"
        argv = [*self._enter, "etcd", *(f"--{name}={value}" for name, value in settings.items()), *options]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def freeze(self) -> None:
        stopped = self._signal(signal.SIGSTOP)
        os.waitpid(stopped, os.WUNTRACED)  # on a busy machine it may answer for a while

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None

    def call(self, path: str, body: dict[str, Any], token: str = "", timeout: float = 20) -> dict[str, Any]:
        """This member's own answer, by another HTTP client than weft's."""
        request = urllib.request.Request(f"{self.endpoint}/v3/{path}", json.dumps(body).encode())
        request.add_header("Grpc-Metadata-hasleader", "true")
        if token:
            request.add_header("Authorization", token)
        with urllib.request.urlopen(request, timeout=timeout, context=self._context()) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def check_runs(self) -> None:
        if self._process and self._process.poll() is not None:
            log = (self._folder / "log").read_text(errors="replace")[-_LOG_TAIL:]
            raise AssertionError(f"{self.name} has ended ({self._process.returncode}):\n{log}")

    def answers(self) -> bool:
        """Whether it serves, with a leader."""
        try:
            self.call("kv/range", {"key": base64("x")}, timeout=2)
        except urllib.error.HTTPError as error:
            return error.code not in (503, 504)
        except (OSError, ValueError):
            return False
        return True

    def leads(self) -> bool:
        status = self.call("maintenance/status", {})
        return bool(status["leader"] == status["header"]["member_id"])

    def _signal(self, number: signal.Signals) -> int:
        """Returns the process id."""
        assert self._process
        self._process.send_signal(number)
        return self._process.pid

    def _context(self) -> ssl.SSLContext | None:
        if self.tls is None:
            return None
        context = ssl.create_default_context(cafile=str(self.tls.ca))
        context.load_cert_chain(*self.tls.client)
        return context


class Cluster:
    """Members that are up when this returns.

    :param folder: where their data and logs are.
    :param options: more of etcd's command line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        places: Sequence[Place] = (Place(),),
        tls: Certificates | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.members = [Member(number, place, folder, tls) for number, place in enumerate(places)]
        self._options = options
        try:
            self.start()
        except BaseException:
            self.kill()
            raise

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    @property
    def leader(self) -> Member:
        return next(member for member in self.members if member.leads())

    def start(self, *only: Member) -> None:
        """Start these members or all, and wait until they serve."""
        for member in only or self.members:
            member.start(self.members, self._options)
        self.wait(*only)

    def wait(self, *only: Member) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        for member in only or self.members:
            while not member.answers():
                member.check_runs()
                assert time.monotonic() < deadline, f"{member.name} does not serve"
                time.sleep(0.02)

    def kill(self) -> None:
        for member in self.members:
            member.kill()

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.members[0].call(path, body)

    def forget_history(self) -> None:
        """Compact everything up to now."""
        revision = self.call("kv/range", {"key": base64("x")})["header"]["revision"]
        self.call("kv/compaction", {"revision": revision})

    def want_passwords(self, user: str, password: str, prefix: str) -> None:
        """Turn authentication on. This user may do everything under a prefix, and nothing else."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        permission = {"permType": "READWRITE", "key": base64(prefix), "range_end": base64(end)}
        for name, role in (("root", "root"), (user, "part")):
            self.call("auth/role/add", {"name": role})
            self.call("auth/user/add", {"name": name, "password": password})
            self.call("auth/user/grant", {"user": name, "role": role})
        self.call("auth/role/grant", {"name": "part", "perm": permission})
        self.call("auth/enable", {})


def base64(text: str) -> str:
    return b64encode(text.encode()).decode()


def _free_ports(number: int) -> tuple[int, ...]:
    free: list[int] = []
    while len(free) < number:
        port = random.choice(_PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            free.append(port)
    return tuple(free)
