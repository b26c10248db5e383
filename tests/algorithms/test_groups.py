"""Advantages, full micro-batches and the clipped loss against the same written otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsaft_fast.algorithms.groups import full_batches, group_advantages, zero_spread
from rsaft_fast.algorithms.policy_objective import kl_scale, surrogate
from rsaft_fast.sampling.linear import LinearStep

REWARDS = torch.tensor([[1.0, 2.0, 4.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-8.0, 0.0, 0.5, 0.25]])


@pytest.mark.parametrize("std", ["none", "group", "global"])
def test_advantages_are_centred_in_each_group(std):
    r = REWARDS.double().numpy()
    scale = {"none": 1.0, "group": r.std(1, keepdims=True) + 1e-4, "global": r.std() + 1e-4}[std]
    wanted = (r - r.mean(1, keepdims=True)) / scale
    np.testing.assert_allclose(group_advantages(REWARDS, std, None).numpy(), wanted, rtol=1e-12)
    np.testing.assert_allclose(group_advantages(REWARDS, std, 1.0).numpy(), wanted.clip(-1, 1), rtol=1e-12)


def test_a_group_of_equal_rewards_has_no_advantage_and_is_known():
    assert zero_spread(REWARDS).tolist() == [False, True, False]
    for std in ("none", "group", "global"):
        assert (group_advantages(REWARDS[1:2], std)[0] == 0).all()


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_micro_batches_are_full_and_hold_every_sample_once(updates):
    kept, left_out = [0, 1, 4, 5, 6, 7, 10], [2, 3, 8, 9, 11]
    dealt = full_batches(kept, left_out, 3, updates, np.random.default_rng(0))
    assert len(dealt) == updates
    batches = [batch for update in dealt for batch in update]
    assert all(len(batch) == 3 for batch in batches)
    places = [place for batch in batches for place in batch]
    assert len(places) == len(set(places)) == 9 and set(kept) < set(places) <= {*kept, *left_out}
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert (places[:7] == kept) == (updates == 1)


def test_without_a_sample_that_tells_there_is_no_micro_batch():
    assert full_batches([], [0, 1], 2, 2, np.random.default_rng(0)) == [[], []]


def test_the_clipped_loss_and_its_slope():
    clip = 0.1
    log_ratio = torch.tensor([-0.5, -0.05, 0.0, 0.05, 0.5] * 2, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0] * 5 + [-3.0] * 5, dtype=torch.float64)
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
    ours = surrogate(log_ratio.detach(), advantages, clip)
    torch.testing.assert_close(ours.loss, loss.detach())
    torch.testing.assert_close(ours.slope, slope)
    assert ours.above.tolist() == [False, False, False, False, True] * 2
    assert ours.below.tolist() == [True, False, False, False, False] * 2
    assert ours.stopped.tolist() == [False] * 4 + [True] * 2 + [False] * 4


def test_a_divergence_mask_stops_what_moves_away_and_is_far():
    log_ratio = torch.tensor([0.3, 0.3, -0.3, -0.3, 0.3, 0.3, -0.3, -0.3], dtype=torch.float64)
    advantages = torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64)
    far = torch.tensor([2e-5, 1e-6] * 4, dtype=torch.float64)
    ours = surrogate(log_ratio, advantages, 1e-4, far, 1e-5)
    assert ours.stopped.tolist() == [True, False, False, False, False, False, True, False]
    torch.testing.assert_close(ours.slope, torch.where(ours.stopped, 0.0, -advantages * log_ratio.exp()))


def test_a_ratio_that_is_no_number_stops_nothing():
    ours = surrogate(torch.tensor([float("nan")]), torch.tensor([1.0]), 1e-4)
    assert ours.slope.isnan().all() and ours.loss.isnan().all()


def test_the_penalty_in_each_space():
    step = LinearStep(t=0, a=0.9, b=-0.2, c=0.3, x0_a=1.0, x0_b=-0.7, alpha=0.3, sigma=0.7)
    f, reference = torch.tensor([0.4, -1.0]), torch.tensor([0.1, 0.5])
    normal = lambda prediction: torch.distributions.Normal(step.b * prediction, step.c)  # noqa: E731
    divergence = torch.distributions.kl_divergence(normal(f), normal(reference)).mean()
    distance = (f - reference).square().mean()
    assert float(kl_scale(step, "mean", None) * distance) == pytest.approx(float(divergence), rel=1e-6)
    assert kl_scale(step, "mean", 0.25) == pytest.approx(0.25 * kl_scale(step, "mean", None))
    assert kl_scale(step, "velocity", 0.25) == 1
    clean = (0.7 * (f - reference)).square().mean()
    assert float(kl_scale(step, "x0", 0.25) * distance) == pytest.approx(float(clean), rel=1e-6)
