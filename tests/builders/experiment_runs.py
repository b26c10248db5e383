"""Runs of the experiment that nobody trained: whatever curves a test wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rsaft_fast.evaluation.known_preference import TERMS, TRUTH
from rsaft_fast.experiments.records import JUDGE, PROXY, S1, Evaluation, Point, Run, write_record
from rsaft_fast.experiments.row import Row


def run(
    truths: Sequence[float],
    proxies: Sequence[float],
    *,
    judge: Sequence[float] | None = None,
    s1: Sequence[float] | None = None,
    seed: int = 0,
    variant: str = "plain",
    proxy: str = "brittle",
    set_name: str = "core",
    every: int = 10,
    scaled: Sequence[tuple[float, float, float]] = (),
) -> Run:
    """A run with these means at each evaluation; `scaled` has (share, r*, proxy)."""
    judge, s1 = judge or [0.0] * len(truths), s1 or [0.0] * len(truths)
    points = []
    for index, values in enumerate(zip(truths, proxies, judge, s1)):
        means = dict(zip((TRUTH, PROXY, f"{JUDGE}fair", f"{S1}0.3"), values))
        points.append(Point(index * every, 1.0, 0.1 * index, 0.01 * index, means, {}))
    end = points[-1].step
    paths = [Point(end, share, 0.0, 0.0, {TRUTH: truth, PROXY: level}, {}) for share, truth, level in scaled]
    return Run(set_name, proxy, "draft", variant, seed, "a pipeline", tuple(points), tuple(paths))


def evaluation(
    step: int, truth: float, proxy: float, *, scale: float = 1.0, pictures: int = 4, judge: float = 0.0
) -> Evaluation:
    """An evaluation whose pictures lie evenly around these means."""
    spread = torch.linspace(-1, 1, pictures, dtype=torch.float64)
    values = {name: 0.5 + 0.1 * spread for name in TERMS}
    values |= {TRUTH: truth + 0.01 * spread, PROXY: proxy + 0.5 * spread, f"{JUDGE}fair": judge + 0.2 * spread}
    values[f"{S1}0.3"] = 2.0 - 0.3 * spread
    values["relation"] = torch.where(spread > 0, values["relation"], float("nan"))
    return Evaluation(step, scale, 0.1 * step, 0.001 * step, values)


def finish(row: Row, folder: Path, truths: Sequence[float], proxies: Sequence[float]) -> Path:
    """Write a row's results, with these means at its evaluations from the start on."""
    evaluations = [evaluation(n * row.every, *values) for n, values in enumerate(zip(truths, proxies))]
    evaluations += [evaluation(row.updates, truths[-1], proxies[-1], scale=scale) for scale in row.scales]
    write_record(row.path(folder), row, evaluations, {"whole": 1.0})
    return row.path(folder)
