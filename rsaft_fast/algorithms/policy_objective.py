"""Clipped policy gradient: its loss, and the loss's slope by the log-ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rsaft_fast.sampling.linear import LinearStep

KLSpace = Literal["mean", "velocity", "x0"]


@dataclass(frozen=True)
class Surrogate:
    """A clipped policy loss of one call, (B,) float64 each.

    Attributes:
        loss: max(-A rho, -A clip(rho, 1 - eps, 1 + eps)).
        slope: d loss / d log rho.
        ratio: rho.
        above, below: whether rho has left the clip range.
        stopped: whether the sample's gradient is cut off.
    """

    loss: torch.Tensor
    slope: torch.Tensor
    ratio: torch.Tensor
    above: torch.Tensor
    below: torch.Tensor
    stopped: torch.Tensor


def surrogate(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip: float,
    divergence: torch.Tensor | None = None,
    most_divergence: float | None = None,
) -> Surrogate:
    """Compute PPO's clipped loss (Schulman et al. 2017, eq. 7), or Flow-DPPO's masked one.

    Args:
        log_ratio: log p(x') - log p_old(x'), (B,).
        advantages: (B,).
        clip: eps of the clip range 1 - eps to 1 + eps.
        divergence: of each sample's step from the old one, (B,).
        most_divergence: given, samples beyond it whose ratio moves further away are cut off, and no others
            (Flow-DPPO, arXiv 2606.11025); `clip` then only counts.
    """
    ratio = log_ratio.exp()
    above, below = ratio > 1 + clip, ratio < 1 - clip
    if most_divergence is None:
        stopped = ((advantages > 0) & above) | ((advantages < 0) & below)
        value = torch.where(stopped, ratio.clamp(1 - clip, 1 + clip), ratio)
    else:
        assert divergence is not None
        away = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
        stopped, value = away & (divergence > most_divergence), ratio
    # Where the ratio is not a number nothing is cut off: the gradient says so, and the update is skipped.
    slope = torch.where(stopped, 0.0, -advantages * ratio)
    return Surrogate(-advantages * value, slope, ratio, above, below, stopped)


def kl_scale(step: LinearStep, space: KLSpace, duration: float | None) -> float:
    """Return k of the penalty k mean((f - f_reference)^2) over a latent's elements.

    Args:
        space: mean is the KL divergence of the two steps, b^2 / (2 c^2); velocity the prediction itself, 1; x0 the
            predicted clean latent, x0_b^2.
        duration: of the step; given, that of the space "mean" is multiplied by it, as the released Flow-GRPO does,
            which divides by s^2 where c^2 = s^2 duration.
    """
    if space == "mean":
        return step.b**2 / (2 * step.c**2) * (1.0 if duration is None else duration)
    return 1.0 if space == "velocity" else step.x0_b**2
