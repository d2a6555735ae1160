"""One set of namespaces (mount, UTS, network, PID) and the process that holds it: a machine's shell.

The holder is process 1 of its PID namespace, so killing it ends everything that was started inside, be it
containers and their shims, and with the last process go mounts, links and the network namespace. There is
nothing to list and nothing to forget: cleaning up after a crash is killing one verified process.

Mounts of the machine propagate into the namespace but not out of it (`slave`): a copy that stayed when the
machine unmounts something would keep it busy.

`ip netns` is not used: it mounts a new /sys over the cgroups, without which dockerd does not start.
"""

import ctypes
import os
import shlex
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lab.process import Environment, LabError, run, spawn, wait_until

# $0 names the holder in `ps`. Its stat line is read before anything is mounted, from the machine's own /proc,
# so it holds the pid and the start time as seen from outside. `wait` reaps orphans, as process 1 has to.
# It may become something else, and still be the same process: see lab/systemd.py.
_HOLDER = """
trap 'exec sh /run/lab-init' USR1
read -r stat < /proc/self/stat
echo "$stat" > "$1.new"
mv "$1.new" "$1"
while :; do sleep 86400 & wait; done
"""


_NET = 0x40000000
"""CLONE_NEWNET of setns(2), which os.setns has from Python 3.12 on."""


class Process(NamedTuple):
    """A process told apart from a later one with the same pid."""

    pid: int
    started: int

    @classmethod
    def from_stat(cls, line: str) -> "Process | None":
        """None for a zombie: it has ended, whatever its parent thinks."""
        after_name = line.rpartition(")")[2].split()
        return None if after_name[0] in "ZX" else cls(int(line.split()[0]), int(after_name[19]))

    @classmethod
    def find(cls, stat: Path) -> "Process | None":
        try:
            return cls.from_stat(stat.read_text())
        except (OSError, IndexError, ValueError):
            return None


class Namespaces:
    def __init__(self, name: str, record: Path) -> None:
        self.name = name
        self._record = record

    @property
    def holder(self) -> Process | None:
        recorded = Process.find(self._record)
        if recorded and Process.find(Path(f"/proc/{recorded.pid}/stat")) == recorded:
            return recorded
        return None

    @property
    def pid(self) -> int:
        holder = self.holder
        if holder is None:
            raise LabError(f"{self.name} is not up")
        return holder.pid

    @property
    def root(self) -> Path:
        """The files as the processes inside see them."""
        return Path(f"/proc/{self.pid}/root")

    def create(self) -> None:
        if self.holder:
            raise LabError(f"{self.name} is up already")
        self._record.unlink(missing_ok=True)
        unshare = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--propagation=slave"]
        holder = ["sh", "-c", _HOLDER, f"weft-lab {self.name}", str(self._record)]
        spawn(["setsid", "--fork", *unshare, *holder], log=self._record.with_suffix(".log"))
        wait_until(lambda: self.holder is not None, f"namespaces of {self.name}")

    def destroy(self) -> None:
        if holder := self.holder:
            os.kill(holder.pid, signal.SIGKILL)
            wait_until(lambda: self.holder is None, f"the end of {self.name}", timeout=30)

    def enter(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-n", "-p", "--", *argv]

    def dial(self, address: str, port: int, *, timeout: float) -> socket.socket:
        """A TCP connection from inside for use out here: a socket stays in the network it was made in."""

        def enter_and_connect() -> socket.socket:
            with open(f"/proc/{self.pid}/ns/net") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NET):
                    raise OSError(ctypes.get_errno(), f"setns to {self.name}")
            return socket.create_connection((address, port), timeout)

        with ThreadPoolExecutor(max_workers=1) as thread:  # of its own: setns is for one thread, and for good
            return thread.submit(enter_and_connect).result()

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 60,
        env: Environment = None,
    ) -> str:
        shown = f"{self.name}$ {shlex.join(argv)}"
        return run(self.enter(argv), shown=shown, check=check, timeout=timeout, env=env)
