"""What an evaluation found, as a table of the kind that papers print, with intervals and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rsaft_fast.evaluation.comparison import (
    Difference,
    Pairing,
    difference,
    difference_table,
    half_width,
)
from rsaft_fast.evaluation.distances import Estimate
from rsaft_fast.evaluation.equal_reward import AtLevel, Checkpoint, equal_reward
from rsaft_fast.figures.tables import aligned, markdown

FID, KID, DIVERSITY, WITHIN = "FID", "KID x1000", "diversity x100", "diversity of a prompt x100"
TRAINED = "*"
LEGEND = (
    "Means with 95 % intervals, over prompts (Student's t; of KID and diversity a jackknife). A star: trained on, so "
    "in-domain; it does not say whether the pictures are better. A dash: not measured, or nothing to compare."
)


@dataclass(frozen=True)
class Row:
    """One model's pictures, in the order of all others'.

    Attributes:
        label: how tables call it. group: its run's, that all checkpoints of a run share; "" of a model without one.
        step: updates done; None of a model that no run here trained.
        columns: scores of every picture by reward, and S1 by its name.
        distances: of the whole set by name: FID, KID, diversity.
        shown: whether it has a row in the table; other checkpoints have their place in the comparison at equal reward.
    """

    label: str
    group: str
    step: int | None
    columns: Mapping[str, Sequence[float]]
    distances: Mapping[str, Estimate | float] = field(default_factory=dict)
    shown: bool = True


@dataclass(frozen=True)
class Results:
    """All rows, the first of which is what the others are compared with.

    Attributes:
        prompts: of every picture.
        trained: columns that some run was trained on.
        climbed: the one that every run was trained on, at which they are compared; "" where there is none.
        missing: what is still to be measured.
    """

    rows: Sequence[Row]
    prompts: Sequence[str]
    trained: Sequence[str]
    climbed: str = ""
    missing: Sequence[str] = ()

    @property
    def columns(self) -> list[str]:
        """Names of all columns that some row has."""
        return list(dict.fromkeys(name for row in self.rows for name in row.columns))

    @property
    def distances(self) -> list[str]:
        """Names of all distances that some row has."""
        return list(dict.fromkeys(name for row in self.rows for name in row.distances))

    def estimate(self, row: Row, column: str) -> Estimate | None:
        """A column's mean over the row's pictures, and its interval."""
        if column not in row.columns:
            return None
        return mean_of(row.columns[column], self.prompts)

    def difference(self, row: Row, column: str) -> Difference | None:
        """The row's paired difference to the first row; None of the first, or where one lacks the column."""
        first = self.rows[0]
        if row is first or column not in row.columns or column not in first.columns:
            return None
        return difference(first.columns[column], row.columns[column], self.prompts)

    def at_equal_reward(self) -> tuple[float, dict[str, AtLevel]] | None:
        """Every run at the highest trained reward that all runs reach; None without checkpoints to tell by."""
        curves: dict[str, list[Checkpoint]] = {}
        if not self.climbed:
            return None
        trained, first = self.climbed, self.rows[0]
        for row in self.rows:
            if row.group and row.step is not None and trained in row.columns:
                start = [Checkpoint(0, first.columns)] if trained in first.columns else []
                curves.setdefault(row.group, start).append(Checkpoint(row.step, row.columns))
        if not curves or any(len(curve) < 2 for curve in curves.values()):
            return None
        return equal_reward(curves, trained)


def mean_of(values: Sequence[float], prompts: Sequence[str]) -> Estimate:
    """Compute a mean with its 95 % interval, by Student's t over the prompts (over the pictures of a single one)."""
    groups = prompts if len(set(prompts)) > 1 else range(len(prompts))
    mean, half = fmean(values), half_width(values, groups)
    return Estimate(mean, mean - half, mean + half)


def shown(found: Estimate | float | None) -> str:
    """Write a value with half its interval, to about four digits."""
    if found is None:
        return "-"
    if isinstance(found, float):
        return _digits(found, found)
    half = (found.high - found.low) / 2
    text = _digits(found.value, found.value)
    return text if not math.isfinite(half) else f"{text} ±{_digits(half, found.value)}"


def _digits(value: float, scale: float) -> str:
    """Write a number with as many decimals as a number of that size takes."""
    decimals = 2 if abs(scale) >= 10 else 3 if abs(scale) >= 1 else 4
    return f"{value:.{decimals}f}"


