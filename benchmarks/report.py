"""What is read from results files: the README's tables, the goals, the plots.

python -m rsaft_fast.benchmarks.report RESULTS.json [--readme README.md] [--goals] [--plots FOLDER]

A folder stands for the newest GPU results under it, those of the passes (`bench`) and those of whole updates
(`gpu_memory.py`); without any, the README says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rsaft_fast.benchmarks import goals, memory_tables, speed_tables
from rsaft_fast.benchmarks.providers import IMAGE_PASS, OURS
from rsaft_fast.benchmarks.results import Row, is_gpu, load, newest
from rsaft_fast.benchmarks.shapes import PASSES
from rsaft_fast.benchmarks.speed_tables import LABELS, View
from rsaft_fast.benchmarks.suite import HEADLINE
from rsaft_fast.benchmarks.tables import machine_line, milliseconds
from rsaft_fast.errors import UserError
from rsaft_fast.figures.grids import FAINT, INK, RUN_COLOURS
from rsaft_fast.files import replace_between, write_atomically

TABLES = {"speed": speed_tables, "memory": memory_tables}
"""By the kind of results; each has a `section` for the README and all figures for the `terminal`."""
COLOURS = dict(zip(OURS, RUN_COLOURS[1:]))  # saturated; peers are grey


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above; 2 when the input is wrong."""
    parser = argparse.ArgumentParser(description="Tables and plots of a benchmark run.")
    parser.add_argument("results", type=Path, help="a results file, or a folder: the newest GPU results under it")
    between = " and between ".join(" and ".join(markers(kind)) for kind in TABLES)
    parser.add_argument("--readme", type=Path, metavar="FILE", help=f"rewrite what lies between {between}")
    parser.add_argument("--goals", action="store_true", help="show the goals and which are met, not all figures")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write bars.png")
    arguments = parser.parse_args(argv)
    try:
        found = _find(arguments.results)
        if arguments.readme is not None:
            _write_readme(arguments.readme, found)
        if not found:
            print(f"no GPU results under {arguments.results}")
        if arguments.plots is not None and "speed" in found:
            print(draw(found["speed"], arguments.plots))
        for kind, results in found.items():
            print(goals.text(results) if arguments.goals else TABLES[kind].terminal(results))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def markers(kind: str) -> tuple[str, str]:
    """The lines of a README between which a kind of results is shown."""
    return f"<!-- {kind}: begin -->", f"<!-- {kind}: end -->"


def _find(path: Path) -> dict[str, Row]:
    """Results by their kind."""
    if path.is_dir():
        return {kind: found for kind in TABLES if (found := newest(path, kind)) is not None}
    found = load(path)
    if found["kind"] not in TABLES:
        raise UserError(f"{path} holds results of kind {found['kind']!r}, of which there is no table; read it as JSON")
    return {found["kind"]: found}


def _write_readme(path: Path, found: dict[str, Row]) -> None:
    """Replace what lies between each pair of markers."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--readme {path} cannot be read ({error.strerror})") from error
    for kind, module in TABLES.items():
        text = replace_between(text, *markers(kind), module.section(found.get(kind)), f"--readme {path}")
    write_atomically(path, text)


def draw(results: Row, folder: str | Path) -> Path:
    """Write `bars.png` into the folder; its path."""
    if not any("gbps" in row for row in results["rows"]):
        raise UserError("nothing to draw: no row of these results was measured")
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure, path = bars(results), Path(folder) / "bars.png"
    warning = "" if is_gpu(results) else " (CPU figures, not to be quoted)"
    figure.suptitle(machine_line(results) + warning, x=0.01, ha="left", fontsize=9, color=FAINT)
    figure.savefig(path, dpi=130)
    return path


def bars(results: Row) -> Figure:
    """A panel for each list and layout (of everything: the headline's), a bar for each pass and provider."""
    view = View(results)
    panels: dict[tuple[str, str], list[Row]] = {}
    for case, dtype, what, rows in view.groups():
        if what in (*PASSES, IMAGE_PASS):
            panels.setdefault((case, dtype), []).extend(rows)
    panels = {at: rows for at, rows in panels.items() if [*at] in HEADLINE or rows[0]["what"] == IMAGE_PASS} or panels
    heights = [len(rows) + 1 for rows in panels.values()]
    figure = Figure((9, 0.21 * sum(heights) + 0.75 * len(panels) + 0.7), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (place, rows) in zip(axes, panels.items()):
        axis.set_title(", ".join(place), loc="left", fontsize=11, fontweight="bold", color=INK)
        for y, row in enumerate(rows):
            low, ms, high = (row[f"ms_{quantile}"] for quantile in ("p20", "p50", "p80"))
            axis.barh(y, ms, color=COLOURS.get(row["provider"], "#B4B4B4"), xerr=[[ms - low], [high - ms]])
            said = f"  {milliseconds(ms)} ms, {view.times_ours(row) or float('nan'):.2f} x ours"
            axis.text(high, y, said, fontsize=8, color=INK, va="center")
        names = [f"{LABELS[row['what']]}: {row['provider']}" for row in rows]
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.3)
        axis.set_xlabel("ms, median (whiskers: 20 to 80 %)", fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main())
