"""A server process inside a host: started detached, ready when its socket answers, ended by a signal."""

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from lab.namespaces import Namespaces, Process
from lab.process import LabError, spawn, wait_until

_PSS = re.compile(r"^Pss: +(\d+) kB$", re.MULTILINE)
_PIDFILE_THEN_EXEC = 'echo $$ > "$0"; exec "$@"'


class Daemon:
    def __init__(self, name: str, namespaces: Namespaces, log: Path) -> None:
        self.name = name
        self.log = log
        self._namespaces = namespaces
        self._pidfile = f"/run/lab-{name}.pid"  # in the host's own /run, so that a reboot forgets it

    @property
    def pid(self) -> int | None:
        """The pid as its host sees it; None if it does not run."""
        if not self._namespaces.holder:
            return None
        root = self._namespaces.root
        try:
            pid = int((root / self._pidfile[1:]).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return pid if Process.find(root / f"proc/{pid}/stat") else None

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        ready: Callable[[], bool],
        timeout: float,
    ) -> None:
        if self.pid:
            raise LabError(f"{self.name} runs already on {self._namespaces.name}")
        detached = ["setsid", "--fork", "sh", "-c", _PIDFILE_THEN_EXEC, self._pidfile, *argv]
        spawn(self._namespaces.enter(detached), log=self.log, env=env)
        what = f"an answer of {self.name} on {self._namespaces.name}"
        try:
            wait_until(lambda: self.pid is not None, what)
            wait_until(lambda: ready() or self.pid is None, what, timeout=timeout)
            if self.pid is None:
                raise LabError(f"{what}: it has ended")
        except LabError as error:
            raise LabError(f"{error}; its log ends with:\n{self.tail()}") from None

    def signal(self, name: str, *, timeout: float, group: bool = False) -> None:
        """Sends it, to its children too if wanted, and waits for the end; no error if it does not run."""
        self._send(name, group=group)
        wait_until(lambda: self.pid is None, f"end of {self.name} after SIG{name}", timeout=timeout)

    def freeze(self) -> None:
        self._send("STOP")

    def thaw(self) -> None:
        self._send("CONT")

    def _send(self, name: str, *, group: bool = False) -> None:
        if pid := self.pid:
            self._namespaces.run(["sh", "-c", f"kill -s {name} -- {'-' if group else ''}{pid}"])

    @property
    def cpu(self) -> float:
        """Seconds that it and its children have used, those that have ended included."""
        return sum(sum(map(int, stat[11:15])) for _, stat in self._processes()) / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> float:
        """Megabytes that it and its children have; what they share counts once."""
        rolled = [(process / "smaps_rollup").read_text() for process, _ in self._processes()]
        return sum(int(size) for text in rolled for size in _PSS.findall(text)) / 1024

    def _processes(self) -> Iterator[tuple[Path, list[str]]]:
        """Those of its session, each with its stat line after the name."""
        session = str(self.pid)
        for stat in self._namespaces.root.glob("proc/[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                fields = stat.read_text().rpartition(")")[2].split()
                if fields[3] == session:
                    yield stat.parent, fields

    def tail(self, lines: int = 12) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])


def answers(path: Path, request: str) -> bool:
    """Whether an HTTP server on a UNIX socket says 200 to a request without a body, as "GET /_ping"."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(2)
            connection.connect(str(path))
            connection.sendall(f"{request} HTTP/1.0\r\nHost: lab\r\nContent-Length: 0\r\n\r\n".encode())
            return b" 200 " in connection.recv(64)
    except OSError:
        return False
