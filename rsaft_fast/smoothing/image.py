"""Image smoothing as a recipe asks for it: eq. 15 of RSA-FT (arXiv 2603.21175), and its variants.

What perturbs a micro-batch's pictures is an `Around`: one perturbation a picture, or several, over which the reward is
averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from rsaft_fast import ops
from rsaft_fast.errors import UserError
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.combine import Combination
from rsaft_fast.rewards.ensemble import uncertainty, win_rates
from rsaft_fast.sampling import NoiseSource
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.objective import Observation, image_perturbation, observe, perturbed_rewards, space_gradient
from rsaft_fast.smoothing.settings import ImageSmoothing, Space
from rsaft_fast.smoothing.worst import worst_delta

NARROWEST, WIDEST = 0.5, 2.0
"""Bounds of a picture's own factor on the radius."""


class Around(Protocol):
    """Perturbations (B, ...) of one batch of pictures, each of which counts alike."""

    def __iter__(self) -> Iterator[torch.Tensor]: ...


@dataclass(frozen=True)
class RandomDirections:
    """Perturbations of one length in random directions, drawn again wherever they are gone through.

    Attributes:
        image: radius, norm, space, samples and lowpass.
        noise: of the micro-batch's samples; a sample's directions depend on the seed, the step and its own index.
        endpoint: of the plan, each of which has directions of its own.
        shape, dtype, device: of one picture in the space.
    """

    image: ImageSmoothing
    noise: NoiseSource
    endpoint: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(self.image.samples):
            key = self.endpoint * self.image.samples + number
            drawn = self.noise.draw("smoothing", self.shape, key, dtype=self.dtype, device=self.device)
            yield ops.image_delta(_filtered(drawn, self.image), _radius(self.image), self.image.norm)


def radius_factor(image: ImageSmoothing, progress: float) -> float:
    """Return what the radius is multiplied by when `progress` (0 to 1) of the training is done."""
    if image.schedule == "linear":
        return 1 - progress
    if image.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


def perturb_around(
    backbone: Backbone,
    reward: Reward,
    seen: Observation,
    prompts: Sequence[str],
    image: ImageSmoothing,
    noise: NoiseSource,
    endpoint: int = 0,
    progress: float = 0.0,
    usual_s1: float | None = None,
) -> tuple[Around, torch.Tensor | None]:
    """Perturb observed pictures as the settings say.

    Args:
        seen: the pictures at rest.
        noise, endpoint: see `RandomDirections`.
        progress: of the training, 0 to 1.
        usual_s1: the running mean of S1; None takes this batch's.

    Returns:
        the perturbations, and S1 of each picture (B,) at the common radius where a picture's own follows from it.

    Raises:
        UserError: `only_where` and a reward of one part, `per_sample` uncertainty and no part of weight 0, or `lowpass`
            in latents that are no pictures.
        NonFiniteRewardError: a score is NaN or infinite.
    """
    factor = radius_factor(image, progress)
    if factor != 1:
        image = image.model_copy(update={"radius": image.number * factor})
    if image.kind == "gaussian":
        like = seen.images
        if image.space == "reward_input":
            with torch.no_grad():
                like = reward.preprocess(seen.images)
        around: Around = RandomDirections(image, noise, endpoint, like.shape[1:], like.dtype, like.device)
        if image.only_where is None:
            return around, None
        mask = _wide(disagreement(seen.parts) >= image.only_where, like)
        return _Masked(around, mask), None
    delta = _worst(backbone, reward, seen, prompts, image)
    s1 = None
    if image.per_sample == "s1":
        s1 = seen.rewards - perturbed_rewards(backbone, reward, seen, prompts, delta, image.space)
        delta = delta * _wide(own_factor(s1, usual_s1), delta)
    elif image.per_sample == "uncertainty":
        delta = delta * _wide(1 + uncertainty(seen.rewards, _auxiliary_scores(reward, seen)), delta)
    if image.only_where is not None:
        delta = delta * _wide(disagreement(seen.parts) >= image.only_where, delta)
    return (delta,), s1


@dataclass(frozen=True)
class _Masked:
    around: Around
    mask: torch.Tensor

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (delta * self.mask for delta in self.around)


def own_factor(s1: torch.Tensor, usual: float | None) -> torch.Tensor:
    """Return each picture's factor on the radius, (B,): its S1 over the usual one, from `NARROWEST` to `WIDEST`."""
    usual_s1 = s1.mean() if usual is None else s1.new_tensor(usual)
    return torch.where(usual_s1 > 0, (s1 / usual_s1).clamp(NARROWEST, WIDEST), torch.ones_like(s1))


def _auxiliary_scores(reward: Reward, seen: Observation) -> torch.Tensor:
    """Scores of the parts of weight 0, (K, B)."""
    parts = reward.parts if isinstance(reward, Combination) else ()
    scores = [seen.parts[part.name].double() for part in parts if part.weight == 0]
    if not scores:
        raise UserError(
            "smoothing.image.per_sample uncertainty compares the reward with parts of weight 0, and there are 0 of "
            "them: add one to a reward.name=combination, or take per_sample s1"
        )
    return torch.stack(scores)


