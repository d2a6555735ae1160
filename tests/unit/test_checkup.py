"""What this host finds out of itself, part by part."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from errno import EPERM
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weft.config import from_environment
from weft.doctor import checkup
from weft.doctor.checkup import Checkup, Place, docker_dns
from weft.errors import KernelError

RESOLVER = "169.254.77.53"


class Refusing:
    """A kernel of which nothing can be had."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object) -> None:
            raise KernelError(name, EPERM)

        return refuse


def test_what_the_kernel_refuses_hides_nothing_that_the_daemon_knows() -> None:
    """As on a host without the namespace of the WireGuard device."""
    settings = from_environment({})
    known: Any = SimpleNamespace(problem="not registered")
    kernel: Any = Refusing()
    parts = checkup.of_daemon(settings, kernel, known, known, known, known, None, None)
    facts = Checkup(settings, kernel, lambda: Place("", ()), parts).look()
    assert (facts.registered, facts.encryption, facts.intruders) == ("not registered", "not registered", ())


def dockerd(proc: Path, pid: int, *arguments: str, inner: str = "") -> None:
    """:param inner: its number in a PID namespace of its own."""
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cmdline").write_bytes("\0".join(["/usr/bin/dockerd", *arguments, ""]).encode())
    (proc / str(pid) / "status").write_text(f"Name:\tdockerd\nNSpid:\t{pid}{inner}\nSeccomp:\t0\n")


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[str]:
    """The URL of a socket at which this process listens."""
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        yield f"unix://{path}"


def test_only_the_dockerd_that_weft_talks_to_counts(docker: str, tmp_path: Path) -> None:
    proc, file = tmp_path / "proc", tmp_path / "daemon.json"
    file.write_text(json.dumps({"dns": [RESOLVER, "1.1.1.1"]}))
    dockerd(proc, os.getpid(), "-H", "unix:///run/docker.sock", f"--config-file={file}")
    dockerd(proc, 1, "--dns", "8.8.8.8")
    assert docker_dns(RESOLVER, docker, proc=proc) == ""
    assert "--dns 8.8.8.8" in docker_dns(RESOLVER, "unix:///nowhere", file, proc), "none is told from the others"


@pytest.mark.parametrize("by", ["systemd", "nobody"])
def test_a_dockerd_in_a_container_does_not_count(docker: str, tmp_path: Path, by: str) -> None:
    """systemd makes the socket where Docker is started by docker.socket: then it does not tell which dockerd it is."""
    proc, file = tmp_path / "proc", tmp_path / "daemon.json"
    dockerd(proc, 2, "--dns", "8.8.8.8", inner="\t1")
    dockerd(proc, 3, "-H", "fd://", "--config-file", str(file))
    url = docker if by == "systemd" else "tcp://127.0.0.1:2375"
    assert docker_dns(RESOLVER, url, proc=proc) == f"there is no {file}"
