"""All that is to be collected, for a person who wants to know before, or now."""

from __future__ import annotations

from weft.engine.collector import Collector
from weft.engine.sweeper import Due, Sweeper
from weft.presence import Presence


class Garbage:
    """:param collector: None, as the sweeper, while weft does not talk to Docker."""

    def __init__(self, presence: Presence, sweeper: Sweeper | None, collector: Collector | None) -> None:
        self._presence = presence
        self._sweeper = sweeper
        self._collector = collector

    def due(self) -> list[Due]:
        """Hosts, then what is this host's."""
        return [*self._presence.due(), *self.mine()]

    def mine(self) -> list[Due]:
        """What this host's Docker does not have."""
        return self._collector.due(*self._sweeper.look()) if self._sweeper and self._collector else []

    def collect(self) -> list[Due]:
        """Collect what is due; return what was."""
        due = [one for one in self.due() if one.seconds == 0]
        self._presence.beat()
        if self._sweeper:
            self._sweeper.sweep()
        return due
