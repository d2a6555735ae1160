"""Runs one of the programs in `bench.inside` in namespaces of its own. With its end goes all that it made."""

import json
import os
import sys
from typing import Any

from lab.plan import PROJECT
from lab.process import run

_UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
# A host with one card, and a /run in memory, shared as systemd has it: for the data-plane namespace, the state and the
# store.
_HOST = """
mount -t tmpfs tmpfs /run
mount --make-shared /run
ip link set lo up
ip link add eth0 type veth peer name cable
ip addr add 192.0.2.1/24 dev eth0
ip link set cable up
ip link set eth0 up
exec "$@"
"""


def run_program(name: str, *args: str, timeout: float) -> Any:
    """What the program prints, which is JSON."""
    argv = [*_UNSHARE, "sh", "-ec", _HOST, "sh", sys.executable, "-m", f"bench.inside.{name}", *args]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'plugin'}"}
    return json.loads(run(argv, shown=f"bench.inside.{name}", timeout=timeout, env=environment))
