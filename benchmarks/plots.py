"""Pictures of a run: bars (time of every provider and pass) and the roofline (achieved GB/s against bytes moved)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from rsaft_fast.benchmarks.floors import floor, image_floor
from rsaft_fast.benchmarks.images import WHAT
from rsaft_fast.benchmarks.jobs import HEADLINE
from rsaft_fast.benchmarks.peers import DTYPES
from rsaft_fast.benchmarks.providers import OURS
from rsaft_fast.benchmarks.results import Row, is_gpu
from rsaft_fast.benchmarks.tables import LABELS, View, milliseconds, rank
from rsaft_fast.errors import UserError
from rsaft_fast.figures.grids import FAINT, INK, PAPER, RUN_COLOURS, save_png

GRID = "#E3E3E3"
OURS_COLOURS = dict(zip(OURS, RUN_COLOURS[1:4]))  # saturated; peers are grey
PEER, PEER_EDGE = "#B4B4B4", "#8A8A8A"
MARKERS = {"norm": "o", "perturb": "s", "step": "^", "update": "D", WHAT: "P"}
_MOST_PANELS = 12


def draw(results: Row, folder: str | Path) -> list[Path]:
    """Write `bars.png` and `roofline.png` into the folder.

    Raises:
        UserError: nothing was measured.
    """
    if not any("ms_p50" in row and "gbps" in row for row in results["rows"]):
        raise UserError("nothing to draw: no row of these results was measured")
    paths = []
    for name, figure in (("bars.png", bars(results)), ("roofline.png", roofline(results))):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        paths.append(save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())), Path(folder) / name))
    return paths


def bars(results: Row) -> Figure:
    """One panel for each list and layout, one group for each pass, one bar for each provider.

    A run of everything has two dozen panels: then those of the headline's lists are drawn.
    """
    view = View(results)
    panels: dict[tuple[str, str], list[tuple[str, list[Row]]]] = {}
    for case, dtype, what, rows in view.groups():
        if what in MARKERS:
            panels.setdefault((case, dtype), []).append((what, rows))
    if len(panels) > _MOST_PANELS:
        panels = {key: passes for key, passes in panels.items() if key in HEADLINE or passes[0][0] == WHAT} or panels
    heights = [sum(len(rows) + 1.4 for _, rows in passes) for passes in panels.values()]
    columns = min(len(panels), 2)
    row_heights = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)]
    lines = len(row_heights)
    figure = _figure(results, "Time of each pass, median (whiskers: 20 to 80 %)")
    figure.set_size_inches(7.2 * columns, 0.21 * sum(row_heights) + 0.75 * lines + 0.7)
    axes = figure.subplots(lines, columns, squeeze=False, gridspec_kw={"height_ratios": row_heights}).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, ((case, dtype), passes) in zip(axes, panels.items()):
        _bar_panel(axis, view, passes)
        axis.set_title(f"{case}, {dtype}", loc="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def _bar_panel(axis: Axes, view: View, passes: Sequence[tuple[str, list[Row]]]) -> None:
    place, ticks = 0.0, {}
    longest = max(row["ms_p80"] for _, rows in passes for row in rows)
    for what, rows in passes:
        axis.text(0, place, f" {LABELS[what]}", fontsize=9, color=FAINT, va="center", style="italic")
        for row in rows:
            place += 1
            low, ms, high = (row[f"ms_{quantile}"] for quantile in ("p20", "p50", "p80"))
            colour = OURS_COLOURS.get(row["provider"], PEER)
            whiskers = {"xerr": [[ms - low], [high - ms]], "error_kw": {"elinewidth": 1, "ecolor": INK}}
            axis.barh(place, ms, color=colour, height=0.78, **whiskers)
            times = view.times_ours(row)
            said = f"{milliseconds(ms)} ms" + (f", {times:.2f} x ours" if times and times != 1 else "")
            axis.text(high + 0.01 * longest, place, said, fontsize=8, color=INK, va="center")
            ticks[place] = row["provider"]
        place += 1.4
    axis.set_yticks(list(ticks), list(ticks.values()), fontsize=8, color=INK)
    axis.set_ylim(place - 0.4, -0.8)
    axis.set_xlim(0, 1.32 * longest)
    _tidy(axis, "ms")


def roofline(results: Row) -> Figure:
    """GB/s on the floor's bytes, over how many bytes those are: the ceiling is the card's own copy."""
    rows = [row for row in View(results).rows if "gbps" in row and row["what"] in MARKERS]
    points = [(row, _floor(row["what"], row["dtype"]) * row["parameters"]) for row in rows]
    figure = _figure(results, "Achieved bandwidth against the card's own")
    figure.set_size_inches(9.6, 6.2)
    axis = figure.subplots()
    low, high = min(moved for _, moved in points) / 3, max(moved for _, moved in points) * 3
    rates = {kind: results[f"{kind}_gbps"] for kind in ("copy", "read")}
    for kind, rate in rates.items():
        axis.axhline(rate, color=INK, linewidth=1.2, linestyle="-" if kind == "copy" else ":")
        offset, side = (-4, "top") if rate == min(rates.values()) else (4, "bottom")
        style = {"textcoords": "offset points", "fontsize": 9, "color": INK, "va": side}
        axis.annotate(f"{kind}: {rate:,.0f} GB/s", (low, rate), xytext=(4, offset), **style)
    bottom = min(row["gbps"] for row, _ in points) / 1.6
    across = np.geomspace(low, high, 200)
    for seconds, said in ((40e-6, "40 us"), (1e-3, "1 ms")) if is_gpu(results) else ():
        axis.plot(across, across / seconds / 1e9, color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
        style = {"textcoords": "offset points", "fontsize": 8, "color": FAINT}
        axis.annotate(said, (seconds * bottom * 1e9, bottom), xytext=(8, 4), **style)
    for row, moved in sorted(points, key=lambda point: -rank(point[0]["provider"])):
        ours = row["provider"] in OURS
        colour = OURS_COLOURS.get(row["provider"], PEER)
        style = {"marker": MARKERS[row["what"]], "s": 52 if ours else 30, "linewidth": 0.9, "zorder": 3 if ours else 2}
        style |= {"facecolor": colour if ours else "none", "edgecolor": colour if ours else PEER_EDGE}
        axis.scatter(moved, row["gbps"], **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(bottom, 1.6 * max(rates.values()))
    axis.set_ylabel("GB/s on the floor's bytes", fontsize=10, color=INK)
    _tidy(axis, "bytes that the pass must move (floor: bytes a parameter x parameters)")
    axis.grid(True, axis="y", color=GRID, linewidth=0.8)
    figure.legend(handles=_legend(rows), loc="outside right center", frameon=False, fontsize=8.5)
    return figure


def _floor(what: str, layout: str) -> float:
    return image_floor(DTYPES[layout].itemsize) if what == WHAT else floor(what, layout)


def _legend(rows: Sequence[Row]) -> list[Line2D]:
    def entry(label: str, marker: str, **style: str) -> Line2D:
        return Line2D([], [], label=label, marker=marker, linestyle="", markersize=7, **style)

    measured = {row["provider"] for row in rows}
    handles = [entry(name, "o", color=colour) for name, colour in OURS_COLOURS.items() if name in measured]
    if measured - set(OURS):
        handles.append(entry("peers", "o", markerfacecolor="none", markeredgecolor=PEER_EDGE))
    for what in dict.fromkeys(row["what"] for row in rows):
        layouts = sorted({row["dtype"] for row in rows if row["what"] == what})
        floors = ", ".join(f"{layout} {_floor(what, layout):.4g} B" for layout in layouts)
        handles.append(entry(f"{LABELS[what]}\n{floors}", MARKERS[what], color=INK))
    return handles


def _figure(results: Row, said: str) -> Figure:
    """An empty figure whose title tells where its figures are from."""
    figure = Figure(dpi=130, layout="constrained", facecolor=PAPER)
    where = (
        results["gpu"],
        f"torch {results['torch']}",
        f"commit {results['commit'] or 'unknown'}",
        results["date"][:10],
    )
    warning = "" if is_gpu(results) else " (CPU figures, not to be quoted)"
    figure.suptitle(f"{said}\n{', '.join(where)}{warning}", x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _tidy(axis: Axes, unit: str) -> None:
    axis.set_xlabel(unit, fontsize=9, color=INK)
    axis.tick_params(labelsize=8.5, colors=INK)
    axis.grid(True, axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