def table_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Make the head and the rows of the table."""
    rows = [
        [
            row.label,
            *(shown(results.estimate(row, name)) for name in results.columns),
            *(shown(row.distances.get(name)) for name in results.distances),
        ]
        for row in results.rows
        if row.shown
    ]
    return ["model", *_starred(results, results.columns), *results.distances], rows


def checkpoint_cells(results: Results) -> tuple[str, list[str], list[list[str]]] | None:
    """Make the title, head and rows of all checkpoints; None where no run has several."""
    groups = [row.group for row in results.rows if row.group]
    if len(groups) == len(set(groups)):
        return None
    rows = [
        [row.group, str(row.step), *(shown(results.estimate(row, name)) for name in results.columns)]
        for row in results.rows
        if row.group
    ]
    return "Along the runs", ["run", "updates", *_starred(results, results.columns)], rows


def equal_reward_cells(results: Results) -> tuple[str, list[str], list[list[str]]] | None:
    """Make the title, head and rows of several runs at equal trained reward, and of each less the first."""
    found = results.at_equal_reward()
    if found is None or len(found[1]) < 2:
        return None
    level, runs = found
    names = [name for name in results.columns if all(name in run.columns for run in runs.values())]
    first_label, first = next(iter(runs.items()))
    rows = []
    for label, run in runs.items():
        cells = [shown(mean_of(run.columns[name], results.prompts)) for name in names]
        rows.append([label, f"{run.step:.1f}", *cells])
        if run is not first:
            gains = [difference(first.columns[name], run.columns[name], results.prompts) for name in names]
            rows.append([f"less {first_label}", "", *(_gain(gain) for gain in gains)])
    title = f"At equal trained reward: where the mean of {results.climbed} first reaches {level:.4f}"
    return title, ["run", "updates", *_starred(results, names)], rows


def _starred(results: Results, names: Sequence[str]) -> list[str]:
    return [f"{name}{TRAINED}" if name in results.trained else name for name in names]


def _gain(gain: Difference) -> str:
    half = (gain.high - gain.low) / 2
    return f"{gain.mean:+.4f}" + (f" ±{half:.4f}" if math.isfinite(half) else "")


def as_text(results: Results) -> str:
    """Write everything as plain text."""
    head, rows = table_cells(results)
    blocks = ["\n".join([*_partial(results), *aligned([head, *rows])]), LEGEND]
    blocks += _differences(results)
    for title, head, rows in _further(results):
        blocks.append("\n".join([title, *aligned([head, *rows])]))
    return "\n\n".join(blocks)


def as_markdown(results: Results, about: Sequence[str]) -> str:
    """Write the tables as a page; `about` are lines that say how it was measured."""
    head, rows = table_cells(results)
    blocks = ["# Evaluation", *_partial(results), markdown(head, rows), LEGEND]
    for title, head, rows in _further(results):
        blocks += [f"## {title}", markdown(head, rows)]
    if differences := _differences(results):
        blocks += ["## Differences", *(f"```\n{text}\n```" for text in differences)]
    return "\n\n".join([*blocks, "## Protocol", "\n".join(f"- {line}" for line in about)]) + "\n"


def _further(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    return [made for made in (checkpoint_cells(results), equal_reward_cells(results)) if made is not None]


def _partial(results: Results) -> list[str]:
    return [f"PARTIAL: still to be measured: {', '.join(results.missing)}."] if results.missing else []


def _differences(results: Results) -> list[str]:
    first, found = results.rows[0], []
    places = [(index, index) for index in range(len(results.prompts))]
    for row in results.rows[1:]:
        pairs = {name: results.difference(row, name) for name in results.columns if not name.startswith(S1)}
        told = {_starred(results, [name])[0]: gain for name, gain in pairs.items() if gain is not None}
        if row.shown and told:
            pairing = Pairing("prompt and seed", places, list(results.prompts))
            found.append(difference_table(first.label, row.label, pairing, told))
    return found


S1 = "S1 "
"""Begins the names of columns that are sharpnesses, of which more is not better."""


def as_json(results: Results) -> dict[str, Any]:
    """Give every figure of the tables, as numbers."""
    rows = []
    for row in results.rows:
        scores = {}
        for name in row.columns:
            found, gain = results.estimate(row, name), results.difference(row, name)
            assert found is not None
            scores[name] = _numbers(found) | {"trained": name in results.trained}
            if gain is not None:
                scores[name]["less_first"] = _plain(
                    {"mean": gain.mean, "low": gain.low, "high": gain.high, "wins": gain.wins}
                )
        distances = {
            name: _numbers(found) if isinstance(found, Estimate) else {"value": found}
            for name, found in row.distances.items()
        }
        rows.append({"label": row.label, "step": row.step, "scores": scores, "distances": distances})
    found = results.at_equal_reward()
    equal = None
    if found is not None:
        level, runs = found
        equal = {
            "column": results.climbed,
            "level": level,
            "runs": {
                label: {"step": run.step}
                | {name: _numbers(mean_of(values, results.prompts)) for name, values in run.columns.items()}
                for label, run in runs.items()
            },
        }
    return {"complete": not results.missing, "missing": list(results.missing), "rows": rows, "equal_reward": equal}


def _numbers(found: Estimate) -> dict[str, Any]:
    return _plain({"value": found.value, "low": found.low, "high": found.high})


def _plain(numbers: Mapping[str, float]) -> dict[str, Any]:
    """JSON has no infinity: an interval that cannot be told is null."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
