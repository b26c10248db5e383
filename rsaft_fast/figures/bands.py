"""Curves of several runs with a band each, in panels with axes of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from rsaft_fast.errors import UserError
from rsaft_fast.figures.curves import run_style
from rsaft_fast.figures.grids import FAINT, INK, PAPER, one_line, save_png

_DPI = 100
_WIDTH, _HEIGHT = 4.4, 3.2  # of a panel, in inches


@dataclass(frozen=True)
class Band:
    """Points of a curve in order, and how far up and down its band reaches; a half that is not finite has no band.

    Attributes:
        x, y: coordinates of the points.
        half: half the height of the band at each point.
    """

    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.x) == len(self.y) == len(self.half):
            raise UserError(
                f"a band of {len(self.x)} x, {len(self.y)} y and {len(self.half)} halves; give as many of each"
            )


@dataclass(frozen=True)
class BandPanel:
    """One panel: a title, what its axes are, and label to curve."""

    title: str
    x: str
    y: str
    bands: Mapping[str, Band]


def band_figure(path: str | Path, rows: Sequence[Sequence[BandPanel]], title: str = "") -> Path:
    """Write a PNG of panels in rows, whole or not at all; a label has one colour and marker throughout.

    Args:
        rows: as many panels in each.
        title: a line over all.

    Raises:
        UserError: no panel, or rows of different lengths.
    """
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise UserError(
            f"a figure of rows with {[len(row) for row in rows]} panels; give as many in each, at least one"
        )
    labels = list(dict.fromkeys(label for row in rows for panel in row for label in panel.bands))
    styles = {label: run_style(index) for index, label in enumerate(labels)}
    size = (_WIDTH * len(rows[0]), _HEIGHT * len(rows) + 0.9)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor=PAPER)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, row in zip(axes, rows):
        for axis, panel in zip(line, row):
            _draw(axis, panel, styles)
    if title:
        figure.suptitle(one_line(title).replace("$", r"\$"), fontsize=13, color=INK)
    # Literal text: a label may hold a dollar sign, which matplotlib would read as mathematics.
    handles = [Line2D([], [], label=one_line(label).replace("$", r"\$"), **styles[label]) for label in labels]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    canvas.draw()
    return save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def _draw(axis: Axes, panel: BandPanel, styles: Mapping[str, Mapping[str, object]]) -> None:
    for label, band in panel.bands.items():
        x, y, half = (np.asarray(values, dtype=float) for values in (band.x, band.y, band.half))
        axis.plot(x, y, **styles[label])
        known = np.isfinite(half)
        axis.fill_between(
            x, y - half, y + half, where=known, color=styles[label]["color"], alpha=0.15, linewidth=0, interpolate=False
        )
    axis.set_title(one_line(panel.title), loc="left", fontsize=11, color=INK, parse_math=False)
    axis.set_xlabel(one_line(panel.x), fontsize=10, color=FAINT, parse_math=False)
    axis.set_ylabel(one_line(panel.y), fontsize=10, color=FAINT, parse_math=False)
    axis.tick_params(labelsize=9, colors=INK)
    axis.grid(True, color="#E3E3E3", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
