"""The report of an experiment: over-optimisation curves over seeds, and its tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rsaft_fast.errors import UserError
from rsaft_fast.experiments.groups import load_sets
from rsaft_fast.experiments.report import LEGEND, panels_of, sections, verdicts
from rsaft_fast.experiments.table import SETS
from rsaft_fast.report.charts import charts_of_bands
from rsaft_fast.report.page import Table, now, render


def is_experiment(folder: Path) -> bool:
    """Whether a folder holds results of `rsaft-fast experiment`."""
    return any((folder / name).is_dir() and any((folder / name).glob("*.json")) for name in SETS)


def experiment_report(folder: Path, log: Callable[[str], None] = lambda line: None) -> str:
    """Make the report of an experiment's folder.

    Args:
        log: takes a line about results that are left out.

    Raises:
        UserError: no result, or a file that is none.
    """
    sets = load_sets(folder, log)
    if not sets:
        raise UserError(f"{str(folder)!r} holds no finished run of an experiment; rsaft-fast experiment makes them")
    count = sum(len(seeds) for found in sets.values() for seeds in found.values())
    tables = [Table(f"table-{n}", title, *table) for n, (title, table) in enumerate(sections(sets))]
    return render(
        title="Does smoothing help? The experiment on the playground",
        subtitle=f"{folder}; {count} finished runs; {now()}. {LEGEND}",
        lines=verdicts(sets),
        charts=charts_of_bands(panels_of(sets)),
        tables=tables,
    )
