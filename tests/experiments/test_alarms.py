"""When monitors would have warned of a fall of r*: each case, on runs that nobody trained."""

from __future__ import annotations

import dataclasses

import pytest
from builders.experiment_runs import run

from rsaft_fast.experiments.alarms import (
    by_agreement,
    by_drift,
    by_judge,
    by_mean,
    calibration,
    case_of,
    fall_of_truth,
    table,
    trained_alone,
)
from rsaft_fast.experiments.records import Run


def told(truths, judge, errors=None, drifts=None, proxies=(1, 2, 3, 4, 5)) -> Run:
    """A run whose pictures' r* lie around `truths`, and what its monitors would have said."""
    made = run(truths, proxies[: len(truths)], judge=judge)
    points = []
    for index, point in enumerate(made.points):
        watched = {} if errors is None else {"judge/fair": errors[index]}
        watched |= {} if drifts is None else {"image/dark": drifts[index]}
        spread = (0.0, 0.001, -0.001, 0.0005 * index)
        pictures = {"r*": [point.truth + one for one in spread]}
        points.append(dataclasses.replace(point, pictures=pictures, watched=watched))
    return dataclasses.replace(made, points=tuple(points))


RISES, TURNS = (0.5, 0.6, 0.7, 0.8, 0.9), (0.5, 0.6, 0.7, 0.6, 0.5)


def test_a_fall_is_from_the_best_before_it():
    assert fall_of_truth(told(TURNS, None)) == (2, 3)
    assert fall_of_truth(told(RISES, None)) is None
    assert fall_of_truth(told((0.5, 0.4999, 0.5, 0.5, 0.5), None)) is None  # within the pictures' spread


@pytest.mark.parametrize(
    ("truths", "errors", "case"),
    [
        (TURNS, (None, 1, 1, -3, -9), "in time"),
        (TURNS, (None, 1, -3, 1, 1), "in time"),  # while r* was highest
        (TURNS, (None, -3, 1, 1, 1), "too soon"),
        (TURNS, (None, 1, 1, -2.9, -3), "late"),
        (TURNS, (None, 1, 1, -2.9, -2.9), "missed"),
        (RISES, (None, 1, 1, -3, 1), "false"),
        (RISES, (None, 1, 1, -2.9, 1), "quiet"),
    ],
)
def test_a_run_is_sorted_by_its_fall_and_the_first_warning(truths, errors, case):
    made = told(truths, (1.0, 0.9, 0.8, 0.7, 0.6), errors, drifts=[e and e / 3 for e in errors])
    assert case_of(made, by_judge("judge/fair", 3.0)) == case
    by_size = {-3: -1, -9: -3, -2.9: -0.9}  # a drift of either sign counts
    moved = told(truths, None, drifts=[by_size.get(e, 0.1) for e in errors])
    assert case_of(moved, by_drift(["image/dark"], 0.99)) == case


def test_a_judge_that_falls_with_the_proxy_says_nothing():
    made = told(TURNS, (1.0, 2.0, 1.0, 1.0, 1.0), (None, 1, -9, -9, -9), proxies=(1, 5, 4, 4, 4))
    assert case_of(made, by_judge("judge/fair", 3.0)) == case_of(made, by_mean("judge/fair")) == "missed"


@pytest.mark.parametrize(
    ("truths", "cosines", "case"),
    [
        (TURNS, (0.4, 0.2, 0.1, -0.3, -0.4), "in time"),
        (TURNS, (0.4, 0.2, -0.3, 0.1, 0.1), "in time"),  # of the weights at which r* was highest
        (TURNS, (-0.3, 0.2, 0.1, 0.1, 0.1), "too soon"),  # before the first update
        (TURNS, (0.4, 0.2, 0.1, -0.19, -0.3), "late"),
        (TURNS, (0.4, 0.2, 0.1, -0.19, -0.19), "missed"),
        (RISES, (0.4, 0.2, 0.1, -0.3, 0.1), "false"),
        (RISES, (0.4, 0.2, 0.1, -0.1, 0.1), "quiet"),
    ],
)
def test_agreement_is_that_of_the_weights_before_its_update(truths, cosines, case):
    said = [
        {"step": point.step + 1, "agreement/judge": cosine, "agreement_error/judge": 0.1}
        for point, cosine in zip(told(truths, None).points, cosines)
    ]
    said.append({"step": 36, "image_radius": 0.3})  # no judge was asked there
    made = dataclasses.replace(told(truths, None), steered=tuple(said))
    assert case_of(made, by_agreement(2.0)) == case
    assert case_of(told(truths, None), by_agreement(2.0)) is None


def test_runs_that_another_reward_trains_or_steers_are_left_out():
    kinds = ("plain", "both", "stop", "project-image", "radius-auto", "judge", "sum", "only-where", "worst", "gardo")
    runs = [dataclasses.replace(told(RISES, None), variant=kind) for kind in (*kinds, "momentum")]
    assert [one.variant for one in trained_alone(runs)] == ["plain", "both", "momentum"]


def test_files_without_a_monitor_are_left_out_of_its_row():
    old, new = told(TURNS, (1, 2, 3, 2, 1)), told(TURNS, (1, 2, 3, 2, 1), (None, 9, 9, -9, -9), (None, 0, 0, 0, 5))
    calm = told(RISES, (1, 2, 3, 2, 4), (None, 9, 9, -1, 9), (None, 0, 0, 0, 0))
    assert case_of(old, by_judge("judge/fair", 3.0)) is None
    head, rows = table([old, new, calm])
    found = {row[0]: dict(zip(head, row)) for row in rows}
    by_errors = next(row for name, row in found.items() if name.startswith("fair") and "errors" in name)
    assert by_errors["r* fell"] == "1" and by_errors["in time"] == "1 (100%)" and by_errors["false"] == "0 (0%)"
    at_all = found["fair fell at all"]
    assert at_all["r* fell"] == "2" and at_all["in time"] == "2 (100%)" and at_all["false"] == "1 (100%)"
    dark = next(row for name, row in found.items() if name.startswith("image/dark"))
    assert dark["late"] == "1 (100%)" and dark["r* never fell"] == "1"


def test_thresholds_are_told_apart_on_the_seeds_that_choose_and_on_the_others():
    warned = told(TURNS, (1, 2, 3, 2, 1), (None, 9, 9, -2.5, -2.5), (None, 0, 0.3, 0, 0))
    calm = told(RISES, (1, 2, 3, 2, 4), (None, 9, 9, -1.5, 9), (None, 0, 0, 0, 0))
    head, rows = calibration([dataclasses.replace(warned, seed=100), dataclasses.replace(calm, seed=100), warned])
    found = {(row[0], row[1]): dict(zip(head, row)) for row in rows}
    for kind in ("any reward fell", "most rewards fell"):  # there is one
        one, two, three = (found[kind, threshold] for threshold in "123")
        assert [one["false, choosing"], two["false, choosing"]] == ["1 (100%)", "0 (0%)"]
        assert two["in time, choosing"] == two["in time, others"] == "1 (100%)"
        assert three["in time, choosing"] == "0 (0%)"
        assert one["r* fell, others"] == "1" and one["false, others"] == "-"
    assert found["any statistic moved", "0.25"]["in time, others"] == "1 (100%)"
    assert found["any statistic moved", "0.5"]["in time, others"] == "0 (0%)"
