"""How far a training run is: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from rsaft_fast.progress import INTERVAL, on_terminal, tell

WINDOW = 20
"""Updates whose mean is shown: a batch's reward is noisy."""


LEAST_BAR = 10
"""Cells; figures that leave fewer are not shown."""


class Progress:
    """Progress of the updates: a bar on a terminal, else lines.

    A line after the first and the last update and every ten seconds between.
    """

    def __init__(
        self,
        done: int,
        total: int,
        title: str | None = None,
        log: Callable[[str], None] = tell,
        earlier: Sequence[Mapping[str, Any]] = (),
        shown: Mapping[str, str] = MappingProxyType({"reward": "reward", "s1": "S1"}),
        latest: Mapping[str, str] = MappingProxyType({}),
        beside: Mapping[str, str] = MappingProxyType({}),
    ):
        """
        Args:
            earlier: the records of the updates done, for the means.
            shown: the figures beside the bar, name in a record to label; the first stands before the times.
            latest: the same of figures whose last value is shown, not their mean: those that few updates have.
            beside: the same of figures that stand directly behind the first of `shown`.
        """
        self.total, self.title, self._log = total, title, log
        self._started, self._done = time.monotonic(), done
        self._told = -math.inf
        self._labels = {**shown, **latest}
        self._beside = dict(beside)
        self._recent: dict[str, deque[float]] = {
            **{name: deque(maxlen=WINDOW) for name in (*shown, "seconds")},
            **{name: deque(maxlen=1) for name in (*latest, *beside)},
        }
        for record in earlier[-WINDOW:]:
            self.take_in(record)
        self._bar = None
        if on_terminal():
            form = "{desc} |{bar}| {percentage:.0f}%"
            self._bar = tqdm(desc=self.text(done, self._room()), initial=done, total=total, bar_format=form)

    def update(self, record: Mapping[str, Any]) -> None:
        """Take in one update's record."""
        step = record["step"]
        self.take_in(record)
        if self._bar is not None:
            self._bar.ncols = shutil.get_terminal_size().columns
            self._bar.set_description_str(self.text(step, self._room()), refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._told >= INTERVAL or step == self.total:
            self._told = time.monotonic()
            self._log(f"update {self.text(step)}")

    def take_in(self, record: Mapping[str, Any]) -> None:
        """Show these figures from the next update on."""
        for name, values in self._recent.items():
            value = record.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                values.append(value)

    def text(self, step: int, room: int | None = None) -> str:
        """The figures, the most important first; as many as `room` characters hold."""
        parts = [f"{self.title} {step}/{self.total}" if self.title else f"{step}/{self.total}"]
        figures = [
            (f"{label} {_mean(values):.4g}", len(values))
            for name, label in self._labels.items()
            if (values := self._recent[name])
        ]
        if figures:
            parts.append(f"{figures[0][0]} (mean of {figures[0][1]})")
        for name, label in self._beside.items():
            parts += [f"{label} {_mean(values):.4g}"] if (values := self._recent[name]) else []
        if seconds := self._recent["seconds"]:
            parts.append(f"{_mean(seconds):.3g} s/update")
        if step > self._done:
            left = (self.total - step) * (time.monotonic() - self._started) / (step - self._done)
            parts.append(f"{_duration(left)} left")
        parts += [text for text, _ in figures[1:]]
        while room is not None and len(parts) > 1 and len(", ".join(parts)) > room:
            parts.pop()
        return ", ".join(parts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    @staticmethod
    def _room() -> int:
        return shutil.get_terminal_size().columns - LEAST_BAR - len(" || 100%") - 1


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values)


def _duration(seconds: float) -> str:
    if seconds > 99 * 86400:
        return "over 99 days"
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock.removeprefix("0:")
