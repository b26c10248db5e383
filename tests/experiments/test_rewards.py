"""The mean over random perturbations: of what, how long, and the same for the same picture."""

from __future__ import annotations

import pytest
import torch
from builders.messages import says

from rsaft_fast.errors import UserError
from rsaft_fast.experiments.rewards import GaussianMean
from rsaft_fast.rewards import Reward, RewardSpec


class Bowl(Reward):
    """r(x) = -|x|^2 + <1, x>: the mean over a pair of opposite steps n is r(x) - |n|^2, whatever their directions."""

    spec = RewardSpec("bowl")

    def score(self, images, prompts):
        return (images - images.square()).sum((1, 2, 3))


def test_the_mean_is_over_pairs_of_opposite_steps_of_the_stated_length():
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(
        True
    )
    smoothed = GaussianMean(Bowl(), length=0.5, draws=64)
    scores = smoothed.score(images, ["a"] * 3)
    lost = Bowl().score(images, []) - scores
    # Each loses the mean square of 32 steps whose expected square is 0.25; its deviation is 0.25 sqrt(2 / (192 * 32)).
    torch.testing.assert_close(lost.detach(), torch.full((3,), 0.25, dtype=torch.float64), atol=0.02, rtol=0)
    assert len(set(lost.tolist())) == 3
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    torch.testing.assert_close(gradient, 1 - 2 * images.detach())


def test_draws_follow_from_the_picture_alone():
    images = torch.rand(3, 3, 8, 8)
    smoothed = GaussianMean(Bowl(), length=0.5, draws=4)
    together = smoothed.score(images, ["a"] * 3)
    assert torch.equal(smoothed.score(images[1:2], ["a"]), together[1:2])
    assert torch.equal(smoothed.score(images, ["a"] * 3), together)


@pytest.mark.parametrize(("length", "draws"), [(0.0, 4), (0.5, 3), (0.5, 0)])
def test_what_smooths_nothing_is_refused(length, draws):
    with pytest.raises(UserError, match=says("length", "draws", draws)):
        GaussianMean(Bowl(), length, draws)
