"""Paired differences against the textbook's formulae, and which picture belongs to which."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from builders.messages import says

from rsaft_fast.data.picture_lists import Picture
from rsaft_fast.evaluation.comparison import (
    Difference,
    difference,
    difference_table,
    pair_up,
    student_quantile,
    verdict,
)

# Two-sided 95 %, from printed tables (Abramowitz and Stegun, table 26.10).
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 31: 2.040, 120: 1.980}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom):
    assert student_quantile(freedom) == pytest.approx(TABLE[freedom], abs=6e-4)


def test_many_degrees_of_freedom_are_the_normal_distribution():
    assert student_quantile(10_001) == pytest.approx(1.959964, abs=1e-6)
    assert student_quantile(10_000) == pytest.approx(student_quantile(10_001), abs=3e-4)
    assert student_quantile(10, 0.99) == pytest.approx(3.169, abs=6e-4)


def test_one_picture_a_prompt_is_the_ordinary_paired_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=12), rng.normal(0.5, size=12)
    found = difference(a, b, [str(i) for i in range(12)])
    half = 2.201 * np.std(b - a, ddof=1) / math.sqrt(12)
    assert found.mean == pytest.approx((b - a).mean())
    assert [found.low, found.high] == pytest.approx([(b - a).mean() - half, (b - a).mean() + half], abs=1e-3)
    assert found.wins == (b > a).mean()
    # All of one prompt: pictures are all there is to go by.
    assert difference(a, b, ["x"] * 12) == found


def test_pictures_of_one_prompt_are_one_witness():
    """Ten copies of each picture tell no more than the pictures."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=6), rng.normal(size=6)
    once = difference(a, b, list("abcdef"))
    often = difference(np.repeat(a, 10), np.repeat(b, 10), list(np.repeat(list("abcdef"), 10)))
    assert [often.mean, often.low, often.high] == pytest.approx([once.mean, once.low, once.high])


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Four hundred draws of 5 prompts with 3 correlated pictures each; a naive interval over pictures would fail."""
    rng, held = np.random.default_rng(2), 0
    for _ in range(400):
        d = (rng.normal(size=(5, 1)) + 0.3 * rng.normal(size=(5, 3))).ravel()
        found = difference(np.zeros(15), d, list(np.repeat(list("abcde"), 3)))
        held += found.low <= 0 <= found.high
    assert 0.92 < held / 400 < 0.98


def test_ties_are_half_wins_and_one_pair_tells_nothing():
    assert difference([0, 0, 0, 0], [1, 0, -1, 0], list("abcd")).wins == 0.5
    single = difference([0.0], [1.0], ["a"])
    assert math.isinf(single.high) and single.sign == 0
    same = difference([1.0, 2.0], [1.0, 2.0], list("ab"))
    assert (same.low, same.high, same.sign) == (0, 0, 0)


def pictures(*entries, group="a", listed=True):
    """Of (file, prompt, seed)."""
    return [Picture(i, Path(group) / n, group, p if listed else None, s) for i, (n, p, s) in enumerate(entries)]


def paired(first, second, prompts=None):
    prompts = prompts or {picture: picture.prompt for picture in (*first, *second)}
    return pair_up(first, second, prompts)


def test_pairs_are_found_by_prompt_and_seed_whatever_the_order():
    first = pictures(("0", "x", 0), ("1", "y", 0), ("2", "x", 1))
    second = pictures(("0", "x", 1), ("1", "x", 0), ("2", "y", 0), group="b")
    found = paired(first, second)
    assert (found.how, found.pairs) == ("prompt and seed", [(0, 1), (1, 2), (2, 0)])
    assert found.prompts == ["x", "y", "x"]


def test_other_seeds_are_paired_by_name_and_other_names_by_the_prompts_order():
    first = pictures(("0.png", "x", 0), ("1.png", "x", 0), ("2.png", "y", 0))
    later = pictures(("2.jpg", "y", 7), ("1.jpg", "x", 7), ("0.jpg", "x", 7), group="b")
    assert paired(first, later).pairs == [(0, 2), (1, 1), (2, 0)] and paired(first, later).how == "name"
    renamed = pictures(("c.png", "x", None), ("d.png", "y", None), ("e.png", "x", None), group="b")
    found = paired(first, renamed)
    assert (found.how, found.pairs) == ("prompt and order", [(0, 0), (1, 2), (2, 1)])


def test_order_does_not_replace_names_where_it_pairs_more():
    first = pictures(("1.png", "x", None), ("2.png", "x", None))
    found = paired(first, pictures(("2.png", "x", None), ("10.png", "x", None), group="b"))
    assert (found.how, found.pairs) == ("name", [(1, 0)])


def test_names_alone_make_no_pair_of_different_prompts():
    first, second = pictures(("0.png", "x", None)), pictures(("0.png", "y", None), group="b")
    assert paired(first, second).pairs == []


def test_what_cannot_be_told_is_not_told():
    differences = {
        "up": Difference(0.5, 0.1, 0.9, 0.8),
        "down": Difference(-0.5, -0.9, -0.1, 0.2),
        "open": Difference(0.5, -0.1, 1.1, 0.7),
        "none": Difference(0.5, -math.inf, math.inf, 1.0),
    }
    text = verdict("A", "B", differences)
    assert "by up, B is better than A" in text and "by down, B is worse than A" in text
    assert says("open, none", "cannot").search(text)
    first, second = pictures(("0", "x", 0), ("1", "y", 0)), pictures(("0", "x", 0), ("1", "y", 0), group="b")
    table = difference_table("A", "B", paired(first, second), differences)
    assert (
        says("2 pairs", "prompt and seed").search(table) and says("+0.1000", "+0.9000").search(table) and "80%" in table
    )
    assert "inf" not in table
