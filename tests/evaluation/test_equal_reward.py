"""Runs at the same trained reward: the crossing by hand, and every picture's scores there."""

from __future__ import annotations

import pytest

from rsaft_fast.evaluation.equal_reward import Checkpoint, crossing, equal_reward
from rsaft_fast.evaluation.results import Results, Row, equal_reward_cells


@pytest.mark.parametrize(
    "levels, level, place",
    [
        ([1, 2, 4], 3, (1, 0.5)),
        ([1, 2, 4], 2, (1, 0)),
        ([1, 2, 4], 0.5, (0, 0)),
        ([1, 3, 2, 4], 2.5, (0, 0.75)),  # the first time
        ([1, 2, 4], 4.1, None),
    ],
)
def test_where_a_curve_first_reaches_a_level(levels, level, place):
    found = crossing(levels, level)
    assert found == (None if place is None else (place[0], pytest.approx(place[1])))


def curve(*points: tuple[int, list[float], list[float]]) -> list[Checkpoint]:
    return [Checkpoint(step, {"proxy": proxy, "held": held}) for step, proxy, held in points]


def test_runs_meet_where_the_lower_one_ends():
    start = (0, [0.0, 2.0], [5.0, 7.0])  # mean 1
    fast = curve(start, (10, [4.0, 6.0], [4.0, 6.0]))  # mean 5
    slow = curve(start, (10, [2.0, 2.0], [6.0, 6.0]), (20, [2.0, 4.0], [7.0, 9.0]))  # means 2, 3
    level, runs = equal_reward({"fast": fast, "slow": slow}, "proxy")
    assert level == 3 and runs["slow"].step == 20 and runs["slow"].columns["held"] == [7, 9]
    # Half of the way from 1 to 5.
    assert runs["fast"].step == 5 and runs["fast"].columns == {"proxy": [2, 4], "held": [4.5, 6.5]}


def test_a_run_that_never_rises_is_at_no_level():
    start = (0, [1.0], [1.0])
    assert equal_reward({"a": curve(start, (5, [2.0], [1.0])), "b": curve(start, (5, [0.5], [1.0]))}, "proxy") is None


def test_the_table_pairs_pictures_of_the_runs():
    base = Row("base", "", None, {"proxy": [0.0, 2.0, 1.0], "held": [5.0, 7.0, 6.0]})
    ends = {"fast": ([4.0, 6.0, 5.0], [4.0, 6.0, 5.5]), "slow": ([2.0, 4.0, 3.0], [7.0, 8.0, 9.0])}
    rows = [Row(f"+ {name}", f"+ {name}", 10, dict(zip(("proxy", "held"), columns))) for name, columns in ends.items()]
    results = Results([base, *rows], ["a", "b", "c"], ["proxy"], "proxy")
    title, head, cells = equal_reward_cells(results)
    assert "proxy" in title and "3.0" in title and head == ["run", "updates", "proxy*", "held"]
    fast, slow, less = cells
    assert fast[:2] == ["+ fast", "5.0"] and slow[:2] == ["+ slow", "10.0"]
    # Held-out differences at the level: 7 - 4.5, 8 - 6.5, 9 - 5.75: mean 2.4167, deviation 0.87797, t(2) 4.30265.
    assert less[0] == "less + fast" and less[3] == "+2.4167 ±2.1810"
    assert equal_reward_cells(Results([base, rows[0]], ["a", "b", "c"], ["proxy"], "proxy")) is None  # no other run
    assert (
        equal_reward_cells(Results([base, *rows], ["a", "b", "c"], ["proxy", "held"])) is None
    )  # of different rewards
