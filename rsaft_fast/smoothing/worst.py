"""The lowest reward within a ball, looked for by projected gradient descent (Madry et al. 2018, arXiv 1706.06083).

One step of length radius against the gradient is eq. 15 of RSA-FT (arXiv 2603.21175), and exact for a linear reward.
Where the reward curves within the ball, further steps go lower. The step is a sample's own, at first the radius, and
halved where it does not descend, so that there is no length to choose. (On the playground's proxies 20 such steps find
98 to 100 % of what steps that shrink linearly do, more at small radii, and unlike those they end at a minimum.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch

from rsaft_fast.ops import image_delta


class Evaluate(Protocol):
    """Rewards (B,) at `delta` (B, ...) from the centres, and their gradient there; None where it is not asked for."""

    def __call__(self, delta: torch.Tensor, with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]: ...


def ball_length(shape: torch.Size, radius: float, norm: str) -> float:
    """Return the L2 norm of one sample's perturbation of that radius; `shape` is the batch's."""
    return radius * math.sqrt(math.prod(shape[1:])) if norm == "rms" else radius


def worst_delta(
    evaluate: Evaluate,
    scores: torch.Tensor,
    gradient: torch.Tensor,
    radius: float,
    norm: str,
    steps: int,
    starts: Iterable[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look for the perturbation within each sample's ball at which its reward is lowest.

    It is never worse than the one step of eq. 15, nor than the centre: both are among what it has seen.

    Args:
        evaluate: the rewards around the centres.
        scores, gradient: at the centres, (B,) and (B, ...).
        radius: of the ball, "l2" over the sample or "rms" per element, as `norm` says.
        steps: evaluations of a descent, the step of eq. 15 included; the last one needs no gradient.
        starts: further points (B, ...) of the ball, each with a descent of its own from there.

    Returns:
        the perturbations (B, ...) and the rewards there (B,). A sample whose gradient is zero or not finite stays at
        its centre, or finds something from a start.
    """
    length = ball_length(gradient.shape, radius, norm)
    centre = torch.zeros_like(gradient)
    found = _descend(evaluate, centre, scores, gradient, length, steps)
    for start in starts:
        values, slope = evaluate(start, with_gradient=steps > 0)
        delta, lowest = _descend(evaluate, start, values, slope, length, steps)
        better = lowest < found[1]
        found = torch.where(_wide(better, delta), delta, found[0]), torch.where(better, lowest, found[1])
    return found


def _descend(
    evaluate: Evaluate,
    delta: torch.Tensor,
    lowest: torch.Tensor,
    gradient: torch.Tensor | None,
    length: float,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    step = torch.full_like(lowest, length)
    for left in range(steps - 1, -1, -1):
        assert gradient is not None  # asked for in every evaluation but the last
        tried = project(delta + _wide(step, delta) * image_delta(gradient, 1.0), length)
        scores, slope = evaluate(tried, with_gradient=left > 0)
        better = scores < lowest
        delta, lowest = torch.where(_wide(better, delta), tried, delta), torch.where(better, scores, lowest)
        step = torch.where(better, step, step / 2)
        if slope is not None:
            gradient = torch.where(_wide(better, delta), slope, gradient)
    return delta, lowest


def project(delta: torch.Tensor, length: float) -> torch.Tensor:
    """Return the nearest perturbations (B, ...) of at most that L2 norm a sample."""
    norms = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return torch.where(_wide(norms > length, delta), delta * _wide(length / norms, delta), delta)


def _wide(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A value a sample (B,) beside (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
