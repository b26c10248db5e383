"""Progress of a run: a line a stage, a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

INTERVAL = 10.0
"""Seconds between two lines in a file."""


def tell(line: str) -> None:
    """Print a line for the user, above the bar where there is one.

    A terminal that has gone, or a log file on a full disk, is no reason to end a run: from then on it runs silently.
    """
    if sys.stderr is None:
        return
    try:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives


def on_terminal() -> bool:
    """Tell whether somebody may be watching."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def watched(
    items: Iterable[Any], what: str, total: int, unit: str = "prompt", log: Callable[[str], None] = tell
) -> Iterator[Any]:
    """Show the progress of an iteration that may take minutes: a bar on a terminal, else a line every ten seconds."""
    if on_terminal():
        yield from tqdm(items, desc=what, total=total, unit=unit, delay=1, leave=False, dynamic_ncols=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last >= INTERVAL:
            last = time.monotonic()
            log(f"{what}: {done} of {total}")
        yield item
