"""Pictures of a run: bars (time of every provider and pass) and the roofline (achieved GB/s against bytes moved)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsaft_fast.benchmarks.floors import floor, image_floor
from rsaft_fast.benchmarks.jobs import HEADLINE
from rsaft_fast.benchmarks.peers import DTYPES
from rsaft_fast.benchmarks.providers import IMAGE_PASS, OURS
from rsaft_fast.benchmarks.results import Row, is_gpu
from rsaft_fast.benchmarks.tables import LABELS, View, machine_line, milliseconds
from rsaft_fast.errors import UserError
from rsaft_fast.figures.grids import FAINT, INK, RUN_COLOURS

COLOURS = dict(zip(OURS, RUN_COLOURS[1:]))  # saturated; peers are grey
PEER = "#B4B4B4"
MARKERS = {"norm": "o", "perturb": "s", "step": "^", "update": "D", IMAGE_PASS: "P"}
_MOST_PANELS = 12


def draw(results: Row, folder: str | Path) -> list[Path]:
    """Write `bars.png` and `roofline.png` into the folder."""
    if not any("gbps" in row for row in results["rows"]):
        raise UserError("nothing to draw: no row of these results was measured")
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = {Path(folder) / "bars.png": bars(results), Path(folder) / "roofline.png": roofline(results)}
    for path, figure in paths.items():
        warning = "" if is_gpu(results) else " (CPU figures, not to be quoted)"
        figure.suptitle(machine_line(results) + warning, x=0.01, ha="left", fontsize=9, color=FAINT)
        figure.savefig(path, dpi=130)
    return list(paths)


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
        panels = {
            key: passes for key, passes in panels.items() if key in HEADLINE or passes[0][0] == IMAGE_PASS
        } or panels
    heights = [sum(len(rows) + 2 for _, rows in passes) for passes in panels.values()]
    figure = Figure((9, 0.21 * sum(heights) + 0.75 * len(panels) + 0.7), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (place, passes) in zip(axes, panels.items()):
        _bar_panel(axis, view, passes)
        axis.set_title(", ".join(place), loc="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def _bar_panel(axis: Axes, view: View, passes: Sequence[tuple[str, list[Row]]]) -> None:
    rows = [row for what, found in passes for row in (LABELS[what], *found)]  # a pass's name, then its bars
    for place, row in enumerate(rows):
        if isinstance(row, str):
            axis.text(0, place, f" {row}", fontsize=9, color=FAINT, va="center", style="italic")
            continue
        low, ms, high = (row[f"ms_{quantile}"] for quantile in ("p20", "p50", "p80"))
        axis.barh(place, ms, color=COLOURS.get(row["provider"], PEER), xerr=[[ms - low], [high - ms]])
        said = f"  {milliseconds(ms)} ms, {view.times_ours(row) or float('nan'):.2f} x ours"
        axis.text(high, place, said, fontsize=8, color=INK, va="center")
    names = {place: row["provider"] for place, row in enumerate(rows) if not isinstance(row, str)}
    axis.set_yticks(list(names), list(names.values()), fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.8)
    axis.margins(x=0.3)
    axis.set_xlabel("ms, median (whiskers: 20 to 80 %)", fontsize=9)


def roofline(results: Row) -> Figure:
    """GB/s on the floor's bytes, over how many bytes those are: the ceiling is the card's own copy."""
    figure = Figure((9.6, 6.2), layout="constrained")
    axis = figure.subplots()
    for kind, style in (("copy", "-"), ("read", ":")):
        rate = results[f"{kind}_gbps"]
        axis.axhline(rate, color=INK, linestyle=style, label=f"{kind}: {rate:,.0f} GB/s")
    for _, dtype, what, rows in View(results).groups():
        each = (
            image_floor(DTYPES[dtype].itemsize) if what == IMAGE_PASS else floor(what, dtype) if what in MARKERS else 0
        )
        for row in rows if each else ():
            ours = row["provider"] in OURS
            colour, label = COLOURS.get(row["provider"], PEER), row["provider"] if ours else "peers"
            style = {"marker": MARKERS[what], "edgecolor": colour, "facecolor": colour if ours else "none"}
            axis.scatter(
                each * row["parameters"], row["gbps"], **style, label=f"{label}: {LABELS[what]}", zorder=2 + ours
            )
    axis.set(xscale="log", yscale="log", ylabel="GB/s on the floor's bytes")
    axis.set_xlabel("bytes that the pass must move (floor: bytes a parameter x parameters)")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels())))  # each label once
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8.5)
    return figure
