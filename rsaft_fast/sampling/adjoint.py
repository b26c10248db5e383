"""The backward walk: the adjoint of a linear sampler by hand, with one network call's graph alive at a time.

With x' = a x + b f(x), the adjoint g = dJ/dx' becomes a g + b (df/dx)^T g on calls whose input carries gradient, and
a g on all others; parameters receive b (df/dtheta)^T g on graded calls. Every call is re-run from its stored input, so
peak activation memory is that of one branch of one call (of both, where the backbone batches them), whatever the number
of graded calls.

Over a leap x_stop = r x_start + sum_i w_i f_i all its calls see the adjoint g of x_stop, parameters receive
w_i (df_i/dtheta)^T g, and the adjoint of x_start is r g + w_start (df_start/dx)^T g.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rsaft_fast.phases import DENOISER, phase
from rsaft_fast.sampling.guidance import branch_cotangents, guide
from rsaft_fast.sampling.leaps import gradient_weights, line, step_gain
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.plan import Finish, GradientPlan, Uncond
from rsaft_fast.sampling.rollout import Trajectory, guided_prediction

if TYPE_CHECKING:
    from rsaft_fast.sampling.protocol import Backbone, Branch, Conditioning

Cotangent = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
"""dJ/df of a guided prediction f, or a function that takes f (detached) and returns it; both (B, *latent_shape)."""


@phase(DENOISER)
def backpropagate(backbone: Backbone, trajectory: Trajectory, adjoints: Sequence[torch.Tensor | None]) -> None:
    """Accumulate into `.grad` the gradient of sum_j <adjoints[j], endpoints[j]> with respect to the parameters.

    Along the plan's own path, samples weighted as the trajectory says.

    Args:
        adjoints: for each endpoint the gradient of the objective, same shape; None for an endpoint left out.
    """
    plan, schedule, conditioning = trajectory.plan, trajectory.schedule, trajectory.conditioning
    if len(adjoints) != len(trajectory.endpoints):
        raise ValueError(f"{len(adjoints)} adjoints for {len(trajectory.endpoints)} endpoints; each endpoint takes one")
    # Re-noised endpoints start from a detached latent: one call each, and nothing flows further back.
    for (step_index, _), noised, g in zip(plan.renoise, trajectory.renoised, adjoints[1:]):
        if g is not None:
            step = schedule[step_index]
            scale = _finish_scalars(step, plan.finish)[1]
            call_backward(backbone, noised, step, conditioning, g, scale=scale, uncond=plan.uncond)
    g = adjoints[0]
    if g is None:
        return
    if plan.leaps:
        _across_leaps(backbone, trajectory, g)
        return
    gain = step_gain(schedule, plan)
    for i in range(plan.last, plan.first_graded - 1, -1):
        step = schedule[i]
        a, b = _finish_scalars(step, plan.finish if i == plan.last else "sampler")
        through = None
        if i in plan.graded:
            through = call_backward(
                backbone,
                trajectory.inputs[i],
                step,
                conditioning,
                g,
                scale=gain * b,
                uncond=plan.uncond,
                input_gradient=_goes_through(plan, i),
            )
        g = a * g if through is None else a * g + _shared(plan, through)


def _across_leaps(backbone: Backbone, trajectory: Trajectory, g: torch.Tensor) -> None:
    """Walk the plan's leaps from the last to the first, from the endpoint's adjoint."""
    plan, schedule = trajectory.plan, trajectory.schedule
    if trajectory.similarity is not None:
        g = g * trajectory.similarity.to(g.dtype).view(-1, *[1] * (g.ndim - 1))
    for leap in reversed(plan.leaps):
        own = line(schedule, leap)
        weights = gradient_weights(plan, own)
        through = None
        for call in reversed(list(weights)):
            found = call_backward(
                backbone,
                trajectory.inputs[call],
                schedule[call],
                trajectory.conditioning,
                g,
                scale=weights[call],
                uncond=plan.uncond,
                input_gradient=_goes_through(plan, call),
            )
            through = found if through is None else through
        g = own.slope * g if through is None else own.slope * g + _shared(plan, through)


def _goes_through(plan: GradientPlan, call: int) -> bool:
    """Whether gradient is wanted beyond a graded call's input: nothing before the earliest depends on parameters."""
    return call in plan.through and call > plan.first_graded and plan.input_share > 0


def _shared(plan: GradientPlan, through: torch.Tensor) -> torch.Tensor:
    return through if plan.input_share == 1 else plan.input_share * through


