"""Alarms on evaluations whose figures are known."""

from __future__ import annotations

import math
import random
from statistics import fmean

import numpy as np
import pytest

from rsaft_fast.evaluation.alarms import change, drift_of, fall_of, find_alarms


def record(step: int, **pictures: list[float | None]) -> dict:
    named = {name.replace("__", "/"): own for name, own in pictures.items()}
    means = {name: fmean(v for v in own if v is not None) for name, own in named.items()}
    return {"step": step, "values": means, "pictures": named}


def test_a_change_is_the_paired_one():
    a, b = [random.gauss(0, 3) for _ in range(9)], [random.gauss(1, 3) for _ in range(9)]
    found, differences = change(a, b), np.subtract(b, a)
    assert found.mean == pytest.approx(differences.mean())
    assert found.error == pytest.approx(differences.std(ddof=1) / 3)
    assert found.errors == pytest.approx(found.mean / found.error)
    assert change([1.0, None, 2.0], [2.0, 5.0, 4.0]).mean == 1.5
    assert change(a, b[:8]) is None and change([1.0, None], [1.0, 2.0]) is None
    assert change([1, 2], [0, 1]).errors == -math.inf and change([1, 2], [1, 2]).errors == 0


def held(step: int, reward: float, fair: float) -> dict:
    noise = [-0.1, 0.0, 0.1, 0.2, -0.2]
    return record(step, reward=[reward + n for n in noise], held_out__fair=[fair + 2 * n * n for n in noise])


HISTORY = [held(0, 1, 5), held(10, 2, 6), held(20, 3, 5.9)]


def test_a_fall_is_from_the_best_so_far():
    now = record(30, reward=[4.0, 4.1, 4.2, 4.3, 3.9], held_out__fair=[5.0, 5.5, 5.3, 5.2, 5.1])
    fall = fall_of(HISTORY, now, "held_out/fair")
    best = HISTORY[1]["pictures"]["held_out/fair"]
    assert fall.best == 10 and fall.own.mean == pytest.approx(5.22 - fmean(best)) and fall.trained.mean > 0
    (line,) = find_alarms(HISTORY, now, errors=3.0, drift=1.0)
    assert line.startswith("held_out/fair: ") and " 10," in line and f"{-fall.own.errors:.1f}" in line
    limit = -fall.own.errors
    assert find_alarms(HISTORY, now, errors=limit * 1.001, drift=1.0) == []
    assert find_alarms(HISTORY, now, errors=limit * 0.999, drift=1.0) != []


def test_a_fall_with_the_trained_reward_is_no_hacking():
    now = record(30, reward=[1.0, 1.1, 1.2, 1.3, 0.9], held_out__fair=[5.0, 5.5, 5.3, 5.2, 5.1])
    assert find_alarms(HISTORY, now, errors=3.0, drift=1.0) == []


def test_statistics_warn_where_they_leave_the_untrained_pictures_range():
    base = record(0, image__dark=[0.1, 0.2, 0.3], diversity=[0.5, 0.6, 0.7], image__flat=[1.0, 1.0, 1.0])
    now = record(10, image__dark=[0.2, 0.3, 0.41], diversity=[0.35, 0.45, 0.55], image__flat=[3.0, 3.0, 3.0])
    assert drift_of(base, now, "image/dark") == pytest.approx((0.31 / 3) / 0.1)
    assert drift_of(base, now, "diversity") == pytest.approx(-1.5)
    assert drift_of(base, now, "image/flat") is None  # no range to leave
    assert [line.partition(":")[0] for line in find_alarms([base], now, 3.0, 1.0)] == ["image/dark", "diversity"]
    assert [line.partition(":")[0] for line in find_alarms([base], now, 3.0, 1.2)] == ["diversity"]
    assert "0.6" in find_alarms([base], now, 3.0, 1.2)[0] and "1.5" in find_alarms([base], now, 3.0, 1.2)[0]


def test_an_agreement_warns_when_it_is_surely_negative():
    now = record(10)
    now["values"] |= {"agreement/a": -0.21, "agreement_error/a": 0.1, "agreement/b": -0.19, "agreement_error/b": 0.1}
    now["values"] |= {"agreement/c": -0.9, "agreement/d": None}
    assert [line.partition(":")[0] for line in find_alarms([], now, 3.0, 1.0)] == ["agreement/a"]
