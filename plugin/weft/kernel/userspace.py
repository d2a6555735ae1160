"""wireguard-go: WireGuard in a process, for kernels without it. Ten to forty times slower.

The process is detached, for the data plane outlives us: it belongs to no session or process group of ours, and the
systemd unit kills none but weft itself. Its UDP socket is in the network namespace where it was started; its device is
a TUN that may be moved. The device goes when the process ends; the process ends when its socket is removed, and
mostly when its device is.

It is configured over a unix socket named after its device (wireguard.com/xplatform, "Cross-platform userspace").
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from shutil import which

from weft.config import Place
from weft.dataplane import Peer
from weft.errors import KernelError
from weft.kernel.namespace import NamespaceThread
from weft.keys import PrivateKey
from weft.reconcile import Contact

_SOCKETS = "/var/run/wireguard"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_START_SECONDS = 5.0
_TIMEOUT_SECONDS = 5.0


class Userspace:
    """:param host: the namespace in which its UDP socket is to be.
    :param device: name of the TUN device."""

    name = "wireguard-go"

    def __init__(self, host: NamespaceThread, device: str) -> None:
        self._host = host
        self._device = device
        self._socket = f"{_SOCKETS}/{device}.sock"

    @staticmethod
    def installed() -> bool:
        return which("wireguard-go", path=_PATH) is not None

    def answers(self) -> bool:
        """Whether a process serves the device."""
        try:
            return bool(self._ask("get=1\n\n"))
        except OSError:
            return False

    def start(self) -> None:
        """Start the process and wait until it has made its device: one that is moved earlier, it does not find."""
        what = f"start wireguard-go for {self._device}"
        command = [which("wireguard-go", path=_PATH) or "wireguard-go", self._device]

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={"PATH": _PATH},
                cwd="/",
                start_new_session=True,
                timeout=_START_SECONDS,
            )

        try:
            done = self._host.run(run)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelError(what, 0, str(error)) from error
        if done.returncode:
            raise KernelError(what, 0, f"it says: {done.stdout.strip().rpartition('ERROR: ')[2]}")
        deadline = time.monotonic() + _START_SECONDS
        while not self.answers():
            if time.monotonic() > deadline:
                raise KernelError(what, 0, f"it does not answer: is there a /dev/net/tun? Try {' '.join(command)}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the process, if there is one: it watches its socket."""
        with suppress(FileNotFoundError):
            os.unlink(self._socket)

    def read(self) -> tuple[str, int, dict[Peer, Contact]]:
        key, port = "", 0
        peers: dict[Peer, Contact] = {}
        for block in _blocks(self._call(f"read {self._device}", "get=1\n\n")):
            if "public_key" in block:
                endpoint, _, place = block.get("endpoint", "").rpartition(":")
                peers[
                    Peer(
                        _base64(block["public_key"]),
                        block.get("allowed_ip", "").removesuffix("/32"),
                        str(ip_address(endpoint.strip("[]"))) if endpoint else "",
                        int(place or 0),
                    )
                ] = Contact(
                    int(block.get("last_handshake_time_sec", 0)) + int(block.get("last_handshake_time_nsec", 0)) / 1e9,
                    int(block.get("rx_bytes", 0)),
                    int(block.get("tx_bytes", 0)),
                )
            else:
                key = PrivateKey(bytes.fromhex(block["private_key"])).public if "private_key" in block else ""
                port = int(block.get("listen_port", 0))
        return key, port, peers

    def set_key(self, private: PrivateKey, port: int) -> None:
        lines = ["set=1", f"private_key={private.secret.hex()}"]
        if port != self.read()[1]:  # it would open its socket anew, and what has arrived in the old one is lost
            lines.append(f"listen_port={port}")
        self._call(f"set the key of {self._device}", "\n".join([*lines, "", ""]))

    def write(self, put: Iterable[Peer], delete: Iterable[str]) -> None:
        lines = ["set=1"]
        for peer in put:
            lines += [
                f"public_key={_hex(peer.key)}",
                f"endpoint={Place(peer.endpoint, peer.port)}",
                f"public_key={_hex(peer.key)}",  # a new peer runs from here on, and until then drops what it is to send
                "replace_allowed_ips=true",
                f"allowed_ip={peer.address}/32",
            ]
        for key in delete:
            lines += [f"public_key={_hex(key)}", "remove=true"]
        self._call(f"set the peers of {self._device}", "\n".join([*lines, "", ""]))

    def _call(self, what: str, request: str) -> str:
        try:
            answer = self._ask(request)
        except OSError as error:
            raise KernelError(what, error.errno or 0, "wireguard-go does not answer") from error
        body, named, errno = answer.rstrip("\n").rpartition("errno=")
        if not named or not errno.removeprefix("-").isdecimal():  # no word of it: there may be the private key in it
            raise KernelError(what, 0, "wireguard-go's answer names no errno")
        if errno != "0":
            raise KernelError(what, abs(int(errno)), "wireguard-go refused it")
        return body

    def _ask(self, request: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT_SECONDS)
            connection.connect(self._socket)
            connection.sendall(request.encode())
            answer = b""
            while not answer.endswith(b"\n\n"):
                chunk = connection.recv(1 << 16)
                if not chunk:
                    raise ConnectionResetError("the answer is incomplete")
                answer += chunk
        return answer.decode()


def _blocks(text: str) -> Iterator[dict[str, str]]:
    """The device's own values, then those of each peer, which begin with its key. Of several addresses all are kept."""
    block: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name == "public_key":
            yield block
            block = {}
        block[name] = f"{block[name]},{value}" if name in block and name == "allowed_ip" else value
    yield block


def _hex(key: str) -> str:
    return b64decode(key).hex()


def _base64(key: str) -> str:
    return b64encode(bytes.fromhex(key)).decode()
