"""The figures to reach for whole updates: what was wanted, what was measured, whether it was met."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rsaft_fast.benchmarks import goals as shared
from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.goals import Goal
from rsaft_fast.benchmarks.memory_runs import MODELS, RUNS, Run
from rsaft_fast.benchmarks.memory_view import EXACT, GIB, GRADED_ONLY, MemoryView

Row = dict[str, Any]

FLAT, ESTIMATE_ERROR, EXACT_RATIO, SAM_SHARE = 1.05, 0.07, 2.05, 0.01
GRADED_ONLY_RATIO = {50: 1.13, 28: 1.20}
PEAK_OVER_PLAIN, TIME_OVER_PLAIN = 0.7, 0.8
UNMEASURED = "not measured"


def goals(results: Row) -> list[Goal]:
    """Every goal, measured or not."""
    view = MemoryView(results)
    return [goal for part in (_peaks, _flat, _estimates, _times, _against_plain) for goal in part(view)]


def text(results: Row) -> str:
    """The goals as a table for the terminal."""
    return shared.lines(goals(results), _note(results))


def as_markdown(results: Row) -> str:
    return shared.markdown_lines(goals(results), _note(results))


def _note(results: Row) -> str:
    return results["machine"].get("note") or ""


def _peaks(view: MemoryView) -> Iterator[Goal]:
    for run in RUNS:
        peak = view.peak(run)
        met = None if peak is None or view.machine.get("tiny") else peak <= run.limit * GIB
        measured = UNMEASURED if peak is None else f"{peak / GIB:.2f} GiB"
        yield Goal(f"peak of {run.name}", f"<= {run.limit:g} GiB", measured, met)


def _flat(view: MemoryView) -> Iterator[Goal]:
    for run in RUNS:
        if run.lora:
            wanted = f"<= {FLAT:g} x that of K = 1"
            yield _at_most(f"peak of {run.name} at K = {runs.GRADED_STEPS}", wanted, view.peak_growth(run), FLAT)


def _estimates(view: MemoryView) -> Iterator[Goal]:
    for run in RUNS:
        for k in (False, True) if run.lora else (False,):
            ratio = view.estimate_ratio(run, k)
            what = f"estimate of {run.name}" + (f" at K = {runs.GRADED_STEPS}" if k else "")
            met = None if ratio is None else abs(ratio - 1) <= ESTIMATE_ERROR
            yield Goal(what, f"within {ESTIMATE_ERROR:.0%}", UNMEASURED if ratio is None else f"{ratio - 1:+.1%}", met)


def _times(view: MemoryView) -> Iterator[Goal]:
    for run in _compared():
        own = MODELS[run.model].steps
        found = view.over_plain_method(run, EXACT, own)
        yield _at_most(f"RSA-FT over the plain method, {run.name}, exact", f"<= {EXACT_RATIO:g} x", found, EXACT_RATIO)
        for steps, bound in GRADED_ONLY_RATIO.items():
            found = view.over_plain_method(run, GRADED_ONLY, steps)
            what = f"RSA-FT over the plain method, {run.name}, graded_only, T = {steps}"
            yield _at_most(what, f"<= {bound:g} x", found, bound)
        share = view.sam_share(run, own)
        met = None if share is None else share <= SAM_SHARE
        measured = UNMEASURED if share is None else f"{share:.2%}"
        yield Goal(f"SAM update, {run.name}", f"<= {SAM_SHARE:.0%} of the step", measured, met)


def _against_plain(view: MemoryView) -> Iterator[Goal]:
    for run in _compared():
        ratio, bound = view.peak_over_plain(run, runs.PLAIN)
        what = f"peak over plain PyTorch, {run.name}"
        goal = _at_most(what, f"<= {PEAK_OVER_PLAIN:g} x", ratio, PEAK_OVER_PLAIN)
        yield Goal(goal.what, goal.wanted, f"< {goal.measured}, which ran out of memory", goal.met) if bound else goal
        found = view.time_over_plain(run, runs.PLAIN)
        what = f"time over plain PyTorch, {run.name}, exact"
        yield _at_most(what, f"<= {TIME_OVER_PLAIN:g} x", found, TIME_OVER_PLAIN)


def _compared() -> list[Run]:
    return [run for run in RUNS if run.compare]


def _at_most(what: str, wanted: str, value: float | None, bound: float) -> Goal:
    if value is None:
        return Goal(what, wanted, UNMEASURED, None)
    return Goal(what, wanted, f"{value:.3f} x", value <= bound)
