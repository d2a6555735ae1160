"""Part c: what of a container's start is weft's, from its own log: `NetworkDriver.Join network … ok, 0.21 ms`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

_LINE = re.compile(r"\b(?P<name>(?:NetworkDriver|IpamDriver)\.\w+) .*, (?P<ms>[\d.]+) ms$", re.MULTILINE)
AT_START = ("IpamDriver.RequestAddress", "NetworkDriver.CreateEndpoint", "NetworkDriver.Join")
AT_START_RARELY = "NetworkDriver.EndpointOperInfo"


class Call(NamedTuple):
    name: str
    milliseconds: float


def read_calls(log: str) -> list[Call]:
    return [Call(line["name"], float(line["ms"])) for line in _LINE.finditer(log)]


def in_handlers(calls: Iterable[Call]) -> float:
    """Milliseconds that a container waited for weft."""
    return sum(call.milliseconds for call in calls if call.name in (*AT_START, AT_START_RARELY))


@dataclass
class CallTable:
    """All calls of a run, by name."""

    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    starts: int = 0

    def add(self, calls: Iterable[Call], *, starts: int) -> None:
        self.starts += starts
        for call in calls:
            self.milliseconds.setdefault(call.name, []).append(call.milliseconds)
