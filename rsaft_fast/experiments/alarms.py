"""How often the monitors of a run would have warned of a fall of r*: in time, too late, never, or of nothing.

The truth is r* itself, picture by picture: it has fallen where it is below its best so far by `ERRORS` standard errors
of the paired difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from rsaft_fast.evaluation.alarms import AGREEMENT, AGREEMENT_ERROR, IMAGE, change
from rsaft_fast.evaluation.known_preference import TRUTH
from rsaft_fast.experiments.records import JUDGE, Point, Run
from rsaft_fast.experiments.table import SELECTION_SEEDS
from rsaft_fast.experiments.variants import BASELINES, CONTROLS, VARIANTS
from rsaft_fast.recipe.evaluation import EvaluationSettings

ERRORS = 3.0
"""By which r* has to fall."""

Case = Literal["in time", "too soon", "late", "missed", "false", "quiet"]
FALLS: tuple[Case, ...] = ("in time", "too soon", "late", "missed")
"""Of a run in which r* fell."""

Warns = Callable[[Run, int], bool | None]
"""Whether a monitor warns at the evaluation of that number; None where the run's file does not say."""


def fall_of_truth(run: Run) -> tuple[int, int] | None:
    """Find where r* was highest before it first fell, and where it had fallen: numbers of evaluations; None: never."""
    best = 0
    for index, point in enumerate(run.points):
        if point.truth > run.points[best].truth:
            best = index
        moved = change(run.points[best].pictures[TRUTH], point.pictures[TRUTH])
        if moved is not None and moved.errors <= -ERRORS:
            return best, index
    return None


def case_of(run: Run, warns: Warns) -> Case | None:
    """Sort a run by its fall and the first warning; None where the monitor is not in the run's file.

    in time: not before r* was highest, and not after the evaluation at which it had fallen. too soon: before it was
    highest. false and quiet: runs in which it never fell.
    """
    said = [warns(run, index) for index in range(1, len(run.points))]
    if None in said:
        return None
    first = next((index for index, warned in enumerate(said, 1) if warned), None)
    fall = fall_of_truth(run)
    if fall is None:
        return "quiet" if first is None else "false"
    if first is None:
        return "missed"
    return "too soon" if first < fall[0] else "in time" if first <= fall[1] else "late"


def by_judge(name: str, errors: float) -> Warns:
    """Warn where a held-out reward is below its best by so many standard errors while the proxy rose since then."""

    def warns(run: Run, index: int) -> bool | None:
        if name not in run.points[0].means:
            return None
        best = max(run.points[:index], key=lambda point: point.means[name])
        below = run.points[index].watched.get(name)
        return None if below is None else below <= -errors and run.points[index].proxy > best.proxy

    return warns


def by_mean(name: str) -> Warns:
    """Warn where a held-out reward's mean is below its best at all while the proxy rose since then."""

    def warns(run: Run, index: int) -> bool | None:
        if name not in run.points[0].means:
            return None
        best, now = max(run.points[:index], key=lambda point: point.means[name]), run.points[index]
        return now.means[name] < best.means[name] and now.proxy > best.proxy

    return warns


def by_drift(names: Iterable[str], drift: float) -> Warns:
    """Warn where one of these statistics of the pictures has left the start's range."""

    def warns(run: Run, index: int) -> bool | None:
        moved = [run.points[index].watched.get(name) for name in names]
        known = [abs(value) for value in moved if value is not None]
        return max(known) > drift if known else None

    return warns


def by_agreement(errors: float) -> Warns:
    """Warn where the gradient that is trained on had a cosine with a judge's below 0, by so many standard errors."""

    def warns(run: Run, index: int) -> bool | None:
        if not run.steered:
            return None
        # A record is of the weights before its update. What was measured between two evaluations counts at the second.
        before, now = (run.points[at].step for at in (index - 1, index))
        said = [record for record in run.steered if before < record["step"] - 1 <= now or record["step"] == index == 1]
        return any(
            cosine <= -errors * record[AGREEMENT_ERROR + name.removeprefix(AGREEMENT)]
            for record in said
            for name, cosine in record.items()
            if name.startswith(AGREEMENT)
        )

    return warns


def by_any(warns: Sequence[Warns]) -> Warns:
    """Warn where one of these monitors does."""

    def one(run: Run, index: int) -> bool | None:
        said = [each(run, index) for each in warns]
        return None if None in said else any(said)

    return one


def by_most(warns: Sequence[Warns]) -> Warns:
    """Warn where more than half of these monitors do."""

    def most(run: Run, index: int) -> bool | None:
        said = [one(run, index) for one in warns]
        return None if None in said else 2 * sum(map(bool, said)) > len(said)

    return most


HEAD = ("monitor", "r* fell", "in time", "too soon", "late", "missed", "r* never fell", "false")


