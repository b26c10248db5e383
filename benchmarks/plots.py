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

from rsaft_fast.benchmarks.floors import PASSES, floor, image_floor
from rsaft_fast.benchmarks.images import WHAT
from rsaft_fast.benchmarks.jobs import HEADLINE
from rsaft_fast.benchmarks.problem import DTYPES
from rsaft_fast.benchmarks.providers import OURS
from rsaft_fast.benchmarks.results import Row, is_gpu
from rsaft_fast.benchmarks.tables import LABELS, View, milliseconds, rank
from rsaft_fast.errors import UserError

INK, FAINT, GRID, PAPER = "#222222", "#5A5A5A", "#E3E3E3", "#FFFFFF"
# Okabe and Ito's colours, told apart by every kind of colour vision. Ours are saturated, peers grey.
OURS_COLOURS = dict(zip(OURS, ("#D55E00", "#0072B2", "#009E73")))
PEER = "#B4B4B4"
MARKERS = {"norm": "o", "perturb": "s", "step": "^", "update": "D", WHAT: "P"}
_DPI = 130
_MOST_PANELS = 12


def draw(results: Row, folder: str | Path) -> list[Path]:
    """Write `bars.png` and `roofline.png` into the folder.

    Raises:
        UserError: nothing was measured.
    """
    if not any("ms_p50" in row and "gbps" in row for row in results["rows"]):
        raise UserError("nothing to draw: no row of these results was measured")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _save(figure, folder / name)
        for name, figure in (("bars.png", bars(results)), ("roofline.png", roofline(results)))
    ]


def bars(results: Row) -> Figure:
    """One panel for each list and layout, one group for each pass, one bar for each provider.

    A run of everything has two dozen panels: then those of the headline's lists are drawn.
    """
    view = View(results)
    panels: dict[tuple[str, str], list[tuple[str, list[Row]]]] = {}
    for case, dtype, what, rows in view.groups():
        if what in PASSES or what == WHAT:
            panels.setdefault((case, dtype), []).append((what, rows))
    if len(panels) > _MOST_PANELS:
        panels = {key: passes for key, passes in panels.items() if key in HEADLINE or passes[0][0] == WHAT} or panels
    heights = [sum(len(rows) + 1.4 for _, rows in passes) for passes in panels.values()]
    columns = 2 if len(panels) > 1 else 1
    grid = [heights[i : i + columns] for i in range(0, len(heights), columns)]
    row_heights = [max(row) for row in grid]
    figure = _figure(7.2 * columns, 0.21 * sum(row_heights) + 0.75 * len(grid) + 0.7)
    axes = figure.subplots(len(grid), columns, squeeze=False, gridspec_kw={"height_ratios": row_heights}).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, ((case, dtype), passes) in zip(axes, panels.items()):
        _bar_panel(axis, view, passes)
        axis.set_title(f"{case}, {dtype}", loc="left", fontsize=11, fontweight="bold", color=INK)
    _title(figure, results, "Time of each pass, median (whiskers: 20 to 80 %)")
    return figure


def _bar_panel(axis: Axes, view: View, passes: Sequence[tuple[str, list[Row]]]) -> None:
    place, ticks, labels = 0.0, [], []
    longest = max(row["ms_p80"] for _, rows in passes for row in rows)
    for what, rows in passes:
        axis.text(0, place, f" {LABELS[what]}", fontsize=9, color=FAINT, va="center", style="italic")
        place += 1
        for row in rows:
            spread = [[row["ms_p50"] - row["ms_p20"]], [row["ms_p80"] - row["ms_p50"]]]
            style = {"color": OURS_COLOURS.get(row["provider"], PEER), "height": 0.78}
            axis.barh(place, row["ms_p50"], xerr=spread, error_kw={"elinewidth": 1, "ecolor": INK}, **style)
            times = view.times_ours(row)
            said = f"{milliseconds(row['ms_p50'])} ms" + (f", {times:.2f} x ours" if times and times != 1 else "")
            axis.text(row["ms_p80"] + 0.01 * longest, place, said, fontsize=8, color=INK, va="center")
            ticks.append(place)
            labels.append(row["provider"])
            place += 1
        place += 0.4
    axis.set_yticks(ticks, labels, fontsize=8, color=INK)
    axis.set_ylim(place - 0.4, -0.8)
    axis.set_xlim(0, 1.32 * longest)
    _tidy(axis, "ms")


