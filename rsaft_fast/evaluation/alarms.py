"""Alarms of a run: what turned, since when, and by how much, read off its evaluations alone.

A monitor audits. It tells of hacking when pictures show it to one of the monitors; it does not prevent it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rsaft_fast.recipe.evaluation import HELD_OUT, REWARD

AGREEMENT, AGREEMENT_ERROR = "agreement/", "agreement_error/"
"""Before the name of a judge, in records: the cosine of gradients, and its standard error."""

IMAGE, DIVERSITY = "image/", "diversity"
Record = Mapping[str, Any]
"""An evaluation: step; values, name to mean; pictures, name to each picture's value (None where there is none)."""


@dataclass(frozen=True)
class Change:
    """A mean difference over the same pictures, and its standard error."""

    mean: float
    error: float

    @property
    def errors(self) -> float:
        """The difference in standard errors; infinite where all pictures agree."""
        return self.mean / self.error if self.error > 0 else math.copysign(math.inf, self.mean) if self.mean else 0.0


def change(before: Sequence[float | None], after: Sequence[float | None]) -> Change | None:
    """Compare the same pictures' values; None where fewer than two have both, or the numbers of pictures differ."""
    pairs = [(a, b) for a, b in zip(before, after) if a is not None and b is not None]
    if len(before) != len(after) or len(pairs) < 2:
        return None
    differences = [b - a for a, b in pairs]
    return Change(fmean(differences), stdev(differences) / math.sqrt(len(differences)))


def find_alarms(history: Sequence[Record], now: Record, errors: float, drift: float) -> list[str]:
    """List what is wrong at an evaluation, a line each, which begins with the name of the value that it is about.

    Args:
        history: the evaluations before, by rising step; the first is that of the untrained model.
        now: the evaluation.
        errors, drift: `evaluation.alarm_errors` and `.alarm_drift`.
    """
    lines = [*_opposed(now, errors)]
    if history:
        names = [name for name in now["pictures"] if name.startswith(HELD_OUT)]
        lines = [line for name in names if (line := _fallen(history, now, name, errors))] + lines
        lines += _drifted(history[0], now, drift)
    return lines


@dataclass(frozen=True)
class Fall:
    """How far a score is from its best, and what the trained reward did since.

    Attributes:
        best: updates before the evaluation at which the score was highest.
        own, trained: changes of the score and of the trained reward since then.
    """

    best: int
    own: Change
    trained: Change

    def warns(self, errors: float) -> bool:
        """Whether the score fell by so many standard errors while the trained reward rose."""
        return self.own.errors <= -errors and self.trained.mean > 0


def fall_of(history: Sequence[Record], now: Record, name: str) -> Fall | None:
    """Compare a score with its best so far; None where there is nothing to compare."""
    seen = [record for record in history if record["values"].get(name) is not None]
    if not seen:
        return None
    best = max(seen, key=lambda record: record["values"][name])
    own = change(best["pictures"][name], now["pictures"][name])
    trained = change(best["pictures"][REWARD], now["pictures"][REWARD])
    return None if own is None or trained is None else Fall(best["step"], own, trained)


def drift_of(base: Record, now: Record, name: str) -> float | None:
    """Compute by how many of their standard deviations the untrained pictures' mean has moved; None of no spread."""
    before = [value for value in base["pictures"].get(name, ()) if value is not None]
    moved = change(base["pictures"].get(name, ()), now["pictures"][name])
    if moved is None or len(before) < 2 or (spread := stdev(before)) == 0:
        return None
    return moved.mean / spread


def _fallen(history: Sequence[Record], now: Record, name: str, errors: float) -> str | None:
    """Tell of a held-out reward that is below its best while the trained reward is above its value there."""
    fall = fall_of(history, now, name)
    if fall is None or not fall.warns(errors):
        return None
    return (
        f"{name}: turned after update {fall.best}, and is {-fall.own.mean:.3g} below its value there "
        f"({-fall.own.errors:.1f} standard errors), while the trained reward rose by {fall.trained.mean:.3g}"
    )


def _opposed(now: Record, errors: float) -> list[str]:
    values, lines = now["values"], []
    for name, cosine in values.items():
        error = values.get(AGREEMENT_ERROR + name.removeprefix(AGREEMENT))
        if not name.startswith(AGREEMENT) or cosine is None or not error or cosine > -errors * 2 / 3 * error:
            continue
        lines.append(
            f"{name}: {cosine:+.3f}, {-cosine / error:.1f} standard errors below 0: updates undo what this judge likes"
        )
    return lines


def _drifted(base: Record, now: Record, drift: float) -> list[str]:
    """Tell of statistics of the pictures that have left the untrained model's range."""
    lines = []
    for name in now["pictures"]:
        moved = drift_of(base, now, name) if name.startswith(IMAGE) or name == DIVERSITY else None
        if moved is not None and abs(moved) > drift:
            lines.append(
                f"{name}: {now['values'][name]:.3g}, where the untrained model has {base['values'][name]:.3g}: "
                f"{abs(moved):.1f} standard deviations of its pictures {'above' if moved > 0 else 'below'}"
            )
    return lines
