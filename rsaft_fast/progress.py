"""Progress of a run: a line a stage, a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

INTERVAL = 10.0
"""Seconds between two lines in a file."""

_silent = False


def silence() -> None:
    """Say nothing from now on: another process of the same run talks for all."""
    global _silent
    _silent = True


def is_silent() -> bool:
    """Tell whether another process talks for this one."""
    return _silent


def tell(line: str) -> None:
    """Print a line for the user, above the bar where there is one.

    A terminal that has gone, or a log file on a full disk, is no reason to end a run: from then on it runs silently.
    """
    if sys.stderr is None or _silent:
        return
    try:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives


def on_terminal() -> bool:
    """Tell whether somebody may be watching."""
    try:
        return not _silent and sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


class Counter:
    """Show how much is done of what may take minutes: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self.what, self.total, self.done = what, total, done
        self._last = time.monotonic()
        self._bar = None
        if on_terminal():
            self._bar = tqdm(desc=what, total=total, initial=done, unit=unit, delay=1, leave=False, dynamic_ncols=True)

    def add(self, count: int = 1) -> None:
        """Count so many more as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last >= INTERVAL and self.done < self.total:
            self._last = time.monotonic()
            tell(f"{self.what}: {self.done} of {self.total}")

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def watched(items: Iterable[Item], what: str, total: int, unit: str = "prompt") -> Iterator[Item]:
    """Yield the items, which may take minutes, with a `Counter` beside them."""
    with Counter(what, total, unit) as counter:
        for item in items:
            yield item
            counter.add()
