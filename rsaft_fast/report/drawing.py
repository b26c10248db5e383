"""What a page needs to draw charts: their data and Bokeh's runtime, and pictures of them for who runs no scripts.

The figures themselves are made in the browser (pages/charts.js): Bokeh's Python side would take seconds for them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib import metadata, resources
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from rsaft_fast.figures.grids import FAINT, INK, PAPER, one_line, run_colour
from rsaft_fast.report.charts import COLOURS, UPDATES, Chart, Line

DASHES = {"solid": "-", "dashed": "--", "dotted": ":", "dashdot": "-."}
"""Bokeh's names, and matplotlib's signs."""

MARKED = "#D62728"
_STILL = (6.4, 2.6)  # inches, at 100 dots each
_DIGITS = 6


def colour_of(line: Line) -> str:
    """Give the colour of a line; the grey that stands for what comes before is none of them, nor is black."""
    return run_colour(1 + line.colour % COLOURS)


def dash_of(line: Line) -> str:
    """Name the dash pattern of a line."""
    return list(DASHES)[line.dash % len(DASHES)]


def runtime() -> list[str]:
    """Return the scripts of Bokeh's runtime."""
    folder = resources.files("bokeh") / "server" / "static" / "js"
    return [(folder / f"{name}.min.js").read_text(encoding="utf-8") for name in ("bokeh", "bokeh-api")]


def runtime_name() -> str:
    """Name Bokeh's version and licence."""
    return f"Bokeh {metadata.version('bokeh')} (BSD-3-Clause)"


def data_of(chart: Chart) -> dict[str, Any]:
    """Return what the browser draws a chart from, for JSON."""
    return {
        "title": chart.title,
        "x": chart.x_label,
        "y": chart.y_label,
        "shared": chart.x_label == UPDATES,
        "marks": [[step, what] for step, what in chart.marks],
        "markColour": MARKED,
        "lines": [
            {
                "label": line.label,
                "x": _rounded(line.x),
                "y": _rounded(line.y),
                "half": _rounded(line.half),
                "colour": colour_of(line),
                "dash": dash_of(line),
                "faint": line.faint,
                "points": line.points,
            }
            for line in chart.lines
        ],
    }


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values]


def still(charts: Sequence[Chart]) -> bytes:
    """Draw charts below each other as one PNG."""
    width, height = _STILL
    rows = len(charts)
    drawn = Figure(figsize=(width, height * rows), dpi=100, facecolor=PAPER)
    drawn.subplots_adjust(left=0.11, right=0.98, bottom=0.2 / rows, top=1 - 0.14 / rows, hspace=0.6)
    canvas = FigureCanvasAgg(drawn)
    for axis, chart in zip(drawn.subplots(rows, 1, squeeze=False).flat, charts):
        _draw(axis, chart)
    canvas.draw()
    stream = io.BytesIO()
    # Few colours: a third of the bytes.
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64).save(stream, "PNG")
    return stream.getvalue()


def _draw(axis: Axes, chart: Chart) -> None:
    for line in chart.lines:
        y, half = np.asarray(line.y, float), np.asarray(line.half, float)
        colour = colour_of(line)
        if len(half):
            axis.fill_between(line.x, y - half, y + half, color=colour, alpha=0.18, linewidth=0)
        axis.plot(
            line.x,
            y,
            color=colour,
            linestyle=DASHES[dash_of(line)],
            linewidth=1 if line.faint else 2,
            alpha=0.35 if line.faint else 1,
            label=one_line(line.label).replace("$", r"\$"),
            marker="o" if line.points else None,
            markersize=4,
        )
    for step, _ in chart.marks:
        axis.axvline(step, color=MARKED, linestyle=":", linewidth=1.2)
    axis.set_title(one_line(chart.title), loc="left", fontsize=10, color=INK, parse_math=False)
    if chart.keyed:
        axis.legend(frameon=False, fontsize=8)
    axis.set_xlabel(one_line(chart.x_label), fontsize=9, color=FAINT, parse_math=False)
    axis.tick_params(labelsize=8, colors=INK)
    axis.grid(True, color="#E3E3E3", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
