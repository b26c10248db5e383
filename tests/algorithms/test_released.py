"""An update whose optimizer step runs inside the second backward pass equals one that waits."""

import pytest
import torch
from algorithms.test_reward_gradient import (
    BALLS,
    GUIDANCE,
    LINEAR,
    T,
    backbone,
    make_batches,
    reward,
    shared_backbone,
    weights_of,
)
from builders.messages import says

from rsaft_fast.algorithms.reward_gradient import rsaft_step
from rsaft_fast.errors import UserError
from rsaft_fast.methods import DRaFT, ReFL
from rsaft_fast.optim import SAMAdamW

__all__ = ["backbone", "reward", "shared_backbone"]

METHODS = [DRaFT(k=1, uncond="detached"), ReFL(uncond="detached")]


def update(backbone, reward, method, batches=None, smoothing="both", **options):
    """New weights, and the report; the old ones are put back by the fixture."""
    before = weights_of(backbone)
    optimizer = SAMAdamW(backbone.trainable_parameters.values(), lr=1e-2, rho=0.3, **options)
    batches = batches or make_batches(backbone, method)
    try:
        report = rsaft_step(
            backbone, reward, backbone.schedule(T), batches, optimizer, smoothing=BALLS[smoothing], loss=LINEAR
        )
        return weights_of(backbone), report, optimizer
    finally:
        with torch.no_grad():
            for name, p in backbone.trainable_parameters.items():
                p.copy_(before[name])


@pytest.mark.parametrize("method", METHODS, ids=["draft", "refl"])
@pytest.mark.parametrize("smoothing", ["parameters", "both"])
def test_released_equals_waiting(backbone, reward, method, smoothing):
    waited, plain, _ = update(backbone, reward, method, smoothing=smoothing)
    released, report, optimizer = update(backbone, reward, method, smoothing=smoothing, release_gradients=True)
    assert all(torch.equal(waited[name], released[name]) for name in waited)
    assert all(p.grad is None for p in backbone.trainable_parameters.values())
    assert report.smoothed_reward == plain.smoothed_reward and not optimizer.half_stepped


def test_without_parameter_smoothing_nothing_is_released(backbone, reward):
    waited, *_ = update(backbone, reward, METHODS[0], smoothing="image")
    released, *_ = update(backbone, reward, METHODS[0], smoothing="image", release_gradients=True)
    assert all(torch.equal(waited[name], released[name]) for name in waited)


def test_a_non_finite_adjoint_skips_the_whole_update(backbone, reward, monkeypatch):
    from rsaft_fast.algorithms import reward_gradient as step

    before, latent_gradient, calls = weights_of(backbone), step.latent_gradient, []

    def poisoned(*arguments):
        calls.append(1)
        return latent_gradient(*arguments) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(step, "latent_gradient", poisoned)
    after, report, optimizer = update(backbone, reward, METHODS[0], release_gradients=True)
    assert len(calls) == 2 and all(torch.equal(before[name], after[name]) for name in before)
    assert report.optimizer["skipped"] == 1 and not optimizer.half_stepped


@pytest.mark.parametrize(
    ("method", "sizes", "calls"),
    [(DRaFT(k=1), (4,), 2), (DRaFT(k=2, uncond="detached"), (4,), 2), (METHODS[0], (2, 2), 2)],
    ids=["guided", "k=2", "accumulated"],
)
def test_more_than_one_backward_is_refused_before_anything_happens(backbone, reward, method, sizes, calls):
    before = weights_of(backbone)
    batches = make_batches(backbone, method, sizes)
    assert batches[0].batch.conditioning.guidance_scale == GUIDANCE
    with pytest.raises(UserError, match=says("release_gradients", calls, "backward", "compare_gradients=False")):
        update(backbone, reward, method, batches, release_gradients=True)
    after = weights_of(backbone)
    assert all(torch.equal(before[name], after[name]) for name in before)
