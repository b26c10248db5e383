"""Evaluation: prompt sets, the sharpness S1, sample grids, comparison figures and tables."""

from rsaft_fast.evaluation.figures import Curve, Panel, comparison_figure
from rsaft_fast.evaluation.grids import compose_grid, save_grid, save_png
from rsaft_fast.evaluation.prompts import load_prompts
from rsaft_fast.evaluation.report import summary_table
from rsaft_fast.evaluation.sharpness import sharpness

__all__ = [
    "Curve",
    "Panel",
    "comparison_figure",
    "compose_grid",
    "load_prompts",
    "save_grid",
    "save_png",
    "sharpness",
    "summary_table",
]
