"""DiffusionNFT's objective as functions of the prediction (arXiv 2509.16117).

The network's prediction f at x_t = alpha x0 + sigma noise, of one of the policy's own finished samples x0, makes two
implicit policies with the collecting (old) policy's prediction: f+ = old + beta (f - old), f- = old - beta (f - old).
Each predicts a clean sample, x0+- = x0_a x_t + x0_b f+-, which is compared with x0: errors live in x0 space, whatever
the network predicts. The positive one counts with the probability p that the sample is good:

    loss = gain (p |x0+ - x0|^2 + (1 - p) |x0- - x0|^2),

means over a sample's elements, each square divided by its own mean absolute error held constant, where `adaptive`.
Without that division the optimum is old + (2 / beta) Delta, with Delta = E[p (target - old)] over the x0 that x_t may
come from.

Computed in float32 at least. Derivatives are written out, for `call_backward` takes a cotangent as a function of the
prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rsaft_fast.dtypes import wide
from rsaft_fast.methods.nft import NFT
from rsaft_fast.sampling.linear import LinearStep


@dataclass(frozen=True)
class NoisedSamples:
    """A micro-batch of finished samples at one noise level, and what the loss compares the prediction with.

    Attributes:
        clean: x0, (B, *latent_shape).
        noisy: x_t = alpha x0 + sigma noise, of which the prediction is made.
        old: prediction of the collecting policy at x_t.
        probability: (B,) that the sample is good, 0 to 1.
        step: the noise level.
    """

    clean: torch.Tensor
    noisy: torch.Tensor
    old: torch.Tensor
    probability: torch.Tensor
    step: LinearStep


def probabilities(advantages: torch.Tensor, saturation: float = 1.0) -> torch.Tensor:
    """Turn advantages (N,) into probabilities that samples are good: 1/2 + clip(A / saturation, -1, 1) / 2, float64."""
    return 0.5 + 0.5 * (advantages.double() / saturation).clamp(-1, 1)


def implicit_predictions(
    prediction: torch.Tensor, old: torch.Tensor, nft_beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the implicit positive and negative predictions, old +- nft_beta (prediction - old)."""
    turn = nft_beta * (prediction - old)
    return old + turn, old - turn


def nft_loss(prediction: torch.Tensor, samples: NoisedSamples, settings: NFT) -> torch.Tensor:
    """Compute each sample's loss (B,), without the reference penalty.

    Args:
        prediction: of the trained policy at `samples.noisy`, (B, *latent_shape).
    """
    positive, negative = _errors(prediction, samples, settings)
    p = samples.probability.to(positive.dtype)
    of_positive = _mean(positive.square()) / _sizes(positive, settings)
    of_negative = _mean(negative.square()) / _sizes(negative, settings)
    return settings.loss_gain * (p * of_positive + (1 - p) * of_negative)


def nft_cotangent(prediction: torch.Tensor, samples: NoisedSamples, settings: NFT) -> torch.Tensor:
    """Compute the derivative of each sample's `nft_loss` with respect to its prediction, (B, *latent_shape)."""
    positive, negative = _errors(prediction, samples, settings)
    p = samples.probability.to(positive.dtype)
    of_positive = _spread(p / _sizes(positive, settings), positive) * positive
    of_negative = _spread((1 - p) / _sizes(negative, settings), negative) * negative
    slope = settings.loss_gain * settings.nft_beta * samples.step.x0_b * 2 / positive[0].numel()
    return slope * (of_positive - of_negative)


def reference_distance(prediction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared difference (B,) to the reference's prediction; the reference is the base or its heir."""
    return _mean((wide(prediction) - wide(reference)).square())


def reference_cotangent(prediction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Compute the derivative of each sample's `reference_distance` by its prediction, (B, *latent_shape)."""
    difference = wide(prediction) - wide(reference)
    return difference * (2 / difference[0].numel())


def _errors(prediction: torch.Tensor, samples: NoisedSamples, settings: NFT) -> tuple[torch.Tensor, torch.Tensor]:
    """x0+ - x0 and x0- - x0."""
    clean, noisy, step = wide(samples.clean), wide(samples.noisy), samples.step
    at_x = step.x0_a * noisy - clean
    positive, negative = implicit_predictions(wide(prediction), wide(samples.old), settings.nft_beta)
    return at_x + step.x0_b * positive, at_x + step.x0_b * negative


def _sizes(error: torch.Tensor, settings: NFT) -> torch.Tensor:
    """What a sample's squares are divided by, (B,), a constant."""
    if not settings.adaptive:
        return torch.ones(len(error), dtype=error.dtype, device=error.device)
    return error.detach().abs().flatten(1).mean(1, dtype=torch.float64).clamp(min=settings.floor).to(error.dtype)


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).mean(1)


def _spread(weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return weights.view(-1, *[1] * (like.ndim - 1))
