"""Choice of radii and weights, by a rule that is stated, on seeds on which nothing is reported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.known_preference import TRUTH
from rsaft_fast.experiments.records import Run, is_done, read_record
from rsaft_fast.experiments.row import Row
from rsaft_fast.experiments.table import SELECTION_SEEDS, Choices, grids_of, proxies, rows_of
from rsaft_fast.files import write_atomically

FILE = "choices.json"
RULE = (
    "of each grid the value with the highest r*, averaged over the evaluations after the start and over the selection "
    "seeds; of equal ones the smaller"
)


def worth(run: Run) -> float:
    """Average r* over the evaluations after the start: it counts how high it gets and how long it stays there."""
    return fmean(run.curve(TRUTH)[1:])


def choose(scores: Mapping[float, Sequence[float]]) -> float:
    """Choose of values and their worth on each seed, by `RULE`."""
    return min(scores, key=lambda value: (-fmean(scores[value]), value))


def choices_in(folder: Path) -> Choices:
    """Read what was chosen; nothing where no choice was made yet.

    Raises:
        UserError: the file is none that `update_choices` wrote.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {proxy: dict(chosen) for proxy, chosen in content["chosen"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not say what was chosen ({error}); move it away") from error


def update_choices(folder: Path) -> Choices:
    """Choose for every proxy whose selection runs are all there; write it down, with what it rests on.

    Returns:
        what is chosen by now.
    """
    rows, _ = rows_of("select", {})
    chosen: dict[str, dict[str, float]] = {}
    rests_on: dict[str, Any] = {}
    for proxy in proxies():
        for grid in grids_of(proxy):
            own = {value: _rows_of(rows, proxy, grid.variant(value)) for value in grid.values}
            if not all(is_done(row, folder) for group in own.values() for row in group):
                continue
            scores = {value: [worth(read_record(row.path(folder))) for row in group] for value, group in own.items()}
            best = choose(scores)
            chosen.setdefault(proxy, {})[grid.key] = best
            rests_on.setdefault(proxy, {})[grid.key] = {
                "worth": {f"{value:g}": [round(one, 5) for one in values] for value, values in scores.items()},
                "at_the_edge": best in (min(grid.values), max(grid.values)),
            }
    if chosen:
        content = {"rule": RULE, "seeds": SELECTION_SEEDS, "chosen": chosen, "rests_on": rests_on}
        write_atomically(folder / FILE, json.dumps(content, indent=1) + "\n")
    return chosen


def _rows_of(rows: Sequence[Row], proxy: str, variant: str) -> list[Row]:
    return [row for row in rows if row.proxy == proxy and row.variant == variant]
