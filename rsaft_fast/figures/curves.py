"""Curves: of runs beside a sample grid, or by themselves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, Locator, MaxNLocator
from PIL import Image, ImageDraw

from rsaft_fast.errors import UserError
from rsaft_fast.figures.grids import FAINT, INK, PAPER, compose_grid, font, one_line, run_colour, save_png, wrap

_DPI = 100
_CURVES_WIDTH, _PANEL_HEIGHT = 640, 250
_STEPS = "fine-tuning step"


@dataclass(frozen=True)
class Curve:
    """Values of one run over its steps; a value that is not finite leaves a gap."""

    steps: Sequence[float]
    values: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise UserError(f"a curve has {len(self.steps)} steps and {len(self.values)} values; give one value a step")


@dataclass(frozen=True)
class Panel:
    """One quantity of several runs.

    Attributes:
        title: what is shown, for example "True preference r*".
        unit: what it is or is measured in, under the title.
        curves: run label to its curve. A run that is also a column of the grid has that column's colour.
    """

    title: str
    unit: str
    curves: Mapping[str, Curve]


def comparison_figure(
    path: str | Path,
    prompts: Sequence[str],
    columns: Mapping[str, torch.Tensor],
    panels: Sequence[Panel],
    captions: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
    subtitle: str = "",
) -> Path:
    """Write a PNG with the pictures of every run on the left and the curves on the right, whole or not at all.

    Args:
        path: of the PNG.
        prompts, columns, captions: see `compose_grid`; the first column is what the others are compared with.
        panels: stacked from top to bottom over one axis of steps.
        title, subtitle: one line each.

    Raises:
        UserError: see `compose_grid`; no panel, or a curve whose steps and values differ in number.
    """
    if not panels:
        raise UserError("a comparison figure without panels; give at least one, or save a grid instead")
    grid = compose_grid(prompts, columns, captions)
    height = max(grid.height, _PANEL_HEIGHT * len(panels) + 60)
    curves = _draw_curves(panels, list(columns), height, _STEPS)
    heading = _draw_heading(title, subtitle, grid.width + curves.width)
    canvas = Image.new("RGB", (grid.width + curves.width, heading.height + height), PAPER)
    canvas.paste(heading, (0, 0))
    canvas.paste(grid, (0, heading.height))
    canvas.paste(curves, (grid.width, heading.height))
    return save_png(canvas, path)


def curves_figure(
    path: str | Path,
    panels: Sequence[Panel],
    axis: str,
    title: str = "",
    subtitle: str = "",
    logarithmic: bool = False,
) -> Path:
    """Write a PNG of curves alone, whole or not at all.

    Args:
        path: of the PNG.
        panels: stacked from top to bottom over one axis.
        axis: what the curves' steps are.
        title, subtitle: one line each.
        logarithmic: the axis, for steps above 0.

    Raises:
        UserError: no panel.
    """
    if not panels:
        raise UserError("a figure without curves; give at least one panel")
    curves = _draw_curves(panels, [], _PANEL_HEIGHT * len(panels) + 90, axis, logarithmic)
    heading = _draw_heading(title, subtitle, curves.width)
    canvas = Image.new("RGB", (curves.width, heading.height + curves.height), PAPER)
    canvas.paste(heading, (0, 0))
    canvas.paste(curves, (0, heading.height))
    return save_png(canvas, path)


def _draw_heading(title: str, subtitle: str, width: int) -> Image.Image:
    margin = 10
    lines = [(title, 26, True, INK), (subtitle, 17, False, FAINT)]
    lines = [line for line in lines if line[0]]
    height = sum(round(size * 1.5) for _, size, _, _ in lines) + (margin if lines else 0)
    heading = Image.new("RGB", (width, height), PAPER)
    draw, top = ImageDraw.Draw(heading), margin
    for text, size, bold, colour in lines:
        draw.text(
            (margin, top), wrap(text, width - 2 * margin, size, 1, bold)[0], colour, font(size, bold), anchor="la"
        )
        top += round(size * 1.5)
    return heading


def _draw_curves(
    panels: Sequence[Panel], columns: Sequence[str], height: int, label: str, logarithmic: bool = False
) -> Image.Image:
    """Draw all panels as a picture `_CURVES_WIDTH` wide."""
    runs = list(dict.fromkeys([*columns, *(label for panel in panels for label in panel.curves)]))
    styles = {label: run_style(index) for index, label in enumerate(runs)}
    figure = Figure(figsize=(_CURVES_WIDTH / _DPI, height / _DPI), dpi=_DPI, layout="constrained", facecolor=PAPER)
    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels):
        _draw_panel(axis, panel, styles)
    axes[-1].set_xlabel(one_line(label), fontsize=11, color=INK, parse_math=False)
    if logarithmic:
        steps = sorted({step for panel in panels for curve in panel.curves.values() for step in curve.steps})
        axes[-1].set_xscale("log")
        axes[-1].set_xticks(steps, [f"{step:g}" for step in steps])
        axes[-1].minorticks_off()
    else:
        axes[-1].set_xlim(*_step_range(panels))
        axes[-1].xaxis.set_major_locator(_step_ticks(panels))
    drawn = [label for label in runs if any(label in panel.curves for panel in panels)]
    if drawn:
        # Literal text: a run's name may hold a dollar sign, which matplotlib would read as mathematics.
        handles = [Line2D([], [], label=one_line(label).replace("$", r"\$"), **styles[label]) for label in drawn]
        figure.legend(handles=handles, loc="outside upper right", ncols=min(len(drawn), 3), frameon=False, fontsize=11)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _step_ticks(panels: Sequence[Panel]) -> Locator:
    """Choose ticks at the steps that were measured, where these are few and far enough apart for their numbers."""
    steps = sorted({step for panel in panels for curve in panel.curves.values() for step in curve.steps})
    gaps = [after - before for before, after in zip(steps, steps[1:])]
    if gaps and min(gaps) >= (steps[-1] - steps[0]) / 12:
        return FixedLocator(steps)
    return MaxNLocator(nbins=8, integer=True)


def _step_range(panels: Sequence[Panel]) -> tuple[float, float]:
    """Give the range from the first to the last step of any curve, with a margin.

    Steps without a finite value count too.
    """
    steps = [step for panel in panels for curve in panel.curves.values() for step in curve.steps] or [0, 1]
    margin = 0.03 * (max(steps) - min(steps)) or 1.0
    return min(steps) - margin, max(steps) + margin


def run_style(index: int) -> dict[str, object]:
    """Give how matplotlib draws a run's line, the same in every figure."""
    return {"color": run_colour(index), "marker": "osD^vPX*"[index % 8], "markersize": 5, "linewidth": 2}


