"""Intervals, levels and correlations, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rsaft_fast.experiments.statistics import at_level, correlation, interval


def test_the_interval_is_students():
    found = interval([1.0, 2.0, 4.0])
    # Mean 7/3; squares of the residuals 16/9 + 1/9 + 25/9 = 14/3, deviation sqrt(7/3); t of 2 degrees 4.3027.
    assert found.mean == pytest.approx(7 / 3) and found.count == 3
    assert found.half == pytest.approx(4.302653 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-6)
    assert found.sign == 0 and interval([1.0, 1.1, 1.2]).sign == 1 and interval([-1.0, -1.1, -1.2]).sign == -1


def test_one_seed_has_no_interval_and_none_no_mean():
    assert interval([]) is None
    single = interval([0.3])
    assert (single.mean, single.count, single.sign) == (0.3, 1, 0) and math.isinf(single.half)


@pytest.mark.parametrize(
    ("level", "value"),
    [(-1, 10), (0, 10), (1, 15), (2, 20), (3, 30 + 20 * 2 / 3), (4, 50), (4.1, None)],
)
def test_a_level_is_found_where_it_is_first_reached(level, value):
    """The proxy falls back to 1 on its way: 3 is reached between the last two only."""
    found = at_level([0, 2, 1, 4], [10, 20, 30, 50], level)
    assert found is None if value is None else found == pytest.approx(value)


def test_correlation_is_pearsons():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)
    assert correlation([1, 2, 3], [5, 3, 1]) == pytest.approx(-1)
    assert correlation([1, 1, 1], [1, 2, 3]) is None and correlation([1, 2], [1, 2]) is None
    with pytest.raises(ValueError, match="3 values beside 2"):
        correlation([1, 2, 3], [1, 2])
