"""What is wrong with the cluster, in words: what the doctor finds, and everything that shows health passes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault with one root cause; every text is one line.

    :param check: which check found it, for example `udp-port`.
    :param severity: `error` if traffic, names or new containers suffer now; `warning` if they will, or may.
    :param hosts: names of the hosts that are concerned. If the fault lies between two: who sends, then who receives.
    :param evidence: what was seen that shows the cause.
    :param command: what to type, on the host concerned, to repair it or to see more; "" if no command can. Advice in
        words is part of the evidence.
    """

    check: str
    severity: Severity
    hosts: tuple[str, ...]
    cause: str
    evidence: str
    command: str = ""


def listed(names: Iterable[str], most: int = 6) -> str:
    """For a text that would be too long with all of them."""
    shown = list(names)
    more = len(shown) - most
    return ", ".join(shown) if more <= 1 else f"{', '.join(shown[:most])} and {more} more"
