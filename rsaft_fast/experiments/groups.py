"""Runs of the same kind over seeds, and what is read off them: best, end, differences to plain, correlations."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rsaft_fast.evaluation.known_preference import TRUTH
from rsaft_fast.experiments.records import JUDGE, PROXY, S1, Point, Run, read_record
from rsaft_fast.experiments.statistics import Interval, at_level, correlation, interval
from rsaft_fast.experiments.table import SETS
from rsaft_fast.experiments.variants import PLAIN

Seeds = Mapping[int, Run]
Key = tuple[str, str, str]
"""Proxy, method, variant."""


def load_sets(folder: Path, log: Callable[[str], None] = lambda line: None) -> dict[str, dict[Key, dict[int, Run]]]:
    """Read the finished runs under a folder: by set, kind and seed, in the order of the sets.

    Runs that fine-tuned another pipeline than most of them did are left out.

    Args:
        log: takes a line about those.

    Raises:
        UserError: a file that is no run's.
    """
    runs = [read_record(path) for name in SETS for path in sorted((folder / name).glob("*.json"))]
    counts = Counter(run.pipeline for run in runs)
    most = counts.most_common(1)[0][0] if counts else ""
    if len(counts) > 1:
        log(f"{len(runs) - counts[most]} of {len(runs)} runs fine-tuned another pipeline and are left out")
    found: dict[str, dict[Key, dict[int, Run]]] = {}
    for run in sorted((run for run in runs if run.pipeline == most), key=lambda run: run.seed):
        found.setdefault(run.set, {}).setdefault((run.proxy, run.method, run.variant), {})[run.seed] = run
    return {name: found[name] for name in SETS if name in found}


def best(run: Run) -> Point:
    """Return the evaluation with the highest r*; of equal ones the first."""
    return max(run.points, key=lambda point: point.truth)


def stopped_by(run: Run, judge: str) -> Run:
    """Return the run as if it had been stopped where this held-out reward was highest."""
    scores = run.curve(JUDGE + judge)
    length = scores.index(max(scores)) + 1
    return dataclasses.replace(run, variant=f"{run.variant}, stopped by {judge}", points=run.points[:length])


def path_back(run: Run) -> Run:
    """Return the way from the start to the last weights, as if its shares were evaluations along a run."""
    path = (run.points[0], *run.scaled, run.points[-1])
    return dataclasses.replace(run, variant=f"{run.variant}, scaled", points=path, scaled=())


def thinned(run: Run, steps: Collection[int]) -> Run:
    """Return the run as if it had been looked at after these updates alone: its best hangs on how often one looks."""
    return dataclasses.replace(run, points=tuple(point for point in run.points if point.step in steps))


def judges_of(groups: Mapping[Key, Seeds]) -> list[str]:
    """List the held-out rewards that every one of these runs was judged by."""
    sets = [
        {name.removeprefix(JUDGE) for name in run.points[0].means if name.startswith(JUDGE)}
        for seeds in groups.values()
        for run in seeds.values()
    ]
    return sorted(set.intersection(*sets)) if sets else []


@dataclass(frozen=True)
class Summary:
    """One kind of run over its seeds.

    Attributes:
        label: method and variant, as tables call it.
        seeds: how many.
        start, best, end: r* before any update, at its highest evaluation, after the last update.
        best_at: updates at the highest, on average.
        proxy: after the last update.
        best_gain, end_gain: paired differences of best and end from plain; None without seeds in common.
        level_gain: of r* where the proxy first reaches the highest level that both the run and plain reach, seed by
            seed; None where a run never rises above its start.
    """

    label: str
    seeds: int
    start: Interval
    best: Interval
    best_at: float
    end: Interval
    proxy: Interval
    best_gain: Interval | None
    end_gain: Interval | None
    level_gain: Interval | None


def summary(label: str, runs: Seeds, plain: Seeds | None) -> Summary:
    """Summarise runs of one kind, against plain runs of the same seeds.

    Args:
        plain: None for the plain ones themselves.
    """
    own = list(runs.values())
    pairs = [(run, plain[seed]) for seed, run in runs.items() if seed in plain] if plain else []
    return Summary(
        label,
        len(own),
        _mean([run.points[0].truth for run in own]),
        _mean([best(run).truth for run in own]),
        fmean(best(run).step for run in own),
        _mean([run.points[-1].truth for run in own]),
        _mean([run.points[-1].proxy for run in own]),
        interval([best(run).truth - best(other).truth for run, other in pairs]),
        interval([run.points[-1].truth - other.points[-1].truth for run, other in pairs]),
        interval([gain for gain in (_level_gain(run, other) for run, other in pairs) if gain is not None]),
    )


def _mean(values: Sequence[float]) -> Interval:
    found = interval(values)
    assert found is not None  # a kind has at least one run
    return found


def _level_gain(run: Run, plain: Run) -> float | None:
    level = min(max(run.curve(PROXY)), max(plain.curve(PROXY)))
    if level <= plain.points[0].proxy:
        return None
    own, other = (at_level(one.curve(PROXY), one.curve(TRUTH), level) for one in (run, plain))
    return None if own is None or other is None else own - other


def at_common_level(groups: Mapping[str, Seeds]) -> dict[str, Interval]:
    """Compute r* where the proxy first reaches the highest level that all kinds reach, seed by seed.

    Seeds that some kind lacks, or at which some run never rises above its start, are left out.
    """
    shared = set.intersection(*(set(seeds) for seeds in groups.values())) if groups else set()
    values: dict[str, list[float]] = {label: [] for label in groups}
    for seed in sorted(shared):
        runs = {label: seeds[seed] for label, seeds in groups.items()}
        level = min(max(run.curve(PROXY)) for run in runs.values())
        found = {label: at_level(run.curve(PROXY), run.curve(TRUTH), level) for label, run in runs.items()}
        if level > max(run.points[0].proxy for run in runs.values()):
            for label, value in found.items():
                if value is not None:
                    values[label].append(value)
    return {label: found for label, own in values.items() if (found := interval(own)) is not None}


def radii_of(run: Run) -> list[str]:
    """List the quantities that are sharpnesses, by radius."""
    names = [name for name in run.points[0].means if name.startswith(S1)]
    return sorted(names, key=lambda name: float(name.removeprefix(S1)))


def across_pictures(runs: Seeds, quantity: str, place: Callable[[Run], Point]) -> Interval | None:
    """Correlate a quantity with r* over the pictures of one evaluation; the mean over seeds."""
    points = [place(run) for run in runs.values()]
    found = [correlation(point.pictures[quantity], point.pictures[TRUTH]) for point in points]
    return interval([value for value in found if value is not None])


def across_runs(runs: Sequence[Run], quantity: str) -> Iterator[tuple[int, int, float]]:
    """Correlate means over pictures across runs, at each step that at least three share after the start.

    Yields:
        the step, how many runs, the correlation.
    """
    steps = sorted({point.step for run in runs for point in run.points if point.step > 0})
    for step in steps:
        points = [point for run in runs for point in run.points if point.step == step]
        found = correlation([p.means[quantity] for p in points], [p.truth for p in points])
        if found is not None:
            yield step, len(points), found


def pooled(runs: Sequence[Run], quantity: str) -> float | None:
    """Correlate means over pictures across runs and steps together, in which time confounds."""
    points = [point for run in runs for point in run.points]
    return correlation([point.means[quantity] for point in points], [point.truth for point in points])


def plain_of(groups: Mapping[Key, Seeds], proxy: str, method: str) -> Seeds | None:
    """Return the plain runs that a kind is compared with."""
    return groups.get((proxy, method, PLAIN))
