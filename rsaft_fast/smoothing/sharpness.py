"""Sharpness S1 of a reward at given pictures (RSA-FT, arXiv 2603.21175, eq. 10): by one step, and by a search."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.ops import image_delta
from rsaft_fast.rewards.base import Reward, check_prompts
from rsaft_fast.sampling import NoiseSource
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.objective import require_finite
from rsaft_fast.smoothing.worst import worst_delta

Space = Literal["pixel01", "pixel11", "latent", "reward_input"]
Score = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class Sharpness:
    """S1 of some pictures, each (B,) in the reward's score dtype.

    Attributes:
        scores: the reward at the pictures, r(x).
        one_step: r(x) less the reward one step of the radius against the gradient away: eq. 10 as RSA-FT takes it.
        search: r(x) less the lowest reward that was found within the ball; at least `one_step`, and at least 0.
    """

    scores: torch.Tensor
    one_step: torch.Tensor
    search: torch.Tensor


def sharpness(
    reward: Reward,
    images: torch.Tensor,
    prompts: Sequence[str],
    radius: float = 1e-2,
    norm: Literal["l2", "rms"] = "l2",
    space: Space = "pixel01",
    batch_size: int = 8,
    backbone: Backbone | None = None,
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
        space: pixels in [0, 1], pixels in [-1, 1], the reward network's own input, or a backbone's latents of the
            pictures.
        batch_size: pictures that are differentiated together.
        backbone: of space latent: the reward is then that of the decoded latents of the encoded pictures.

    Returns:
        (B,), in the reward's score dtype; NaN where the reward's gradient is not finite.

    Raises:
        UserError: a reward without gradient, a radius that is not positive, an unknown norm or space.
        NonFiniteRewardError: a score is NaN or infinite.
    """
    values = [
        one.drop(radius, norm) for one in _batches(reward, images, prompts, radius, norm, space, batch_size, backbone)
    ]
    return torch.cat(values) if values else images.new_zeros(0, dtype=torch.promote_types(images.dtype, torch.float32))


def searched_sharpness(
    reward: Reward,
    images: torch.Tensor,
    prompts: Sequence[str],
    radius: float = 1e-2,
    norm: Literal["l2", "rms"] = "l2",
    space: Space = "pixel01",
    *,
    steps: int = 20,
    restarts: int = 0,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 8,
    backbone: Backbone | None = None,
) -> Sharpness:
    """Compute S1 by one step and by a search for the lowest reward in the ball, for each picture.

    The search is projected gradient descent, see `smoothing.worst`: the gap between the two is how far the reward is
    from linear within the ball. It finds a local minimum: a larger S1 may be missed, never a smaller one reported.

    Args:
        reward, images, prompts, radius, norm, space, batch_size, backbone: see `sharpness`.
        steps: evaluations of the reward of one descent, at least 1.
        restarts: further descents, each from a random point at the radius.
        seed, first: random points follow from the seed, the restart and the picture's number, the first of which is
            `first`.

    Returns:
        NaN in both where the reward's gradient is not finite.

    Raises:
        UserError, NonFiniteRewardError: see `sharpness`; fewer than 1 step, or than 0 restarts.
    """
    if steps < 1 or restarts < 0:
        raise UserError(f"the search has {steps} steps and {restarts} restarts; give at least 1 and 0")
    found = [
        one.search(radius, norm, steps, restarts, seed, first)
        for one in _batches(reward, images, prompts, radius, norm, space, batch_size, backbone)
    ]
    if not found:
        nothing = images.new_zeros(0, dtype=torch.promote_types(images.dtype, torch.float32))
        return Sharpness(nothing, nothing, nothing)
    parts = [(one.scores, one.one_step, one.search) for one in found]
    return Sharpness(*(torch.cat(values) for values in zip(*parts)))


