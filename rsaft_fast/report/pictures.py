"""Sample grids as a page shows them: cut into pictures, small enough for all of them to travel in one file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rsaft_fast.figures.grids import CutGrid, cut_grid

BUDGET = 7 * 2**20
"""Bytes of all pictures of a page together, as they stand in it."""

SIDES = (384, 256, 192, 128)
"""Pixels of the longer side, the largest at which the budget is kept."""

BEFORE = "before"
_MARGIN = 1.2
"""Pictures of other steps may be larger than those that are measured."""

_QUALITY = 82
_PIXEL_ART = 96
"""Pixels of the longer side up to which a picture is kept exactly, and shown pixel by pixel."""


@dataclass(frozen=True)
class Gallery:
    """Pictures of runs over their steps.

    Attributes:
        steps: updates after which there is a picture.
        prompts: of the rows.
        columns: run label to the addresses (data:) of its pictures, by step and then by row; of `BEFORE` the same at
            every step, and given at the first alone. Where a run has no grid at a step, it has none.
        pixelated: whether pixels are to be seen.
        size: width and height of each picture, in pixels.
        left_out: how many steps are not shown, for want of room.
    """

    steps: Sequence[int]
    prompts: Sequence[str]
    columns: Mapping[str, Mapping[int, Sequence[str]]]
    pixelated: bool
    size: tuple[int, int]
    left_out: int


def gallery(grids: Mapping[str, Mapping[int, Path]], budget: int = BUDGET) -> Gallery | None:
    """Cut the sample grids of runs into pictures; None where there is none that can be cut.

    Args:
        grids: run label to its grids by step. Shown are the prompts of the first run that has any; a run of other
            prompts is left out.
        budget: bytes that all pictures may take.
    """
    steps = sorted({step for own in grids.values() for step in own})
    newest = [own[max(own)] for own in grids.values() if own]
    first = next((cut for path in newest if (cut := _read(path))), None)
    if first is None:
        return None
    sample = list(first.columns.values())[-1]
    exact = max(sample[0].size) <= _PIXEL_ART
    shown, side = _fitting(steps, sample, len(grids), exact, budget)
    columns: dict[str, dict[int, list[str]]] = {BEFORE: {}, **{label: {} for label in grids}}
    wanted = [(label, step) for label, own in grids.items() for step in shown if step in own]

    def encoded(label: str, step: int) -> dict[str, list[str]]:
        cut = _read(grids[label][step])
        if cut is None or cut.prompts != first.prompts:
            return {}
        needed = {name: own for name, own in cut.columns.items() if name != BEFORE or not step}
        return {name: [address(one, side, exact) for one in own] for name, own in needed.items()}

    # Reading and writing pictures holds no lock of Python's: on many cores twenty large grids take a second.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (label, step), own in zip(wanted, pool.map(lambda one: encoded(*one), wanted)):
            for name, addresses in own.items():
                if name != BEFORE:
                    columns[label][step] = addresses
                elif not columns[BEFORE]:
                    columns[BEFORE][shown[0]] = addresses
    if not columns[BEFORE] and BEFORE in first.columns:  # the grid of step 0 is not there
        columns[BEFORE][shown[0]] = [address(one, side, exact) for one in first.columns[BEFORE]]
    kept = {label: own for label, own in columns.items() if own}
    scale = min(1.0, side / max(sample[0].size))
    width, height = (round(length * scale) for length in sample[0].size)
    return Gallery(shown, first.prompts, kept, exact, (width, height), len(steps) - len(shown))


def _read(path: Path) -> CutGrid | None:
    try:
        with Image.open(path) as image:
            image.load()
            return cut_grid(image)
    except (OSError, SyntaxError, ValueError):  # of a file that is no picture, or half of one
        return None


def _fitting(
    steps: Sequence[int], sample: Sequence[Image.Image], runs: int, exact: bool, budget: int
) -> tuple[list[int], int]:
    """Choose the steps and the side at which the pictures fit, if a step's are as large as the newest ones.

    The first and the last step are always among them.
    """
    cost, side = 1.0, 1
    for side in (max(sample[0].size),) if exact else SIDES:
        cost = _MARGIN * runs * sum(len(address(picture, side, exact)) for picture in sample)
        if cost * len(steps) <= budget:
            return list(steps), side
    stride = -(-len(steps) // max(1, int(budget / cost) - 1))
    shown = list(steps[::-1][::stride][::-1])
    return (shown if steps[0] in shown else [steps[0], *shown]), side


def address(picture: Image.Image, side: int, exact: bool = False) -> str:
    """Return a picture as an address that holds all of it, at most `side` pixels long; `exact`: pixel for pixel."""
    stream = io.BytesIO()
    if exact:
        picture.convert("RGB").save(stream, "PNG")
        return data_address(stream.getvalue(), "image/png")
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    small.save(stream, "WEBP", quality=_QUALITY, method=0)
    return data_address(stream.getvalue(), "image/webp")


def data_address(content: bytes, kind: str) -> str:
    """Return bytes as an address (data:) of that kind."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
