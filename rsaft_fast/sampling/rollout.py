"""The forward walk: sample without gradient and keep only the latents that are needed later."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rsaft_fast.phases import SAMPLING, phase
from rsaft_fast.sampling.leaps import Residuals
from rsaft_fast.sampling.linear import LinearStep, Schedule
from rsaft_fast.sampling.noise import NoiseSource
from rsaft_fast.sampling.plan import Finish, GradientPlan, Uncond

if TYPE_CHECKING:
    from rsaft_fast.sampling.protocol import Backbone, Conditioning


@dataclass(frozen=True)
class Trajectory:
    """What a rollout under a plan leaves behind.

    Attributes:
        endpoints: the final latents: the chain's own, then one for each re-noised call.
        inputs: latent before each graded call of the chain, and before `plan.first_graded`.
        renoised: latent before each re-noised call.
        similarity: weight of each sample's gradient, (B,) in float64, where the plan weighs them by their leaps'
            errors.
    """

    schedule: Schedule
    plan: GradientPlan
    conditioning: Conditioning
    endpoints: tuple[torch.Tensor, ...]
    inputs: dict[int, torch.Tensor]
    renoised: tuple[torch.Tensor, ...]
    similarity: torch.Tensor | None = None


@phase(SAMPLING)
@torch.no_grad()
def sample_chain(
    backbone: Backbone,
    schedule: Schedule,
    latents: torch.Tensor,
    conditioning: Conditioning,
    noise: NoiseSource,
    *,
    first: int = 0,
    last: int | None = None,
    finish: Finish = "sampler",
    uncond: Uncond = "graded",
    keep: Collection[int] = (),
    seen: Callable[[torch.Tensor], object] | None = None,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Run the sampler's calls `first` to `last`, without a graph.

    Args:
        latents: the latent before call `first` (x_T before call 0), (B, *latent_shape), in the backbone's latent dtype.
        noise: source of the ancestral draws; the same source replays the same draws.
        last: index of the last call; None runs to the end of the schedule.
        finish: what follows the last call: the sampler's own step, or the predicted clean latent.
        uncond: "none" samples without guidance.
        keep: calls whose input latent is wanted.
        seen: is shown the guided prediction of each call.

    Returns:
        the latent after the last call, and the latents before the calls in `keep`, by call.
    """
    last = len(schedule) - 1 if last is None else last
    kept: dict[int, torch.Tensor] = {}
    x = latents
    for i in range(first, last + 1):
        if i in keep:
            kept[i] = x
        f = guided_prediction(backbone, x, schedule[i], conditioning, uncond)
        if seen is not None:
            seen(f)
        x = advance(schedule[i], finish if i == last else "sampler", x, f, noise, i)
    return x, kept


@phase(SAMPLING)
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
    """Run the sampler under `plan`, without a graph, and keep what the backward walk needs.

    Args:
        latents: x_T, shape (B, *latent_shape), in the backbone's latent dtype.
        noise: source of the ancestral and re-noising draws; the same source replays the same draws.
        prefix: an earlier rollout of the same plan; the calls before the first graded one are taken from it
            (`resample: graded_only`).
    """
    if len(schedule) != plan.num_steps:
        raise ValueError(f"the plan was drawn for {plan.num_steps} steps, the schedule has {len(schedule)}")
    first, x = 0, latents
    if prefix is not None and plan.first_graded in prefix.inputs:
        first, x = plan.first_graded, prefix.inputs[plan.first_graded]
    # No leap begins before the first graded call.
    residuals = Residuals(schedule, plan, first) if plan.similarity_floor is not None else None
    x, inputs = sample_chain(
        backbone,
        schedule,
        x,
        conditioning,
        noise,
        first=first,
        last=plan.last,
        finish=plan.finish,
        uncond=plan.uncond,
        keep={*plan.graded, plan.first_graded},
        seen=None if residuals is None else residuals.see,
    )
    similarity = None if residuals is None else residuals.similarity(inputs, x)
    endpoints, renoised = [x], []
    for step_index, key in plan.renoise:
        step = schedule[step_index]
        eps = noise.draw("renoise", x.shape[1:], key, x.dtype, x.device)
        noised = step.alpha * x + step.sigma * eps
        f = guided_prediction(backbone, noised, step, conditioning, plan.uncond)
        # The ancestral draw of a re-noised call is its own: its key lies beyond those of the chain.
        endpoints.append(advance(step, plan.finish, noised, f, noise, plan.num_steps + key))
        renoised.append(noised)
    return Trajectory(schedule, plan, conditioning, tuple(endpoints), inputs, tuple(renoised), similarity)


def guided_prediction(
    backbone: Backbone, x: torch.Tensor, step: LinearStep, conditioning: Conditioning, uncond: Uncond = "graded"
) -> torch.Tensor:
    """Predict with classifier-free guidance, as `Backbone.guide` combines the branches; without a negative one, f_c."""
    if conditioning.negative is None or uncond == "none":
        return backbone.predict(x, step, conditioning.positive)
    if backbone.cfg_batching == "separate":
        positive = backbone.predict(x, step, conditioning.positive)
        negative = backbone.predict(x, step, conditioning.negative)
    else:
        positive, negative = backbone.predict_together(x, step, (conditioning.positive, conditioning.negative))
    return backbone.guide(positive, negative, conditioning.guidance_scale)


def advance(
    step: LinearStep, finish: Finish, x: torch.Tensor, f: torch.Tensor, noise: NoiseSource, key: int
) -> torch.Tensor:
    """Take the update that follows a call: the sampler's own step, or the predicted clean latent.

    Args:
        f: the prediction at x.
        key: of the ancestral draw, where the step has one.
    """
    if finish == "x0":
        return step.x0_a * x + step.x0_b * f
    stepped = step.a * x + step.b * f
    if not step.c:
        return stepped
    return stepped + step.c * noise.draw("ancestral", x.shape[1:], key, x.dtype, x.device)
