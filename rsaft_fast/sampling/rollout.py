"""The forward walk: sample without gradient and keep only the latents that the plan will need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rsaft_fast.sampling.linear import LinearStep, Schedule
from rsaft_fast.sampling.noise import NoiseSource
from rsaft_fast.sampling.plan import GradientPlan, Uncond

if TYPE_CHECKING:
    from rsaft_fast.sampling.protocol import Backbone, Conditioning


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves behind.

    Attributes:
        endpoints: the final latents: the chain's own, then one for each re-noised call.
        inputs: latent before each graded call of the chain, and before `plan.first_graded`.
        renoised: latent before each re-noised call.
    """

    schedule: Schedule
    plan: GradientPlan
    conditioning: Conditioning
    endpoints: tuple[torch.Tensor, ...]
    inputs: dict[int, torch.Tensor]
    renoised: tuple[torch.Tensor, ...]


@torch.no_grad()
def rollout(
    backbone: Backbone,
    schedule: Schedule,
    plan: GradientPlan,
    latents: torch.Tensor,
    conditioning: Conditioning,
    noise: NoiseSource,
    *,
    prefix: Trajectory | None = None,
) -> Trajectory:
    """Run the sampler under `plan` without building a graph.

    Args:
        latents: x_T, shape (B, *latent_shape), in the backbone's latent dtype.
        noise: source of the ancestral and re-noising draws; the same source replays the same draws.
        prefix: an earlier rollout of the same plan; the calls before the first graded one are taken from it
            (`resample: graded_only`).
    """
    if len(schedule) != plan.num_steps:
        raise ValueError(f"the plan was drawn for {plan.num_steps} steps, the schedule has {len(schedule)}")
    start, x = 0, latents
    if prefix is not None and plan.first_graded in prefix.inputs:
        start, x = plan.first_graded, prefix.inputs[plan.first_graded]
    inputs: dict[int, torch.Tensor] = {}
    for i in range(start, plan.last + 1):
        if i in plan.graded or i == plan.first_graded:
            inputs[i] = x
        f = guided_prediction(backbone, x, schedule[i], conditioning, plan.uncond)
        x = _advance(schedule, plan, i, x, f, noise)
    endpoints, renoised = [x], []
    for step_index, key in plan.renoise:
        step = schedule[step_index]
        eps = noise.draw("renoise", x.shape[1:], key, x.dtype, x.device)
        noised = step.alpha * x + step.sigma * eps
        f = guided_prediction(backbone, noised, step, conditioning, plan.uncond)
        # The ancestral draw of a re-noised call is its own: its key lies beyond those of the chain.
        endpoints.append(finish(step, plan.finish, noised, f, _ancestral(noise, step, x, plan.num_steps + key)))
        renoised.append(noised)
    return Trajectory(schedule, plan, conditioning, tuple(endpoints), inputs, tuple(renoised))


def guided_prediction(
    backbone: Backbone, x: torch.Tensor, step: LinearStep, conditioning: Conditioning, uncond: Uncond
) -> torch.Tensor:
    """Classifier-free guidance f_u + w (f_c - f_u), or f_c alone without a negative branch (Ho and Salimans 2022)."""
    if conditioning.negative is None or uncond == "none":
        return backbone.predict(x, step, conditioning.positive)
    if backbone.cfg_batching == "separate":
        positive = backbone.predict(x, step, conditioning.positive)
        negative = backbone.predict(x, step, conditioning.negative)
    else:
        positive, negative = backbone.predict_together(x, step, (conditioning.positive, conditioning.negative))
    return negative + conditioning.guidance_scale * (positive - negative)


def finish(step: LinearStep, how: str, x: torch.Tensor, f: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """The update after a call: the sampler's own step, or the predicted clean latent."""
    if how == "x0":
        return step.x0_a * x + step.x0_b * f
    stepped = step.a * x + step.b * f
    return stepped if noise is None else stepped + step.c * noise


def _advance(
    schedule: Schedule, plan: GradientPlan, i: int, x: torch.Tensor, f: torch.Tensor, noise: NoiseSource
) -> torch.Tensor:
    step = schedule[i]
    if i == plan.last and plan.finish == "x0":
        return finish(step, "x0", x, f, None)
    return finish(step, "sampler", x, f, _ancestral(noise, step, x, i))


def _ancestral(noise: NoiseSource, step: LinearStep, x: torch.Tensor, key: int) -> torch.Tensor | None:
    return noise.draw("ancestral", x.shape[1:], key, x.dtype, x.device) if step.c else None