@phase(DENOISER)
def call_backward(
    backbone: Backbone,
    x: torch.Tensor,
    step: LinearStep,
    conditioning: Conditioning,
    cotangent: Cotangent,
    *,
    scale: float = 1.0,
    uncond: Uncond = "graded",
    input_gradient: bool = False,
) -> torch.Tensor | None:
    """Run one guided call again at x, and accumulate scale * (df/dtheta)^T cotangent into the parameters' `.grad`.

    Graded branches are walked one after the other, or together where the backbone batches them: one branch's graph is
    alive at a time. A detached branch is not walked at all, so there is nothing to batch it with. Where guidance is not
    linear in the branches, their cotangents follow from both predictions: in separate branches that costs one forward
    pass of the unconditional branch more.

    Args:
        x: the call's latent, (B, *latent_shape).
        cotangent: dJ/df, or a function of the guided prediction f that returns it: what a policy gradient needs, whose
            cotangent depends on f. With guidance in separate branches f costs a forward pass without a graph more.
        uncond: what the unconditional branch carries; "none" is a call without guidance.
        input_gradient: also return scale * (df/dx)^T cotangent, (B, *latent_shape); else None is returned.
    """
    negative = None if uncond == "none" else conditioning.negative
    if negative is not None and not backbone.linear_guidance:
        walk = _CombinedCall(backbone, step, conditioning.positive, negative, conditioning.guidance_scale, scale)
        return walk.backward(x, cotangent, graded=uncond == "graded", input_gradient=input_gradient)
    guided = negative is not None
    w = conditioning.guidance_scale if guided else 1.0
    branches = [(conditioning.positive, w)]
    if negative is not None and uncond == "graded":
        branches.append((negative, 1.0 - w))
    # What shares a network call.
    groups = [branches] if backbone.cfg_batching == "batched" else [[branch] for branch in branches]
    if callable(cotangent) and (len(groups) > 1 or (guided and len(branches) == 1)):
        with torch.no_grad():
            cotangent = cotangent(guided_prediction(backbone, x, step, conditioning, uncond))
    total: Any = None
    for group in groups:
        leaf = x.detach().requires_grad_(input_gradient)
        with torch.enable_grad():
            predictions = backbone.predict_together(leaf, step, [branch for branch, _ in group])
        if callable(cotangent):  # this one group is the whole call
            found = [prediction.detach() for prediction in predictions]
            cotangent = cotangent(found[0] if len(found) == 1 else guide(found[0], found[1], w))
        torch.autograd.backward(predictions, [(scale * weight) * cotangent for _, weight in group])
        if input_gradient:
            total = leaf.grad if total is None else total + leaf.grad  # pyrefly: ignore[unsupported-operation]
    return total


@dataclass(frozen=True)
class _CombinedCall:
    """A guided call whose branches are combined in the model's own way, which is not linear in them."""

    backbone: Backbone
    step: LinearStep
    positive: Branch
    negative: Branch
    guidance_scale: float
    scale: float

    def backward(
        self, x: torch.Tensor, cotangent: Cotangent, *, graded: bool, input_gradient: bool
    ) -> torch.Tensor | None:
        """Walk it back as `call_backward` says; `graded`: the unconditional branch too."""
        leaf = x.detach().requires_grad_(input_gradient)
        if graded and self.backbone.cfg_batching == "batched":
            with torch.enable_grad():
                both = self.backbone.predict_together(leaf, self.step, (self.positive, self.negative))
            torch.autograd.backward(both, self._cotangents(both[0], both[1], cotangent))
            return leaf.grad
        with torch.no_grad():
            other = self.backbone.predict(x, self.step, self.negative)
        with torch.enable_grad():
            prediction = self.backbone.predict(leaf, self.step, self.positive)
        to_positive, to_negative = self._cotangents(prediction, other, cotangent)
        prediction.backward(to_positive)
        if not graded:
            return leaf.grad
        total, leaf = leaf.grad, x.detach().requires_grad_(input_gradient)
        del prediction, other
        with torch.enable_grad():
            prediction = self.backbone.predict(leaf, self.step, self.negative)
        prediction.backward(to_negative)
        return None if total is None or leaf.grad is None else total + leaf.grad

    def _cotangents(
        self, positive: torch.Tensor, negative: torch.Tensor, cotangent: Cotangent
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positive, negative = positive.detach(), negative.detach()
        if callable(cotangent):
            cotangent = cotangent(self.backbone.guide(positive, negative, self.guidance_scale))
        return branch_cotangents(self.backbone.guide, positive, negative, self.guidance_scale, self.scale * cotangent)


def _finish_scalars(step: LinearStep, finish: Finish) -> tuple[float, float]:
    return (step.x0_a, step.x0_b) if finish == "x0" else (step.a, step.b)