LEGEND = (
    "r* fell: runs in which r* was, at some evaluation, 3 standard errors (paired over the pictures) below its best so "
    "far. Of those: warned in time, from the evaluation where r* was highest to the one where it had fallen; too soon, "
    "while r* was still to rise; late; never. False: warned in a run in which r* never fell. A held-out reward warns "
    "when it falls below its best while the proxy is above its value there; a statistic when it leaves the range of "
    "the untrained model's pictures. Runs that a held-out reward trains or steers, and GARDO's, whose gate looks at "
    "two, are left out."
)


def trained_alone(runs: Iterable[Run]) -> list[Run]:
    """Leave out the runs that another reward than their proxy trains or steers: it is not held out there."""
    changed = BASELINES | CONTROLS | VARIANTS
    others = {
        name
        for name, own in changed.items()
        if any(text.startswith("reward") or "$judge" in text for text in own.overrides)
    }
    return [run for run in runs if run.variant not in others and "gardo" not in run.variant]


def table(runs: Sequence[Run]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Make the table of every monitor that the runs' files hold, at the defaults of `evaluation`."""
    errors, drift = (EvaluationSettings.model_fields[key].default for key in ("alarm_errors", "alarm_drift"))
    judges = sorted({name for run in runs for name in run.points[0].means if name.startswith(JUDGE)})
    statistics = sorted({name for run in runs for name in _last(run).watched if name.startswith(IMAGE)})
    monitors: dict[str, Warns] = {}
    for name in judges:
        label = name.removeprefix(JUDGE)
        monitors[f"{label} fell by {errors:g} standard errors"] = by_judge(name, errors)
        monitors[f"{label} fell at all"] = by_mean(name)
    monitors[f"most rewards fell by {errors:g} standard errors"] = _of_others(
        lambda own: by_most([by_judge(name, errors) for name in own])
    )
    monitors["most rewards fell at all"] = _of_others(lambda own: by_most([by_mean(name) for name in own]))
    for name in statistics:
        monitors[f"{name} moved by {drift:g} standard deviations"] = by_drift([name], drift)
    monitors[f"any statistic moved by {drift:g} standard deviations"] = by_drift(statistics, drift)
    monitors[f"agreement below 0 by {2 / 3 * errors:g} standard errors"] = by_agreement(2 / 3 * errors)
    monitors["agreement below 0 at all"] = by_agreement(0.0)
    rows = []
    for label, warns in monitors.items():
        count = Counter(case for run in runs if (case := case_of(run, warns)) is not None)
        fell = sum(count[case] for case in FALLS)
        calm = count["false"] + count["quiet"]
        if fell + calm:
            shares = [_share(count[case], fell) for case in FALLS]
            rows.append([label, str(fell), *shares, str(calm), _share(count["false"], calm)])
    return HEAD, rows


CHOOSING, REPORTED = "choosing", "others"
CALIBRATION_HEAD = (
    "monitor",
    "warns at",
    *(f"{what}, {on}" for on in (CHOOSING, REPORTED) for what in ("r* fell", "in time", "too soon", "false")),
)
CALIBRATION_LEGEND = (
    "By threshold: how many standard errors a held-out reward is below its best (paired over the pictures), or how "
    "many standard deviations a statistic has moved. Choosing: runs of the seeds that radii are chosen on; others: "
    "every other run. A threshold is to be chosen on the former and believed by the latter. Shares of too soon and "
    "in time are of the runs in which r* fell, of false of those in which it never did."
)


def calibration(runs: Sequence[Run]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Make the table of monitors by threshold, on the selection seeds and on all others apart."""
    statistics = sorted({name for run in runs for name in _last(run).watched if name.startswith(IMAGE)})
    monitors: dict[tuple[str, float], Warns] = {}
    for label, some in (("any reward fell", by_any), ("most rewards fell", by_most)):
        for errors in (1.0, 2.0, 3.0, 4.0, 6.0):
            monitors[label, errors] = _of_others(lambda own, some=some, at=errors: some([by_judge(n, at) for n in own]))
    for drift in (0.25, 0.5, 1.0, 2.0):
        monitors["any statistic moved", drift] = by_drift(statistics, drift)
    rows = []
    for (label, threshold), warns in monitors.items():
        cells = []
        for chosen in (True, False):
            own = [run for run in runs if (run.seed in SELECTION_SEEDS) == chosen]
            count = Counter(case for run in own if (case := case_of(run, warns)) is not None)
            fell = sum(count[case] for case in FALLS)
            calm = count["false"] + count["quiet"]
            cells += [str(fell), *(_share(count[case], fell) for case in ("in time", "too soon"))]
            cells.append(_share(count["false"], calm))
        rows.append([label, f"{threshold:g}", *cells])
    return CALIBRATION_HEAD, rows


def _of_others(make: Callable[[Sequence[str]], Warns]) -> Warns:
    """Make a monitor of all the held-out rewards of a run: another proxy's runs have others."""
    return lambda run, index: make([name for name in run.points[0].means if name.startswith(JUDGE)])(run, index)


def _last(run: Run) -> Point:
    return run.points[-1]


def _share(count: int, of: int) -> str:
    return f"{count} ({count / of:.0%})" if of else "-"