@dataclass(frozen=True)
class _Batch:
    """Pictures as points of the ball's space, and their reward and gradient there."""

    place: int
    score: Score
    points: torch.Tensor
    prompts: Sequence[str]
    half: bool

    def at(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = points.clone().requires_grad_(True)
        with torch.enable_grad():
            scores = self.score(leaf, self.prompts)
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        require_finite(scores.detach(), self.prompts)
        return scores.detach(), gradient

    def _length(self, radius: float) -> float:
        # Pixels in [-1, 1] are twice as far apart as in [0, 1].
        return radius / 2 if self.half else radius

    def drop(self, radius: float, norm: str) -> torch.Tensor:
        scores, gradient = self.at(self.points)
        return self._drop(scores, gradient, radius, norm)

    def _drop(self, scores: torch.Tensor, gradient: torch.Tensor, radius: float, norm: str) -> torch.Tensor:
        with torch.no_grad():
            lowered = self.score(self.points + image_delta(gradient, self._length(radius), norm), self.prompts)
        drop = torch.where(_finite(gradient), scores - lowered, float("nan"))
        if self.place == 0:
            _check_resolution(self, radius, norm, drop)
        return drop

    def search(self, radius: float, norm: str, steps: int, restarts: int, seed: int, first: int) -> Sharpness:
        scores, gradient = self.at(self.points)

        def evaluate(delta: torch.Tensor, with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
            if with_gradient:
                return self.at(self.points + delta)
            with torch.no_grad():
                values = self.score(self.points + delta, self.prompts)
            require_finite(values, self.prompts)
            return values, None

        one_step = self._drop(scores, gradient, radius, norm)
        start = first + self.place
        numbers = tuple(range(start, start + len(self.prompts)))
        starts = (
            image_delta(self._noise(seed, restart, numbers), self._length(radius), norm) for restart in range(restarts)
        )
        _, lowest = worst_delta(evaluate, scores, gradient, self._length(radius), norm, steps, starts)
        # The search has seen the one step, but for the rounding of how it gets there; NaN stays NaN.
        return Sharpness(scores, one_step, torch.maximum(scores - lowest, one_step))

    def _noise(self, seed: int, restart: int, numbers: tuple[int, ...]) -> torch.Tensor:
        points = self.points
        source = NoiseSource(seed, restart, numbers)
        return source.draw("restart", points.shape[1:], dtype=points.dtype, device=points.device)


def _batches(
    reward: Reward,
    images: torch.Tensor,
    prompts: Sequence[str],
    radius: float,
    norm: str,
    space: str,
    batch_size: int,
    backbone: Backbone | None,
) -> Iterator[_Batch]:
    if not reward.differentiable:
        raise UserError(f"the reward {reward.spec.name!r} has no gradient; S1 needs one that has")
    if not (0 < radius < float("inf")):
        raise UserError(f"the sharpness radius is {radius}; it must be positive and finite")
    if norm not in ("l2", "rms"):
        raise UserError(f"the sharpness norm is {norm!r}; choose l2 or rms")
    if space not in ("pixel01", "pixel11", "reward_input") and not (space == "latent" and backbone is not None):
        raise UserError(
            f"the sharpness space is {space!r}; choose pixel01, pixel11 or reward_input, or latent with a backbone"
        )
    if batch_size < 1:
        raise UserError(f"the sharpness batch_size is {batch_size}; it must be at least 1")
    check_prompts(prompts, len(images))
    score: Score = reward.score
    if space == "reward_input":
        score = reward.score_inputs
    elif space == "latent" and backbone is not None:
        score = _through(backbone, reward)
    for place in range(0, len(images), batch_size):
        points, texts = images[place : place + batch_size].detach(), prompts[place : place + batch_size]
        with torch.no_grad():
            if space == "reward_input":
                points = reward.preprocess(points)
            elif space == "latent" and backbone is not None:
                points = backbone.encode_images(points)
        yield _Batch(place, score, points, texts, half=space == "pixel11")


def _through(backbone: Backbone, reward: Reward) -> Score:
    """The reward of latents."""
    return lambda latents, prompts: reward.score(backbone.decode(latents), prompts)


def _finite(gradient: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(gradient).flatten(1).all(1)


@torch.no_grad()
def _check_resolution(batch: _Batch, radius: float, norm: str, drop: torch.Tensor) -> None:
    """Warn unless S1 is twice the change along a random direction of the same length.

    In many dimensions a random direction is nearly orthogonal to the gradient, so what it changes is rounding.
    """
    score, points, prompts = batch.score, batch.points, batch.prompts
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(0)).to(points)
    moved = points + image_delta(noise, batch._length(radius), norm)
    change = (score(points, prompts) - score(moved, prompts)).abs().mean()
    if drop.nanmean().abs() <= 2 * change:
        warnings.warn(
            f"S1 is {drop.nanmean().item():.3g} at radius {radius:g} ({norm}), where a random step of that length "
            f"changes the reward by {change.item():.3g}: rounding, or a reward that is noise at this radius; "
            "use a float32 reward or a larger radius",
            stacklevel=3,
        )