def _draw_panel(axis: Axes, panel: Panel, styles: Mapping[str, Mapping[str, object]]) -> None:
    points = 0
    for label, curve in panel.curves.items():
        steps, values = (np.asarray(v, dtype=float) for v in (curve.steps, curve.values))
        values = np.where(np.isfinite(values), values, np.nan)
        points += int(np.isfinite(values).sum())
        # About a dozen markers, whatever the number of steps.
        axis.plot(steps, values, markevery=max(1, len(values) // 12), **styles[label])
    if points == 0:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color=FAINT)
        axis.set_yticks([])
    # Above the panel, not beside it: there a sentence has room.
    axis.set_title(one_line(panel.unit), loc="left", fontsize=11, color=FAINT, parse_math=False)
    axis.annotate(
        one_line(panel.title),
        (0, 1),
        (0, 22),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=13,
        fontweight="bold",
        color=INK,
        parse_math=False,
        annotation_clip=False,
    )
    axis.tick_params(labelsize=10, colors=INK)
    axis.grid(True, color="#E3E3E3", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)


def radius_figure(
    path: str | Path,
    curves: Mapping[str, Curve],
    errors: Mapping[str, Sequence[float]],
    title: str,
    axis_label: str,
    verdict: str,
    chosen: float,
) -> Path:
    """Write a PNG of agreement over the radius, whole or not at all.

    Args:
        curves: a judge's name to its cosine at each radius; 0 is the plain gradient.
        errors: standard errors of the same.
        axis_label: of the radius.
        verdict: a sentence under the title.
        chosen: the radius that is marked; 0 marks the plain gradient.

    Raises:
        UserError: no curve; the picture cannot be written.
    """
    if not curves:
        raise UserError("a radius figure without curves; give at least one judge's")
    figure = Figure(figsize=(9, 5.5), dpi=_DPI, layout="constrained", facecolor=PAPER)
    canvas, axis = FigureCanvasAgg(figure), figure.subplots()
    least = min((r for curve in curves.values() for r in curve.steps if r > 0), default=1.0)
    # Linear as far as the smallest radius, so that 0 has a place on a logarithmic axis.
    axis.set_xscale("symlog", linthresh=least, linscale=0.5)
    for index, (label, curve) in enumerate(curves.items()):
        colour = run_colour(index + 1)  # 0 is the grey of what comes before
        text = one_line(label).replace("$", r"\$")
        axis.errorbar(
            curve.steps,
            curve.values,
            yerr=errors[label],
            label=text,
            color=colour,
            marker="osD^vPX*"[index % 8],
            capsize=3,
        )
    axis.axhline(0, color=FAINT, linewidth=0.8)
    axis.axvline(chosen, color=FAINT, linewidth=1.2, linestyle="--")
    ticks = sorted({r for curve in curves.values() for r in curve.steps})
    axis.set_xticks(ticks, [f"{r:g}" for r in ticks])
    axis.minorticks_off()
    axis.set_xlabel(axis_label, fontsize=11, color=INK)
    axis.set_ylabel("cosine with the judge's gradient", fontsize=11, color=INK)
    axis.grid(True, color="#E3E3E3", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=11)
    figure.suptitle(one_line(title).replace("$", r"\$"), fontsize=13, fontweight="bold", color=INK)
    axis.set_title("\n".join(textwrap.wrap(verdict, 90)), loc="left", fontsize=10, color=FAINT, parse_math=False)
    canvas.draw()
    return save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)
