"""The lab with a network of each kind on it, and a resident container at each end of each network.

The residents are the ends of the traffic. They also keep every network in use on both hosts, so that the container
whose start is measured is never a host's first one, for any variant.
"""

import json
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_network

from bench.metrics import BRIDGE, ENCRYPTED, OVERLAY, RAW, WEFT
from lab import Host, Lab
from lab.image import NAME as IMAGE
from lab.process import wait_until
from lab.terminal import Terminal

_SECRET = "weft_encrypted"
"""By whatever encrypts here."""
_SUBNETS = {OVERLAY: "10.91.0.0/24", WEFT: "10.92.0.0/24", BRIDGE: "10.93.0.0/24", _SECRET: "10.94.0.0/24"}
VNI = 424242
# Docker's overlay numbers its VXLANs from 4096 up, as weft does, and both are on one underlay here.
_OPTIONS = {
    OVERLAY: ["--driver", "overlay", "--attachable"],
    WEFT: ["--driver", "weft", "--ipam-driver", "weft", "--opt", f"weft.vni={VNI}"],
    BRIDGE: ["--driver", "bridge"],
    _SECRET: ["--driver", "weft", "--ipam-driver", "weft", "--opt", "encrypted"],
}
_FREE_ADDRESSES = range(100, 250)
_RESIDENT_ADDRESS = 50
_SWARM_PORT = 2377
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""How somebody makes a program end that should clean up before."""


@dataclass(frozen=True)
class Place:
    """A network namespace to run programs in: a host's, or that of its container with the pid (as the host sees it)."""

    host: Host
    address: str
    pid: str = ""

    def command(self, *argv: str) -> list[str]:
        return self.host.enter(["nsenter", "-t", self.pid, "-n", "--", *argv] if self.pid else argv)


class Rig:
    """`near` and `far` are the two ends by variant; for Docker's bridge both are on the first host."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.h1, self.h2 = lab.hosts
        self.near = {RAW: Place(self.h1, self.h1.address)}
        self.far = {RAW: Place(self.h2, self.h2.address)}

    def prepare(self, variants: Collection[str]) -> None:
        if OVERLAY in variants:
            self._start_swarm()
            self._create_network(OVERLAY, self.h1)  # it shows up on the other one with its first container
        if WEFT in variants:
            self._create_network(WEFT, self.h1)
            self._await_on_other(WEFT, True)
        if BRIDGE in variants:
            self._create_network(BRIDGE, self.h1)
        for variant in (BRIDGE, OVERLAY, WEFT):
            if variant in variants:
                self.near[variant] = self._resident(variant, self.h1, 0)
                self.far[variant] = self._resident(variant, self.h1 if variant == BRIDGE else self.h2, 1)

    def encrypt(self) -> str:
        """Add an encrypted network; return its variant, which says what encrypts."""
        self._create_network(_SECRET, self.h1)
        self._await_on_other(_SECRET, True)
        near, far = self._resident(_SECRET, self.h1, 0), self._resident(_SECRET, self.h2, 1)
        variant = ENCRYPTED[json.loads(self.h1.ask_weft("peers", "--json"))[0]["backend"]]
        self.near[variant], self.far[variant] = near, far
        return variant

    def empty(self) -> None:
        """Remove weft's network and its containers from both hosts."""
        for host in (self.h1, self.h2):
            if containers := host.docker("ps", "--all", "--quiet", "--filter", f"network={_name(WEFT)}").split():
                host.docker("rm", "--force", *containers)
        self.h1.docker("network", "rm", _name(WEFT))
        self._await_on_other(WEFT, False)

    def change_store(self, url: str) -> None:
        """Begin again with another store, after `empty`."""
        for host in (self.h1, self.h2):
            host.settings["WEFT_STORE"] = url
            host.restart_weft()
        self.prepare({WEFT})

    def _await_on_other(self, variant: str, present: bool) -> None:
        names = ("network", "ls", "--format", "{{.Name}}")
        wait_until(
            lambda: (_name(variant) in self.h2.docker(*names).split()) == present, "weft's network on the other host"
        )

    def network_id(self, variant: str, host: Host) -> str:
        return host.docker("network", "inspect", "--format", "{{.Id}}", _name(variant))

    def subnet(self, variant: str) -> str:
        return _SUBNETS[variant]

    def address(self, variant: str, round_: int) -> str:
        """One that no container has had before."""
        return str(ip_network(_SUBNETS[variant])[_FREE_ADDRESSES[round_]])

    def resident(self, variant: str, index: int) -> str:
        """Name of the container at the near end, 0, or at the far one, 1."""
        return f"{_name(variant)}-{index}"

    def start(self, variant: str, *options: str) -> str:
        """`docker run -d` on the first host; returns the container's id."""
        return self.h1.docker("run", "--detach", "--network", _name(variant), *options, IMAGE)

    def remove(self, container: str) -> None:
        self.h1.docker("rm", "--force", container)

    def _start_swarm(self) -> None:
        self.h1.docker("swarm", "init", "--advertise-addr", self.h1.address)
        token = self.h1.docker("swarm", "join-token", "--quiet", "worker")
        self.h2.docker("swarm", "join", "--token", token, f"{self.h1.address}:{_SWARM_PORT}")

    def _create_network(self, variant: str, host: Host) -> None:
        host.docker("network", "create", *_OPTIONS[variant], "--subnet", _SUBNETS[variant], _name(variant))

    def _resident(self, variant: str, host: Host, index: int) -> Place:
        name, address = self.resident(variant, index), str(ip_network(_SUBNETS[variant])[_RESIDENT_ADDRESS + index])
        host.docker("run", "--detach", "--name", name, "--network", _name(variant), "--ip", address, IMAGE)
        return Place(host, address, host.docker("inspect", "--format", "{{.State.Pid}}", name))


def _name(variant: str) -> str:
    return f"bench-{variant.replace('_', '-')}"


@contextmanager
def rig(variants: Collection[str], terminal: Terminal) -> Iterator[Rig]:
    lab = Lab(2, "bench", subnet="192.168.79.0/24")
    try:
        with terminal.step("two hosts, each with a Docker Engine and weft"):
            lab.up()
        place = Rig(lab)
        with terminal.step("a network of each kind, and containers at both ends"):
            place.prepare(variants)
        yield place
    finally:
        with _undisturbed(), terminal.step("the lab is removed"):
            lab.down()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Impatience would leave half a lab behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
