"""DiffusionNFT's loss, its derivative and its optimum, against a version written from the equations."""

import pytest
import torch

from rsaft_fast.algorithms.nft_objective import (
    NoisedSamples,
    implicit_predictions,
    nft_cotangent,
    nft_loss,
    probabilities,
    reference_cotangent,
    reference_distance,
)
from rsaft_fast.methods.nft import NFT, OldPolicy
from rsaft_fast.sampling.linear import LinearStep

F64 = torch.float64
FLOW = LinearStep(t=700.0, a=1.0, b=-0.1, c=0.0, x0_a=1.0, x0_b=-0.7, alpha=0.3, sigma=0.7)
# x0 = (x - sigma eps) / alpha of an eps model.
EPS = LinearStep(t=500.0, a=1.0, b=0.1, c=0.0, x0_a=1 / 0.6, x0_b=-0.8 / 0.6, alpha=0.6, sigma=0.8)
STEPS = pytest.mark.parametrize("step", [FLOW, EPS], ids=["flow", "eps"])
SETTINGS = [
    NFT(),
    NFT(nft_beta=0.1),
    NFT(nft_beta=0.5, probability="code"),
    NFT(adaptive=False, gain=3.0),
    NFT(floor=10.0),
]


def batch(seed: int, step: LinearStep, dtype: torch.dtype = F64) -> tuple[NoisedSamples, torch.Tensor]:
    print("seed", seed)
    draw = torch.Generator().manual_seed(seed)
    clean, noise, old, prediction = torch.randn(4, 3, 2, 4, 4, generator=draw, dtype=F64)
    probability = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    noisy = step.alpha * clean + step.sigma * noise
    samples = NoisedSamples(clean.to(dtype), noisy.to(dtype), old.to(dtype), probability, step)
    return samples, prediction.to(dtype)


def by_equations(prediction, samples, settings) -> torch.Tensor:
    """Sample after sample, as the paper (and its code) has it."""
    losses, b, step = [], settings.nft_beta, samples.step
    for f, old, x, clean, p in zip(prediction, samples.old, samples.noisy, samples.clean, samples.probability):
        total = 0.0
        for weight, implicit in ((p, (1 - b) * old + b * f), (1 - p, (1 + b) * old - b * f)):
            if step is FLOW:
                predicted = x - step.sigma * implicit
            else:
                predicted = (x - step.sigma * implicit) / step.alpha
            size = 1.0
            if settings.adaptive:
                size = (predicted - clean).detach().abs().mean().clamp(min=settings.floor)
            total = total + weight * ((predicted - clean) ** 2 / size).mean()
        if settings.gain is not None:
            total = total * settings.gain
        elif settings.probability == "code":
            total = total * 5 / b
        losses.append(total)
    return torch.stack(losses)


@STEPS
@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "strong", "code", "plain", "floored"])
def test_the_loss_and_its_derivative_are_autograds(settings, step):
    samples, prediction = batch(0, step)
    leaf = prediction.clone().requires_grad_()
    expected = by_equations(leaf, samples, settings)
    assert nft_loss(prediction, samples, settings).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    found = nft_cotangent(prediction, samples, settings)
    assert (found - slope).abs().max() < 1e-9 * slope.abs().max()
    assert slope.flatten(1).abs().amax(1).min() > 0


def test_the_reference_penalty_and_its_derivative():
    samples, prediction = batch(1, FLOW)
    leaf = prediction.clone().requires_grad_()
    expected = ((leaf - samples.old) ** 2).mean((1, 2, 3))
    assert reference_distance(prediction, samples.old).tolist() == pytest.approx(expected.tolist())
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    assert (reference_cotangent(prediction, samples.old) - slope).abs().max() < 1e-12


