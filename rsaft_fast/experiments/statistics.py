"""Means over seeds with their intervals, values at equal proxy reward, correlations: plain Python on a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rsaft_fast.evaluation.comparison import student_quantile
from rsaft_fast.evaluation.equal_reward import crossing


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % interval, by Student's t; infinite of a single seed.

    Attributes:
        mean: over the seeds.
        half: half the width of the interval.
        count: seeds.
    """

    mean: float
    half: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on that side of 0, else 0."""
        return (self.mean - self.half > 0) - (self.mean + self.half < 0)


def interval(values: Sequence[float]) -> Interval | None:
    """Compute the mean and its interval; None of no value."""
    if not values:
        return None
    mean, count = fmean(values), len(values)
    if count == 1:
        return Interval(mean, math.inf, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    return Interval(mean, student_quantile(count - 1) * deviation / math.sqrt(count), count)


def at_level(levels: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """Find the value at the first place where `levels` reaches `level`, linear between neighbours.

    Args:
        levels: the proxy along a run, in order.
        values: r* at the same places.
        level: what is to be reached, from below or at the start.

    Returns:
        None where it is never reached.
    """
    place = crossing(levels, level)
    if place is None:
        return None
    index, part = place
    return values[index] if part == 0 else values[index] + part * (values[index + 1] - values[index])


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Compute Pearson's correlation; None of fewer than three pairs, or where one side is constant."""
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values beside {len(y)}; a correlation takes pairs")
    if len(x) < 3:
        return None
    mean_x, mean_y = fmean(x), fmean(y)
    xx = math.fsum((a - mean_x) ** 2 for a in x)
    yy = math.fsum((b - mean_y) ** 2 for b in y)
    if xx == 0 or yy == 0:
        return None
    return math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / math.sqrt(xx * yy)
