"""Containers that were to run again after a reboot, but weft had to refuse them.

The engine tries such a start once, before weft can help it: the store may be away for longer than a container can wait,
or the cluster may have forgotten this host, whose networks are adopted only when the engine answers. So what was
refused for these reasons is started here, when they are over; once, since what is refused then has other reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from weft.engine.adoption import Adoption
from weft.engine.inventory import Engine, Inventory
from weft.engine.sweeper import Outcome
from weft.errors import UNKNOWN
from weft.presence import NOT_REGISTERED, Presence
from weft.store import Entry

log = logging.getLogger(__name__)


class Restarts:
    """See `sweeper.Sweep`; after `adoption` in a round."""

    def __init__(self, engine: Engine, presence: Presence, adoption: Adoption) -> None:
        self._engine = engine
        self._presence = presence
        self._adoption = adoption

    def forget(self) -> None:
        pass

    def sweep(self, inventory: Inventory, pools: Sequence[Entry]) -> Outcome:
        if self._presence.refused.is_set() and not self._presence.problem:
            self._start(NOT_REGISTERED)
            self._presence.refused.clear()
        if self._adoption.found_networks:
            self._start(UNKNOWN)
            self._adoption.found_networks = False
        return Outcome()

    def _start(self, why: str) -> None:
        for container, name in self._engine.refused_starts(why).items():
            if problem := self._engine.start(container):
                log.error("container %s was refused before (%s) and still cannot be started: %s", name, why, problem)
            else:
                log.warning("container %s is started: it was refused before (%s)", name, why)
