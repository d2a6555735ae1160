"""A token bucket: what bounds a rate and lets bursts pass."""

from __future__ import annotations


class TokenBucket:
    """Full at first. Whoever shares one locks it.

    :param rate: tokens a second in the long run.
    :param burst: tokens at once.
    :param now: as for `take`, by the monotonic clock.
    """

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = now

    def take(self, now: float) -> bool:
        """Take a token, if there is one."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
