"""FID, KID and diversity against torchmetrics, by hand on constructed sets, and their intervals."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.distances import frechet_distance, kernel_distance, spread, spread_within


class Given(torch.nn.Module):
    """A feature extractor that takes features."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def sets(count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    mix = torch.randn(width, width, dtype=torch.float64)
    first = torch.randn(count, width, dtype=torch.float64) @ mix
    return first, 0.7 * torch.randn(count, width, dtype=torch.float64) @ mix + 0.3


@pytest.mark.parametrize("count, width", [(301, 7), (40, 33), (90, 89)])
def test_fid_is_that_of_torchmetrics(count, width):
    fid = pytest.importorskip("torchmetrics.image.fid")
    first, second = sets(count, width)
    metric = fid.FrechetInceptionDistance(feature=Given(width))
    metric.set_dtype(torch.float64)
    metric.update(first, real=True), metric.update(second, real=False)
    assert frechet_distance(first, second) == pytest.approx(float(metric.compute()), rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9 * float(first.square().sum()))


def test_fid_of_fewer_pictures_than_numbers_is_that_of_the_matrix_root():
    """Singular covariances, by the eigenvalues of their product."""
    first, second = sets(9, 20)
    one, two = torch.cov(first.T), torch.cov(second.T)
    root = torch.linalg.eigvals(one @ two).real.clamp_min(0).sqrt().sum()
    expected = (first.mean(0) - second.mean(0)).square().sum() + one.trace() + two.trace() - 2 * root
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("count, width", [(57, 11), (23, 40)])
def test_kid_is_that_of_torchmetrics(count, width):
    kid = pytest.importorskip("torchmetrics.image.kid")
    first, second = sets(count, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = kid.KernelInceptionDistance(feature=Given(width), subsets=1, subset_size=count)
        metric.set_dtype(torch.float64)
        metric.update(first, real=True), metric.update(second, real=False)
        expected = float(metric.compute()[0])
    found = kernel_distance(first, second, range(count))
    assert found.value == pytest.approx(expected, rel=1e-9) and found.low < found.value < found.high


def test_kids_interval_covers_the_truth_as_often_as_it_says():
    """Of two sets of one distribution the distance is 0: of 200 intervals some 190 should hold it."""
    generator = torch.Generator().manual_seed(3)
    held = 0
    for _ in range(200):
        first, second = (torch.randn(60, 5, generator=generator) for _ in range(2))
        found = kernel_distance(first, second, range(60))
        held += found.low <= 0 <= found.high
    assert 178 <= held


def test_diversity_by_hand():
    right, up = [1.0, 0.0], [0.0, 1.0]
    slanted = [math.cos(math.pi / 3), math.sin(math.pi / 3)]
    features = torch.tensor([right, up, right, slanted])
    # Distances of the pairs: 1, 0, 1/2 of the first; 1 and 1 - sin 60 of the second; 1/2 of the third.
    pairs = [1, 0, 0.5, 1, 1 - math.sin(math.pi / 3), 0.5]
    assert spread(features, "abcd").value == pytest.approx(sum(pairs) / 6, abs=1e-7)
    within = spread_within(features, "aabb")
    assert within.value == pytest.approx((1 + 0.5) / 2, abs=1e-7)
    # Two prompts: half the distance of the two values, times Student's quantile with one degree of freedom.
    assert within.high - within.value == pytest.approx(12.7062 * 0.25, rel=1e-4)
    assert spread_within(features, "abcd") is None
    assert spread_within(features, "abaa").low == -math.inf  # one prompt alone has several


def test_a_jackknife_leaves_out_whole_prompts():
    """With as many folds as prompts, by leaving pictures out one prompt at a time."""
    features = torch.nn.functional.normalize(torch.randn(10, 4, dtype=torch.float64), dim=1)
    groups = [0, 0, 1, 2, 2, 2, 3, 4, 4, 1]

    def mean(places: list[int]) -> float:
        return sum(float(1 - features[i] @ features[j]) for i, j in itertools.combinations(places, 2)) / math.comb(
            len(places), 2
        )

    without = [mean([i for i, group in enumerate(groups) if group != left]) for left in range(5)]
    middle = sum(without) / 5
    error = math.sqrt(4 / 5 * sum((one - middle) ** 2 for one in without))
    found = spread(features, groups)
    assert found.value == pytest.approx(mean(list(range(10))), rel=1e-9)
    assert found.high - found.value == pytest.approx(2.776445 * error, rel=1e-6)


@pytest.mark.parametrize("first, second", [((1, 3), (4, 3)), ((4, 3), (4, 5)), ((4,), (4, 3))])
def test_sets_that_have_no_distance_are_refused(first, second):
    with pytest.raises(UserError, match=r"shapes \("):
        frechet_distance(torch.zeros(first), torch.zeros(second))
