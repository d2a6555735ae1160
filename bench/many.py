"""Part j: many networks on one host, each with a container: what the next one costs, and what they all cost at rest.

Those of the bridge driver come first, and are gone before weft's. What a network more costs is compared between the
first and the last tenth of them, so it does not matter how quick the machine is.
"""

from dataclasses import dataclass, field
from ipaddress import ip_network
from itertools import islice
from statistics import mean
from time import monotonic, sleep

from bench.calls import AT_START, Call, read_calls
from bench.measure import Results
from bench.metrics import BRIDGE, WEFT
from bench.rig import Rig
from lab.image import NAME as IMAGE
from lab.process import wait_until
from lab.terminal import Terminal

VARIANTS = [BRIDGE, WEFT]
COSTS = {
    "create": "docker network create",
    "start": "docker run -d",
    "engine_cpu": "CPU of the engine for both",
    "create_calls": "weft's handlers for the network",
    "start_calls": "weft's handlers for the container",
    "weft_cpu": "CPU of weft for both",
    "other_cpu": "CPU of weft on the other host",
}
"""All in milliseconds."""

_AT_CREATE = ("IpamDriver.RequestPool", "IpamDriver.RequestAddress", "NetworkDriver.CreateNetwork")
_POOL = ip_network("10.96.0.0/16")
"""Docker itself chooses no more than 31 subnets by itself."""
_PATIENCE = 120.0
_SETTLE = 5.0


@dataclass
class Many:
    """By variant and cost (of `COSTS`), a figure for each network in turn."""

    costs: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def tenths(figures: list[float]) -> tuple[float, float]:
    """What is usual in the first and in the last tenth."""
    size = max(1, len(figures) // 10)
    return _usual(figures[:size]), _usual(figures[-size:])


def _usual(figures: list[float]) -> float:
    """The mean of the middle half: a processor's time comes in coarse ticks, of which a median would keep one."""
    quarter = len(figures) // 4
    return mean(sorted(figures)[quarter : len(figures) - quarter])


def measure(rig: Rig, results: Results, many: Many, terminal: Terminal, *, networks: int, rest: float) -> None:
    """:param rest: seconds to look at weft at rest."""
    for variant in VARIANTS:
        crowd = _Crowd(rig, variant)
        costs = many.costs[variant] = {}
        with terminal.step(f"{networks} networks, {variant}, each with a container"):
            for _ in range(networks):
                for cost, figure in crowd.grow().items():
                    costs.setdefault(cost, []).append(figure)
        for cost, figures in costs.items():
            first, last = tenths(figures)
            results.add(f"many_{cost}_growth", variant, last / first)
        if variant == WEFT:
            with terminal.step(f"{rest:g} s of rest among them"):
                for name, figure in crowd.rest(rest).items():
                    results.add(f"many_{name}", variant, figure)
        with terminal.step("they are removed"):
            crowd.remove()


class _Crowd:
    """Networks with a container each, on the first host, whose network each other host has as well."""

    def __init__(self, rig: Rig, variant: str) -> None:
        self._h1, self._h2 = rig.h1, rig.h2
        self._variant = variant
        self._names: list[str] = []

    def grow(self) -> dict[str, float]:
        """Costs of a network more, and of a container on it."""
        number = len(self._names)
        name, pool = f"many-{number}", next(islice(_POOL.subnets(new_prefix=24), number, None))
        chosen = ["--driver", "weft", "--ipam-driver", "weft"] if self._variant == WEFT else ["--subnet", str(pool)]
        self._names.append(name)
        before = self._cpu()
        create, at_create = self._timed("network", "create", *chosen, name)
        start, at_start = self._timed("run", "--detach", "--network", name, "--name", name, IMAGE)
        found = {"create": create, "start": start}
        if self._variant == WEFT:
            found["create_calls"] = _spent(at_create, _AT_CREATE)
            found["start_calls"] = _spent(at_start, AT_START)
        return found | {cost: (now - before[cost]) * 1000 for cost, now in self._cpu().items()}

    def _timed(self, *command: str) -> tuple[float, list[Call]]:
        """Milliseconds of a docker command, and weft's calls meanwhile."""
        log, began = self._h1.log("weft"), monotonic()
        self._h1.docker(*command)
        took = (monotonic() - began) * 1000
        return took, read_calls(self._h1.log("weft")[len(log) :])

    def _cpu(self) -> dict[str, float]:
        found = {"engine_cpu": self._h1.engine.cpu}
        if self._variant == WEFT:
            found |= {"weft_cpu": self._h1.weft.cpu, "other_cpu": self._h2.weft.cpu}
        return found

    def rest(self, seconds: float) -> dict[str, float]:
        """Of weft, with all these networks, when nothing goes on."""
        sleep(_SETTLE)
        before = self._cpu()
        sleep(seconds)
        cpu = {cost: (now - before[cost]) / seconds * 100 for cost, now in self._cpu().items()}
        return {
            "idle_percent": cpu["weft_cpu"],
            "idle_engine_percent": cpu["engine_cpu"],
            "idle_mb": self._h1.weft.memory,
        }

    def remove(self) -> None:
        self._h1.docker("rm", "--force", *self._names, timeout=_PATIENCE)
        self._h1.docker("network", "rm", *self._names, timeout=_PATIENCE)
        listing = ("network", "ls", "--format", "{{.Name}}")
        wait_until(
            lambda: not set(self._h2.docker(*listing).split()) & set(self._names),
            "the end of weft's networks on the other host",
            timeout=_PATIENCE,
        )


def _spent(calls: list[Call], names: tuple[str, ...]) -> float:
    return sum(call.milliseconds for call in calls if call.name in names)