def disagreement(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return how far the parts of a combination disagree on each picture, (B,) from 0 to 1.

    It is the largest less the smallest win rate that the picture has among the pictures of the batch.

    Args:
        parts: (B,) scores of each part.

    Raises:
        UserError: fewer than two parts.
    """
    if len(parts) < 2:
        raise UserError(
            f"smoothing.image.only_where compares the parts of a reward, and this one has {len(parts)}: take "
            "reward.name=combination with two parts or more, or leave only_where out"
        )
    rates = win_rates(torch.stack([scores.double() for scores in parts.values()]))
    return rates.amax(0) - rates.amin(0)


def observe_around(
    backbone: Backbone,
    reward: Reward,
    latents: torch.Tensor,
    prompts: Sequence[str],
    around: Around | None,
    space: Space,
) -> Observation:
    """Observe the smoothed reward: at the perturbed pictures; of several perturbations, the mean.

    The mean's `image_gradient` is that of the mean reward; its images are the unperturbed ones, as of one.
    """
    if around is None:
        return observe(backbone, reward, latents, prompts, None, space)
    total: Observation | None = None
    count = 0
    for delta in around:
        seen = observe(backbone, reward, latents, prompts, delta, space)
        total = seen if total is None else _added(total, seen)
        count += 1
    assert total is not None
    return (
        total
        if count == 1
        else replace(
            total, rewards=total.rewards / count, image_gradient=total.image_gradient / count, input_gradient=None
        )
    )


def _added(total: Observation, seen: Observation) -> Observation:
    return replace(
        total,
        rewards=total.rewards + seen.rewards,
        image_gradient=total.image_gradient + seen.image_gradient,
    )


def rewards_around(
    backbone: Backbone, reward: Reward, seen: Observation, prompts: Sequence[str], around: Around, space: Space
) -> torch.Tensor:
    """Compute the smoothed reward at observed pictures, (B,), without gradient."""
    scores = [perturbed_rewards(backbone, reward, seen, prompts, delta, space) for delta in around]
    return scores[0] if len(scores) == 1 else torch.stack(scores).mean(0)


def lowpass(gradient: torch.Tensor, deviation: float) -> torch.Tensor:
    """Filter (B, C, H, W) with a Gaussian of that standard deviation in pixels; the border mirrors what is inside.

    The filter is symmetric and keeps a constant as it is, so that it is the gradient for a norm which costs more the
    finer the detail.

    Raises:
        UserError: not (B, C, H, W): packed latents have no neighbours.
    """
    if gradient.ndim != 4:
        raise UserError(
            f"smoothing.image.lowpass filters pictures, and this space holds {tuple(gradient.shape[1:])} a sample; "
            "take space pixel01, or leave lowpass out"
        )
    rows, columns = (_gaussian(size, deviation, gradient) for size in gradient.shape[2:])
    return (rows @ gradient.to(rows.dtype) @ columns).to(gradient.dtype)


def _gaussian(size: int, deviation: float, like: torch.Tensor) -> torch.Tensor:
    """The filter along an axis, (size, size): the period of the mirrored axis is twice its size."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    place = torch.arange(size, dtype=dtype, device=like.device)
    reach = math.ceil(5 * deviation / (2 * size)) + 1
    shifts = 2 * size * torch.arange(-reach, reach + 1, dtype=dtype, device=like.device)
    here, mirrored = place[:, None] - place, place[:, None] + place + 1
    offsets = torch.stack([here, mirrored])[..., None] + shifts
    weights = torch.exp(-0.5 * (offsets / deviation).square()).sum((0, -1))
    # Each row's sum is that of a Gaussian over all whole numbers: the same for each, so that this keeps the symmetry.
    return weights / weights.sum(1, keepdim=True)


def _worst(
    backbone: Backbone, reward: Reward, seen: Observation, prompts: Sequence[str], image: ImageSmoothing
) -> torch.Tensor:
    if image.steps == 1 and image.lowpass is None:
        return image_perturbation(backbone, seen, image)
    gradient = _filtered(space_gradient(backbone, seen, image.space), image)
    if image.steps == 1:
        return ops.image_delta(gradient, _radius(image), image.norm)

    def evaluate(delta: torch.Tensor, with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not with_gradient:
            return perturbed_rewards(backbone, reward, seen, prompts, delta, image.space), None
        there = observe(backbone, reward, seen.latents, prompts, delta, image.space)
        return there.rewards, _filtered(space_gradient(backbone, there, image.space), image)

    delta, _ = worst_delta(evaluate, seen.rewards, gradient, _radius(image), image.norm, image.steps)
    return delta


def _filtered(gradient: torch.Tensor, image: ImageSmoothing) -> torch.Tensor:
    return gradient if image.lowpass is None else lowpass(gradient, image.lowpass)


def _radius(image: ImageSmoothing) -> float:
    """Pixels in [-1, 1] are twice as far apart as in [0, 1], which is what perturbations are added to."""
    return image.number / 2 if image.space == "pixel11" else image.number


def _wide(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A value a picture (B,) beside (B, ...)."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
