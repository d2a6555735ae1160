"""Containers that were to run again after a reboot, when the store was away for longer than they could wait.

The engine tries such a start once. So what weft had to refuse then, it starts when the store is back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from weft.inventory import Engine, Inventory
from weft.presence import NOT_REGISTERED, Presence
from weft.store import Entry
from weft.sweeper import Outcome

log = logging.getLogger(__name__)


class Restarts:
    """See `sweeper.Sweep`."""

    def __init__(self, engine: Engine, presence: Presence) -> None:
        self._engine = engine
        self._presence = presence

    def forget(self) -> None:
        pass

    def sweep(self, inventory: Inventory, pools: Sequence[Entry]) -> Outcome:
        if self._presence.refused.is_set() and not self._presence.problem:
            for name in self._engine.start_refused(NOT_REGISTERED):
                log.warning("container %s is started: it was refused when the store was away", name)
            self._presence.refused.clear()
        return Outcome()
