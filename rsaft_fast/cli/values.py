"""Readers of the values that options take. What they do not take is told with the value and its limits."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from rsaft_fast.paths import user_path, user_place


def path(text: str) -> str:
    """Read a path, with ~ expanded."""
    return _checked(user_path, text)


def place(text: str) -> str:
    """Read a path or a hub id."""
    return _checked(user_place, text)


def _checked(reader: Callable[[str], str], text: str) -> str:
    try:
        return reader(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: {error}") from None


def gigabytes(text: str) -> float:
    """Read a number of GB, from 1 to 10,000."""
    try:
        value = float(re.sub(r"(?i)\s*gi?b$", "", text.strip()))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a number of GB, such as 12") from None
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"{text[:60]} GB; it must be from 1 to 10000")
    return value


def radii(text: str) -> tuple[float, ...]:
    """Read numbers between commas, 0 or larger, in ascending order; 0, the plain gradient, is compared anyway."""
    radii = set()
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part[:60]!r} is not a number; write 0.1,0.3,1") from None
        if not 0 <= value <= 1e6:
            raise argparse.ArgumentTypeError(f"the radius {part[:60]} must be from 0 to 1e6")
        radii.add(value)
    if not radii - {0.0}:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} has no radius above 0; write 0.1,0.3,1")
    return tuple(sorted(radii - {0.0}))


def checkpoint(text: str, words: tuple[str, ...] = ("best",)) -> int | str:
    """Read a number of updates, or one of the words."""
    if text in words:
        return text
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is neither {' nor '.join(words)} nor a number of updates")
    return natural(text)


def checkpoint_or_all(text: str) -> int | str:
    """Read a number of updates, last, best or all."""
    return checkpoint(text, ("last", "best", "all"))


def natural(text: str) -> int:
    """Read a whole number, 0 or larger."""
    return _integer(text, 0)


def positive(text: str) -> int:
    """Read a whole number, 1 or larger."""
    return _integer(text, 1)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is too small; it must be at least {least}")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text[:60]} is too large; it must be below 2**63")
    return value
