"""The managed plugin in the lab: built from the Dockerfile, on a Debian that debootstrap makes, without a network."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab import Host, Lab
from lab.plan import PROJECT
from lab.process import run

FOLDER = PROJECT / "build/plugin"


@dataclass(frozen=True)
class Built:
    """`digest` is that of the tar file, `megabytes` the size of the unpacked root file system."""

    folder: Path
    digest: str
    megabytes: int


class Builder:
    """An engine that builds the plugin."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._imported = False

    def build(self, *options: str) -> Built:
        """Run what `make plugin` runs, with further options of `docker build`."""
        if not self._imported:
            base = run([str(PROJECT / "deploy/debian-base.sh")], timeout=900)
            self._host.docker("import", str(PROJECT / base), "base", timeout=300)
            self._imported = True
        environment = {**os.environ, "BASE": "base", "OFFLINE": "1", "DOCKER_HOST": self._host.docker_host}
        script = [str(PROJECT / "deploy/build-plugin.sh"), *options]
        said = subprocess.run(script, check=True, env=environment, timeout=900, capture_output=True, text=True).stdout
        digest, size = re.search(r"^[0-9a-f]{64}", said, re.M), re.search(r"^(\d+) MB unpacked", said, re.M)
        assert digest, said
        assert size, said
        return Built(FOLDER, digest[0], int(size[1]))


def settings(host: Host, lab: Lab, **more: str) -> list[str]:
    """Arguments of `docker plugin install` or `docker plugin set`."""
    given = {
        "WEFT_STORE": lab.plan.store_url,
        "WEFT_STATE": str(host.data / "weft"),
        "WEFT_UNDERLAY": "eth0",
        "WEFT_GC_GRACE": "1",
        **more,
    }
    return [f"{name}={value}" for name, value in given.items()]


def weft(host: Host, *arguments: str) -> str:
    """What the `weft` command prints that is in the plugin."""
    return host.run("nsenter", "-t", processes(host)[0], "-m", "/opt/weft/bin/weft", *arguments)


def processes(host: Host) -> list[str]:
    """Pids, on the host, of the plugin's processes, the oldest first."""
    return host.run("pgrep", "-f", "^/opt/weft/bin/python", check=False).split()
