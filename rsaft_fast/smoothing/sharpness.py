"""Sharpness S1 of a reward at given pictures (RSA-FT, arXiv 2603.21175, eq. 10)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.ops import image_delta
from rsaft_fast.rewards.base import Reward, check_prompts
from rsaft_fast.smoothing.objective import require_finite

Space = Literal["pixel01", "pixel11", "reward_input"]
Score = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


def sharpness(
    reward: Reward,
    images: torch.Tensor,
    prompts: Sequence[str],
    radius: float = 1e-2,
    norm: Literal["l2", "rms"] = "l2",
    space: Space = "pixel01",
    batch_size: int = 8,
) -> torch.Tensor:
    """Compute S1 = r(x) - r(x - radius * g / ||g||) with g = grad_x r(x), for each picture; its mean is eq. 10.

    Warns when the first batch's S1 is not clear of what rounding alone does to the reward: then take a reward in
    float32 or a larger radius.

    Args:
        reward: differentiable.
        images: (B, 3, H, W), nominally 0 to 1.
        prompts: one a picture.
        radius: of the ball, per picture, in units of `space`.
        norm: "l2" over the whole picture, or "rms" per element.
        space: pixels in [0, 1], pixels in [-1, 1], or the reward network's own input.
        batch_size: pictures that are differentiated together.

    Returns:
        (B,), in the reward's score dtype; NaN where the reward's gradient is not finite.

    Raises:
        UserError: a reward without gradient, a radius that is not positive, an unknown norm or space.
        NonFiniteRewardError: a score is NaN or infinite.
    """
    if not reward.differentiable:
        raise UserError(f"the reward {reward.spec.name!r} has no gradient; S1 needs one that has")
    if not (0 < radius < float("inf")):
        raise UserError(f"the sharpness radius is {radius}; it must be positive and finite")
    if norm not in ("l2", "rms"):
        raise UserError(f"the sharpness norm is {norm!r}; choose l2 or rms")
    if space not in ("pixel01", "pixel11", "reward_input"):
        raise UserError(f"the sharpness space is {space!r}; choose pixel01, pixel11 or reward_input")
    if batch_size < 1:
        raise UserError(f"the sharpness batch_size is {batch_size}; it must be at least 1")
    check_prompts(prompts, len(images))
    # Pixels in [-1, 1] are twice as far apart as in [0, 1].
    radius = radius / 2 if space == "pixel11" else radius
    score = reward.score_inputs if space == "reward_input" else reward.score
    values = []
    for first in range(0, len(images), batch_size):
        points, texts = images[first : first + batch_size].detach(), prompts[first : first + batch_size]
        if space == "reward_input":
            with torch.no_grad():
                points = reward.preprocess(points)
        drop = _drop(score, points, texts, radius, norm)
        if first == 0:
            _check_resolution(score, points, texts, radius, norm, drop)
        values.append(drop)
    return torch.cat(values) if values else images.new_zeros(0, dtype=torch.promote_types(images.dtype, torch.float32))


def _drop(score: Score, points: torch.Tensor, prompts: Sequence[str], radius: float, norm: str) -> torch.Tensor:
    leaf = points.clone().requires_grad_(True)
    with torch.enable_grad():
        scores = score(leaf, prompts)
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    require_finite(scores.detach(), prompts)
    with torch.no_grad():
        lowered = score(points + image_delta(gradient, radius, norm), prompts)
    finite = torch.isfinite(gradient).flatten(1).all(1)
    return torch.where(finite, scores.detach() - lowered, float("nan"))


@torch.no_grad()
def _check_resolution(
    score: Score, points: torch.Tensor, prompts: Sequence[str], radius: float, norm: str, drop: torch.Tensor
) -> None:
    """Warn unless S1 is twice the change along a random direction of the same length.

    In many dimensions a random direction is nearly orthogonal to the gradient, so what it changes is rounding.
    """
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(0)).to(points)
    change = (score(points, prompts) - score(points + image_delta(noise, radius, norm), prompts)).abs().mean()
    if drop.nanmean().abs() <= 2 * change:
        warnings.warn(
            f"S1 is {drop.nanmean().item():.3g} at radius {radius:g} ({norm}), where a random step of that length "
            f"changes the reward by {change.item():.3g}: rounding, or a reward that is noise at this radius; "
            "use a float32 reward or a larger radius",
            stacklevel=3,
        )
