"""The files in deploy/, as far as they can be judged without systemd and Docker."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from weft.config import RESOLVER

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize(
    ("dns", "address"), [(None, RESOLVER), ("", RESOLVER), ("169.254.7.7", "169.254.7.7"), ("off", "")]
)
def test_the_service_holds_the_resolver_s_address_before_weft_starts(
    dns: str | None, address: str, tmp_path: Path
) -> None:
    """Run as systemd would, with an `ip` that tells what it was asked."""
    unit = (DEPLOY / "weft.service").read_text()
    (line,) = re.findall(r"^ExecStartPre=-(.*ip address.*)$", unit, re.MULTILINE)
    (tmp_path / "ip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "ip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({} if dns is None else {"WEFT_DNS": dns})
    told = subprocess.run(
        shlex.split(line.replace("$$", "$")), env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert told == (f"address replace {address}/32 dev lo scope host\n" if address else "")


def test_a_container_sees_the_folder_of_docker_s_socket() -> None:
    """Docker makes a new one when it starts; a container that outlives that (live-restore) would keep the dead one."""
    bound = re.findall(r"^ +- (/[^: ]*):(/[^: ]*)", (DEPLOY / "compose.yaml").read_text(), re.MULTILINE)
    assert ("/run", "/run") in bound
    assert not [source for source, _ in bound if Path(source).suffix]
