"""Comparison of runs at the same trained reward: who climbed further has paid more, so the ends do not compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

Columns = Mapping[str, Sequence[float]]
"""Scores of every picture by the reward's name, in one order of pictures throughout."""


@dataclass(frozen=True)
class Checkpoint:
    """A run's pictures after some updates.

    Attributes:
        step: updates done; 0 of the model that it began as.
        columns: scores of every picture.
    """

    step: int
    columns: Columns


@dataclass(frozen=True)
class AtLevel:
    """A run where its trained reward first reaches a level.

    Attributes:
        step: updates, between two checkpoints in proportion.
        columns: scores of every picture there, likewise.
    """

    step: float
    columns: dict[str, list[float]]


def crossing(levels: Sequence[float], level: float) -> tuple[int, float] | None:
    """Find where a curve first reaches a level, from below or at its start: None where it never does.

    Returns:
        the place at or before it, and which part of the way to the next place lies before it, 0 to 1.
    """
    for index, here in enumerate(levels):
        if here < level:
            continue
        if index == 0 or here == level:
            return index, 0.0
        before = levels[index - 1]
        return index - 1, (level - before) / (here - before)
    return None


def equal_reward(curves: Mapping[str, Sequence[Checkpoint]], trained: str) -> tuple[float, dict[str, AtLevel]] | None:
    """Find all runs at the highest mean of the trained reward that every one of them reaches.

    Args:
        curves: of each run by its label, from its start, in order; the runs begin as the same model.
        trained: name of the column.

    Returns:
        the level and each run there; None where some run never rises above its start.
    """
    means = {label: [fmean(one.columns[trained]) for one in curve] for label, curve in curves.items()}
    level = min(max(own) for own in means.values())
    if level <= max(own[0] for own in means.values()):
        return None
    found = {}
    for label, curve in curves.items():
        place = crossing(means[label], level)
        assert place is not None  # the level is at most its highest
        found[label] = _between(curve, *place)
    return level, found


def _between(curve: Sequence[Checkpoint], index: int, part: float) -> AtLevel:
    first, second = curve[index], curve[min(index + 1, len(curve) - 1)]
    # Of an evaluation that was stopped, some checkpoints have been scored by more rewards than others.
    names = [name for name in first.columns if name in second.columns]
    columns = {name: [a + part * (b - a) for a, b in zip(first.columns[name], second.columns[name])] for name in names}
    return AtLevel(first.step + part * (second.step - first.step), columns)