@STEPS
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=["default", "strong", "code"])
def test_bf16_inputs_are_computed_in_fp32(settings, step):
    samples, prediction = batch(2, step, torch.bfloat16)
    wide = NoisedSamples(*(t.double() for t in vars(samples).values() if isinstance(t, torch.Tensor)), step)
    exact = nft_cotangent(prediction.double(), wide, settings)
    found = nft_cotangent(prediction, samples, settings)
    assert found.dtype == nft_loss(prediction, samples, settings).dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
    assert reference_distance(prediction, samples.old).dtype == torch.float32


@STEPS
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_the_optimum_is_the_old_policy_and_two_over_beta_delta(step, beta):
    """One x_t that six clean samples may come from: the old policy predicts their posterior mean."""
    draw = torch.Generator().manual_seed(3)
    clean = torch.randn(6, 1, 2, 2, generator=draw, dtype=F64)
    posterior = torch.rand(6, generator=draw, dtype=F64)
    posterior, good = posterior / posterior.sum(), torch.rand(6, generator=draw, dtype=F64)
    noisy = torch.randn(1, 1, 2, 2, generator=draw, dtype=F64).expand(6, -1, -1, -1)
    targets = (clean - step.x0_a * noisy) / step.x0_b  # the prediction of which each clean sample follows
    weights = posterior.view(6, 1, 1, 1)
    old = (weights * targets).sum(0, keepdim=True)
    samples = NoisedSamples(clean, noisy, old.expand(6, -1, -1, -1), good, step)
    settings = NFT(nft_beta=beta, adaptive=False)

    def gradient(prediction: torch.Tensor) -> torch.Tensor:
        return (weights * nft_cotangent(prediction.expand(6, -1, -1, -1), samples, settings)).sum(0, keepdim=True)

    # The expected loss is quadratic, with the same curvature in every element: one Newton step solves it.
    curvature = gradient(old + 1) - gradient(old)
    optimum = old - gradient(old) / curvature
    delta = (weights * good.view(6, 1, 1, 1) * (targets - old)).sum(0, keepdim=True)
    assert (optimum - (old + 2 / beta * delta)).abs().max() < 1e-12
    assert delta.abs().max() > 0.01
    alpha = (posterior * good).sum()
    positive = (weights * good.view(6, 1, 1, 1) * targets).sum(0, keepdim=True) / alpha
    assert (delta - alpha * (positive - old)).abs().max() < 1e-12  # the paper's Delta


def test_a_certain_sample_pulls_to_itself_and_a_bad_one_pushes_away():
    samples, _ = batch(4, FLOW)
    target = (samples.clean - samples.noisy) / FLOW.x0_b
    toward = (target - samples.old).flatten(1)
    slope = nft_cotangent(samples.old, samples, NFT()).flatten(1)
    along = -(slope * toward).sum(1) / slope.norm(dim=1) / toward.norm(dim=1)
    assert along.tolist() == pytest.approx([-1, -1, 1])  # probabilities 0, 0.3 and 1


def test_probabilities():
    advantages = torch.tensor([-9.0, -1, -0.5, 0, 0.5, 1, 9])
    assert probabilities(advantages, NFT().saturation).tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    by_code = probabilities(advantages, NFT(probability="code").saturation)
    assert by_code.tolist() == pytest.approx([max(-5, min(5, a)) / 10 + 0.5 for a in advantages.tolist()])
    positive, negative = implicit_predictions(torch.tensor(3.0), torch.tensor(1.0), 0.25)
    assert (positive.item(), negative.item()) == (1.5, 0.5)


def test_how_the_old_policy_follows():
    assert [OldPolicy().decay(n) for n in (0, 100, 500, 9999)] == pytest.approx([0, 0.1, 0.5, 0.5])
    released = OldPolicy(slope=0.0075, start=75, most=0.999)
    assert [released.decay(n) for n in (0, 75, 76, 175, 9999)] == pytest.approx([0, 0, 0.0075, 0.75, 0.999])
    assert NFT().trained_calls(10) == 9 and NFT(timestep_fraction=0.01).trained_calls(10) == 1
    assert NFT().loss_gain == 1 and NFT(probability="code", nft_beta=0.1).loss_gain == pytest.approx(50)
