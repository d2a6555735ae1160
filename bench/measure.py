"""Figures as they come, and what is said of them: medians, percentiles, and ratios within a round.

Absolute figures wander by a factor of two over an hour on a shared machine; two figures taken within the same few
seconds do not. So a ratio is taken in each round, and the median of the rounds' ratios is what is reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations
from statistics import median
from typing import NamedTuple


class Spread(NamedTuple):
    """A median, and the middle half of the figures around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(percentile(values, 25), median(values), percentile(values, 75))


@dataclass
class Series:
    """Of one variant: a figure per round, and all the samples behind them, if a round has more than one."""

    rounds: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)

    def add(self, figure: float, samples: Sequence[float] = ()) -> None:
        self.rounds.append(figure)
        self.samples.extend(samples or [figure])

    @property
    def spread(self) -> Spread:
        return Spread.of(self.rounds)


class Results:
    """By metric and variant, in the order in which they were measured."""

    def __init__(self) -> None:
        self.series: dict[str, dict[str, Series]] = {}

    def add(self, metric: str, variant: str, figure: float, samples: Sequence[float] = ()) -> None:
        self.series.setdefault(metric, {}).setdefault(variant, Series()).add(figure, samples)

    def get(self, metric: str, variant: str) -> Series | None:
        return self.series.get(metric, {}).get(variant)

    def ratio(self, metric: str, variant: str, base: str) -> Spread | None:
        """Of the figures of two variants, round by round."""
        one, other = self.get(metric, variant), self.get(metric, base)
        if not one or not other:
            return None
        return Spread.of([a / b for a, b in zip(one.rounds, other.rounds, strict=False)])


def percentile(values: Sequence[float], percent: float) -> float:
    """With linear interpolation between the two nearest."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def in_turn(variants: Sequence[str], number: int) -> list[str]:
    """Another order in each round: what comes first, and after what, may matter."""
    orders = list(permutations(variants))
    return list(orders[number % len(orders)])
