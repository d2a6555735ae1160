"""`PEERS TIMES`: a host with an encrypted network gets so many peers at once; prints the seconds that each time took.

It is what the agent does then: read the device, plan, write.
"""

import json
import sys
from contextlib import closing
from pathlib import Path
from time import perf_counter

from weft.dataplane import Peer, Tunnel
from weft.kernel import LinuxKernel
from weft.keys import PrivateKey
from weft.model import WIREGUARD_POOL
from weft.reconcile import plan_tunnel

PORT = 51820


def main(size: int, times: int) -> list[float]:
    kernel, key = LinuxKernel(Path("/run/weft")), PrivateKey.generate()
    peers = frozenset(
        Peer(PrivateKey.generate().public, str(WIREGUARD_POOL[n + 2]), "192.0.2.2", PORT + n) for n in range(size)
    )
    alone = Tunnel(key.public, f"{WIREGUARD_POOL[1]}/{WIREGUARD_POOL.prefixlen}", PORT, 1440)
    kernel.open()
    with closing(kernel):
        kernel.ensure_tunnel()
        kernel.configure_tunnel(alone, key)
        return [_once(kernel, alone, Tunnel(alone.key, alone.address, PORT, 1440, peers)) for _ in range(times)]


def _once(kernel: LinuxKernel, alone: Tunnel, full: Tunnel) -> float:
    """Seconds until it has all peers; then they are taken away again."""
    began = perf_counter()
    _apply(kernel, full)
    seconds = perf_counter() - began
    _apply(kernel, alone)
    return seconds


def _apply(kernel: LinuxKernel, wanted: Tunnel) -> None:
    seen = kernel.observe_tunnel()
    if seen is None:
        raise SystemExit("the WireGuard device is gone")
    kernel.write_peers(plan_tunnel(wanted, seen))


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
