"""Smoothed reward: the image-space perturbation.

RSA-FT (arXiv 2603.21175) maximises E r(x_0(x_T, c; theta + eps) + delta, c) (eq. 19) with
delta = -rho grad_x r / ||grad_x r|| (eq. 15) and eps = -rho_w grad_theta r / ||grad_theta r|| (eq. 17), both treated
as constants. This module owns delta; the optimizer owns eps; `algorithms.update` puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rsaft_fast import ops
from rsaft_fast.errors import NonFiniteRewardError, UserError
from rsaft_fast.phases import DECODER, SCORING, phase
from rsaft_fast.rewards.base import Reward
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.settings import ImageSmoothing, Space


@dataclass(frozen=True)
class Observation:
    """Reward and its derivatives at one batch of endpoints.

    Attributes:
        latents: where the decoder was evaluated (a latent perturbation included), (B, *latent_shape).
        images: decoded, before any pixel perturbation, (B, 3, H, W).
        rewards: (B,).
        image_gradient: d r_i / d image_i, (B, 3, H, W).
        input_gradient: d r_i / d reward input_i; None unless asked for.
        parts: (B,) of each reward that a combination is made of, by name.
    """

    latents: torch.Tensor
    images: torch.Tensor
    rewards: torch.Tensor
    image_gradient: torch.Tensor
    input_gradient: torch.Tensor | None
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


@phase(SCORING)
def observe(
    backbone: Backbone,
    reward: Reward,
    latents: torch.Tensor,
    prompts: Sequence[str],
    delta: torch.Tensor | None = None,
    space: Space = "pixel01",
) -> Observation:
    """Decode, score, and differentiate the score as far as the pixels; `delta` perturbs in `space`.

    Only the reward's graph is alive: decoding happens without one and is re-run by `latent_gradient`. The reward
    scores each picture by itself, so the gradient of the sum holds every sample's own.

    Raises:
        UserError: the reward is not differentiable.
        NonFiniteRewardError: a score is NaN or infinite.
    """
    if not reward.differentiable:
        raise UserError(f"the reward {reward.spec.name!r} has no gradient; reward-gradient methods need one that has")
    if delta is not None and space == "latent":
        latents = latents + delta
    with torch.no_grad():
        images = backbone.decode(latents)
    leaf = images + delta if delta is not None and space in ("pixel01", "pixel11") else images.clone()
    leaf.requires_grad_(True)
    parts: dict[str, torch.Tensor] = {}
    with torch.enable_grad():
        if space == "reward_input":
            inputs = reward.preprocess(leaf)
            rewards = reward.score_inputs(inputs if delta is None else inputs + delta, prompts)
            image_gradient, input_gradient = torch.autograd.grad(rewards.sum(), [leaf, inputs])
        else:
            (rewards, parts), input_gradient = reward.score_parts(leaf, prompts), None
            (image_gradient,) = torch.autograd.grad(rewards.sum(), leaf)
    rewards = rewards.detach()
    require_finite(rewards, prompts)
    return Observation(latents, images, rewards, image_gradient, input_gradient, parts)


@phase(SCORING)
@torch.no_grad()
def perturbed_rewards(
    backbone: Backbone,
    reward: Reward,
    observation: Observation,
    prompts: Sequence[str],
    delta: torch.Tensor,
    space: Space,
) -> torch.Tensor:
    """Compute r at an observed endpoint plus `delta`, (B,), without gradient.

    Raises:
        NonFiniteRewardError: a score is NaN or infinite.
    """
    if space == "latent":
        rewards = reward.score(backbone.decode(observation.latents + delta), prompts)
    elif space == "reward_input":
        rewards = reward.score_inputs(reward.preprocess(observation.images) + delta, prompts)
    else:
        rewards = reward.score(observation.images + delta, prompts)
    require_finite(rewards, prompts)
    return rewards


def require_finite(rewards: torch.Tensor, prompts: Sequence[str]) -> None:
    """Raise `NonFiniteRewardError` naming the first prompt whose score is not a number."""
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteRewardError(
            f"the reward of {len(bad)} of {len(rewards)} pictures is not finite (first: {rewards[bad[0]].item()} for "
            f"{prompts[bad[0]]!r}); check the reward's weights and precision, or lower the learning rate"
        )


@phase(DECODER)
def latent_gradient(backbone: Backbone, observation: Observation, image_cotangent: torch.Tensor) -> torch.Tensor:
    """Compute (d image / d latent)^T image_cotangent: the decoder re-run with a graph of its own."""
    leaf = observation.latents.detach().requires_grad_(True)
    with torch.enable_grad():
        images = backbone.decode(leaf)
    (gradient,) = torch.autograd.grad(images, leaf, image_cotangent.to(images.dtype))
    return gradient


def space_gradient(backbone: Backbone, observation: Observation, space: Space) -> torch.Tensor:
    """Return the gradient of each reward in a perturbation's space; pixels are those of [0, 1] in both pixel spaces."""
    if space == "latent":
        return latent_gradient(backbone, observation, observation.image_gradient)
    if space == "reward_input":
        gradient: Any = observation.input_gradient  # asked for, in this space
        return gradient
    return observation.image_gradient


def image_perturbation(backbone: Backbone, observation: Observation, smoothing: ImageSmoothing) -> torch.Tensor:
    """Compute delta of eq. 15 in the smoothing's own space, ready to be added there; exactly the radius asked for.

    Pixel perturbations are in units of [0, 1] pictures: a radius in [-1, 1] is half as long there.
    """
    radius = smoothing.number / 2 if smoothing.space == "pixel11" else smoothing.number
    return ops.image_delta(space_gradient(backbone, observation, smoothing.space), radius, smoothing.norm)