def roofline(results: Row) -> Figure:
    """GB/s on the floor's bytes, over how many bytes those are: the ceiling is the card's own copy."""
    view = View(results)
    points = [(row, moved) for row in view.rows if "gbps" in row and (moved := _bytes(row)) is not None]
    figure = _figure(9.6, 6.2)
    axis = figure.subplots()
    low, high = min(moved for _, moved in points) / 3, max(moved for _, moved in points) * 3
    across = np.geomspace(low, high, 200)
    for kind, line in (("copy", "-"), ("read", ":")):
        axis.axhline(results[f"{kind}_gbps"], color=INK, linewidth=1.2, linestyle=line)
        said = f"{kind}: {results[f'{kind}_gbps']:,.0f} GB/s"
        below = results[f"{kind}_gbps"] == min(results["copy_gbps"], results["read_gbps"])
        axis.annotate(
            said,
            (low, results[f"{kind}_gbps"]),
            xytext=(4, -4 if below else 4),
            textcoords="offset points",
            fontsize=9,
            color=INK,
            va="top" if below else "bottom",
        )
    bottom = min(row["gbps"] for row, _ in points) / 1.6
    for seconds, said in ((40e-6, "40 us"), (1e-3, "1 ms")) if is_gpu(results) else ():
        axis.plot(across, across / seconds / 1e9, color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
        place = (seconds * bottom * 1e9, bottom)
        axis.annotate(said, place, xytext=(8, 4), textcoords="offset points", fontsize=8, color=FAINT)
    for row, moved in sorted(points, key=lambda p: -rank(p[0]["provider"])):
        ours = row["provider"] in OURS
        colour = OURS_COLOURS.get(row["provider"], PEER)
        axis.scatter(
            moved,
            row["gbps"],
            marker=MARKERS[row["what"]],
            s=52 if ours else 30,
            facecolor=colour if ours else "none",
            edgecolor=colour if ours else "#8A8A8A",
            linewidth=0.9,
            zorder=3 if ours else 2,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(bottom, 1.6 * max(results["copy_gbps"], results["read_gbps"]))
    axis.set_ylabel("GB/s on the floor's bytes", fontsize=10, color=INK)
    _tidy(axis, "bytes that the pass must move (floor: bytes a parameter x parameters)")
    axis.grid(True, axis="y", color=GRID, linewidth=0.8)
    figure.legend(handles=_legend(points), loc="outside right center", frameon=False, fontsize=8.5)
    _title(figure, results, "Achieved bandwidth against the card's own")
    return figure


def _bytes(row: Row) -> float | None:
    if row["what"] == WHAT:
        return image_floor(DTYPES[row["dtype"]].itemsize) * row["parameters"]
    return floor(row["what"], row["dtype"]) * row["parameters"] if row["what"] in PASSES else None


def _legend(points: Sequence[tuple[Row, float]]) -> list[Line2D]:
    measured = {row["provider"] for row, _ in points}
    empty = {"linestyle": "", "markersize": 7}
    handles = [
        Line2D([], [], marker="o", color=colour, label=name, **empty)
        for name, colour in OURS_COLOURS.items()
        if name in measured
    ]
    if measured - set(OURS):
        handles.append(
            Line2D([], [], marker="o", markerfacecolor="none", markeredgecolor="#8A8A8A", label="peers", **empty)
        )
    for what in dict.fromkeys(row["what"] for row, _ in points):
        layouts = sorted({row["dtype"] for row, _ in points if row["what"] == what})
        handles.append(
            Line2D([], [], marker=MARKERS[what], color=INK, label=LABELS[what] + _floors(what, layouts), **empty)
        )
    return handles


def _floors(what: str, layouts: Sequence[str]) -> str:
    if what == WHAT:
        return "\n" + ", ".join(f"{name} {image_floor(DTYPES[name].itemsize)} B" for name in layouts)
    return "\n" + ", ".join(f"{name} {floor(what, name):.4g} B" for name in layouts)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Figure, results: Row, said: str) -> None:
    where = (
        f"{results['gpu']}, torch {results['torch']}, commit {results['commit'] or 'unknown'}, {results['date'][:10]}"
    )
    warning = "" if is_gpu(results) else " (CPU figures, not to be quoted)"
    figure.suptitle(f"{said}\n{where}{warning}", x=0.01, ha="left", fontsize=11, color=INK)


def _tidy(axis: Axes, unit: str) -> None:
    axis.set_xlabel(unit, fontsize=9, color=INK)
    axis.tick_params(labelsize=8.5, colors=INK)
    axis.grid(True, axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)
    return path
