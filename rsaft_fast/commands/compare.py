"""`rsaft-fast compare`: runs side by side, as the demo shows its own two."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rsaft_fast.commands.output import output_folder
from rsaft_fast.errors import UserError
from rsaft_fast.figures.curves import Curve, Panel, comparison_figure, curves_figure
from rsaft_fast.figures.grids import CutGrid, cut_grid
from rsaft_fast.figures.tables import summary_table
from rsaft_fast.files import write_atomically
from rsaft_fast.progress import tell
from rsaft_fast.report.charts import AGREEMENT, UPDATES, Chart, charts_of
from rsaft_fast.report.page import REPORT, report_of
from rsaft_fast.report.pictures import BEFORE
from rsaft_fast.report.sources import Source, find_runs

FIGURE = "comparison.png"
_MOST_PANELS = 4
_MOST_PROMPTS = 6


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast compare`."""
    sources = find_runs(arguments.runs, tell)
    if len(sources) < 2:
        raise UserError(f"compare needs at least 2 runs, and {arguments.runs[0]!r} is one; rsaft-fast report shows it")
    with output_folder(arguments.output, os.path.join("runs", "comparison")) as output:
        changes = {source.label: source.changes() for source in sources}
        if any(changes.values()):
            print(summary_table(changes))
        figure = draw(output / FIGURE, sources)
        page = output / REPORT
        write_atomically(page, report_of(sources, f"{len(sources)} fine-tuning runs compared"))
    print(f"rsaft-fast: {figure}")
    print(f"rsaft-fast: all of it on one page: {page}")
    return 0


def draw(path: Path, sources: Sequence[Source]) -> Path:
    """Draw the newest sample grids of runs, and their curves beside.

    Raises:
        UserError: there is neither a picture nor a curve.
    """
    charts = [chart for chart in charts_of(sources).get("What was learned", ()) if chart.x_label == UPDATES]
    panels = [_panel(chart, sources) for chart in charts if chart.title != AGREEMENT][:_MOST_PANELS]
    title = " and ".join(source.label for source in sources)
    grids = {source.label: grid for source in sources if (grid := _newest(source)) is not None}
    if not grids:
        return curves_figure(path, panels, UPDATES, title)
    first = next(iter(grids.values()))
    columns = {BEFORE: _tensor(first.columns[BEFORE])} if BEFORE in first.columns else {}
    for label, grid in grids.items():
        if grid.prompts != first.prompts:
            tell(f"the sample grids of {label} have other prompts, and are left out of {path.name}")
            continue
        columns[label] = _tensor(list(grid.columns.values())[-1])
    return comparison_figure(path, first.prompts[:_MOST_PROMPTS], columns, panels, title=title)


def _panel(chart: Chart, sources: Sequence[Source]) -> Panel:
    """One curve a run: of what was evaluated where it was, else of the updates."""
    curves = {sources[line.colour].label: Curve(line.x, line.y) for line in chart.lines}
    return Panel(chart.title, chart.about.partition(". ")[0].rstrip("."), curves)


def _newest(source: Source) -> CutGrid | None:
    if not source.grids:
        return None
    with Image.open(source.grids[max(source.grids)]) as image:
        image.load()
        return cut_grid(image)


def _tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures[:_MOST_PROMPTS]]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
