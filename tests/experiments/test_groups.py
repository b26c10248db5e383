"""What is read off runs: differences paired by seed, values at equal proxy, early stops, correlations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders.experiment_runs import finish, run

from rsaft_fast.experiments import groups
from rsaft_fast.experiments.records import S1
from rsaft_fast.experiments.row import Row
from rsaft_fast.experiments.statistics import interval

PLAIN = {
    0: run([0.4, 0.5, 0.3], [0, 2, 4], seed=0),
    1: run([0.4, 0.4, 0.2], [0, 1, 2], seed=1),
    2: run([0.4, 0.9, 0.9], [0, 9, 9], seed=2),  # of a seed that the other lacks
}
SMOOTHED = {
    0: run([0.4, 0.6, 0.6], [0, 4, 8], seed=0, variant="image"),
    1: run([0.4, 0.5, 0.6], [0, 1, 1.5], seed=1, variant="image"),
}


def test_differences_are_paired_by_seed():
    found = groups.summary("image", SMOOTHED, PLAIN)
    assert (found.seeds, found.start.mean, found.best_at) == (2, pytest.approx(0.4), 15)
    assert found.best == interval([0.6, 0.6]) and found.proxy == interval([8, 1.5])
    assert found.best_gain == interval([0.6 - 0.5, 0.6 - 0.4])
    assert found.end_gain == interval([0.6 - 0.3, 0.6 - 0.2])
    # Seed 0: both reach 4, plain at 0.3 and the other at 0.6. Seed 1: both reach 1.5, plain half-way at 0.3.
    assert found.level_gain.mean == pytest.approx(((0.6 - 0.3) + (0.6 - 0.3)) / 2) and found.level_gain.count == 2
    assert groups.summary("plain", PLAIN, None).best_gain is None


def test_a_run_that_never_rises_has_no_equal_proxy():
    still = {0: run([0.4, 0.5, 0.6], [0, -1, -2], seed=0)}
    found = groups.summary("still", still, PLAIN)
    assert found.level_gain is None and found.end_gain.count == 1


def test_the_common_level_is_what_all_kinds_reach_seed_by_seed():
    slow = {0: run([0.4, 0.5, 0.7], [0, 1, 2], seed=0), 1: run([0.4, 0.4, 0.4], [0, 0.5, 1], seed=1)}
    found = groups.at_common_level({"plain": PLAIN, "image": SMOOTHED, "slow": slow})
    # Levels 2 and 1.
    assert found["plain"].mean == pytest.approx((0.5 + 0.4) / 2)
    assert found["image"].mean == pytest.approx((0.5 + 0.5) / 2)
    assert found["slow"].mean == pytest.approx((0.7 + 0.4) / 2)
    assert groups.at_common_level({"plain": PLAIN, "other": {7: PLAIN[0]}}) == {}


def test_an_early_stop_is_where_the_judge_was_best_for_the_first_time():
    whole = run([0.4, 0.5, 0.6, 0.7], [0, 1, 2, 3], judge=[1, 3, 3, 2])
    stopped = groups.stopped_by(whole, "fair")
    assert [point.step for point in stopped.points] == [0, 10] and "fair" in stopped.variant
    assert groups.judges_of({("brittle", "draft", "plain"): {0: whole}}) == ["fair"]


def test_the_way_back_leads_from_the_start_to_the_last_weights():
    whole = run([0.4, 0.5, 0.3], [0, 2, 4], scaled=[(0.25, 0.45, 1), (0.5, 0.55, 2)])
    assert groups.path_back(whole).curve("r*") == [0.4, 0.45, 0.55, 0.3]
    assert groups.best(groups.path_back(whole)).scale == 0.5


def test_time_confounds_the_pooled_correlation_alone():
    """At every step S1 and r* fall apart exactly; over time both rise."""
    offsets = [0.0, 0.1, 0.2]
    runs = [
        run([0.4 - d, 0.6 - d, 0.8 - d], [0, 1, 2], s1=[1 + d, 3 + d, 5 + d], seed=seed)
        for seed, d in enumerate(offsets)
    ]
    assert [(step, count) for step, count, _ in groups.across_runs(runs, f"{S1}0.3")] == [(10, 3), (20, 3)]
    assert all(value == pytest.approx(-1) for _, _, value in groups.across_runs(runs, f"{S1}0.3"))
    x = np.array([point.means[f"{S1}0.3"] for r in runs for point in r.points])
    y = np.array([point.truth for r in runs for point in r.points])
    assert groups.pooled(runs, f"{S1}0.3") == pytest.approx(np.corrcoef(x, y)[0, 1]) and np.corrcoef(x, y)[0, 1] > 0.5


def test_runs_of_another_pipeline_are_left_out_and_said(tmp_path):
    row = Row("core", "brittle", "draft", "plain", 0, 20, 10, 4, ("smoothing=null",))
    for seed in (0, 1, 2):
        finish(Row(**vars(row) | {"seed": seed}), tmp_path, [0.4, 0.5, 0.3], [0, 2, 4])
    path = row.path(tmp_path)
    pipeline = next(line for line in path.read_text().split("\n") if '"pipeline"' in line)
    path.write_text(path.read_text().replace(pipeline, ' "pipeline": "another",'))
    said = []
    found = groups.load_sets(tmp_path, said.append)
    assert list(found) == ["core"] and list(found["core"]["brittle", "draft", "plain"]) == [1, 2]
    assert len(said) == 1 and "1 of 3" in said[0]
    first = found["core"]["brittle", "draft", "plain"][1]
    # Of the four pictures r* rises evenly while S1 falls evenly.
    within = groups.across_pictures({1: first}, f"{S1}0.3", lambda run: run.points[0])
    assert within.mean == pytest.approx(-1, abs=0.01) and math.isinf(within.half)
