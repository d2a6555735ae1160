"""Whether this host's weft works: told to whoever starts and stops it, and to whoever sends work here.

Two questions with two answers. *Stuck* is what only a new process helps against; an outage elsewhere is no reason to
end this one, which keeps the data plane and catches up. *Hindered* is what keeps containers from being started here
now; running ones do not notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic

from weft.agent import Agent
from weft.cluster import Cluster
from weft.encryption import Encryption
from weft.presence import Presence

STUCK_SECONDS = 30.0
"""Without a turn for so long, a loop counts as stuck: what it waits for has shorter limits."""


@dataclass(frozen=True, slots=True)
class Health:
    """Any thread may call; nothing here waits."""

    cluster: Cluster
    agent: Agent
    presence: Presence
    encryption: Encryption

    def stuck(self) -> Iterator[str]:
        """What does not go on, each in one line."""
        since = self.agent.busy_since
        if since and monotonic() - since > STUCK_SECONDS:
            yield f"the agent: it has been at one thing for {monotonic() - since:.0f} s"
        silent = monotonic() - self.presence.turned
        if silent > STUCK_SECONDS:
            yield f"signs of life: none was tried for {silent:.0f} s"

    def hindered(self) -> Iterator[str]:
        """What does not work now, each in one line."""
        if self.presence.problem:
            yield f"the store: {self.presence.problem}"
        if not self.cluster.loaded:
            yield "the store: nothing was read from it yet; what was last known is in force"
        if self.agent.problem:
            yield f"the data plane: {self.agent.problem}"
        if self.encryption.problem:
            yield f"encrypted networks: {self.encryption.problem}"
