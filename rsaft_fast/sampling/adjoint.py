"""The backward walk: the adjoint of a linear sampler by hand, with one network call's graph alive at a time.

With x' = a x + b f(x), the adjoint g = dJ/dx' becomes a g + b (df/dx)^T g on calls whose input carries gradient, and
a g on all others; parameters receive b (df/dtheta)^T g on graded calls. Every call is re-run from its stored input, so
peak activation memory is that of one branch of one call (of both, where the backbone batches them), whatever the number
of graded calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.plan import Uncond
from rsaft_fast.sampling.rollout import Trajectory

if TYPE_CHECKING:
    from rsaft_fast.sampling.protocol import Backbone, Branch, Conditioning


def backpropagate(backbone: Backbone, trajectory: Trajectory, adjoints: Sequence[torch.Tensor | None]) -> None:
    """Accumulate into `.grad` the gradient of sum_j <adjoints[j], endpoints[j]> with respect to the parameters.

    Args:
        adjoints: for each endpoint the gradient of the objective, same shape; None for an endpoint left out.
    """
    plan, schedule = trajectory.plan, trajectory.schedule
    if len(adjoints) != len(trajectory.endpoints):
        raise ValueError(f"{len(adjoints)} adjoints for {len(trajectory.endpoints)} endpoints; each endpoint takes one")
    call = _CallBackward(backbone, trajectory.conditioning, plan.uncond)
    # Re-noised endpoints start from a detached latent: one call each, and nothing flows further back.
    for (step_index, _), noised, g in zip(plan.renoise, trajectory.renoised, adjoints[1:]):
        if g is not None:
            step = schedule[step_index]
            call(noised, step, g, _finish_scalars(step, plan.finish)[1], input_gradient=False)
    g = adjoints[0]
    if g is None:
        return
    for i in range(plan.last, plan.first_graded - 1, -1):
        step = schedule[i]
        a, b = _finish_scalars(step, plan.finish if i == plan.last else "sampler")
        # Nothing before the earliest graded call depends on the parameters.
        input_gradient = i in plan.through and i > plan.first_graded
        through = call(trajectory.inputs[i], step, g, b, input_gradient) if i in plan.graded else None
        g = a * g if through is None else a * g + through


def _finish_scalars(step: LinearStep, how: str) -> tuple[float, float]:
    return (step.x0_a, step.x0_b) if how == "x0" else (step.a, step.b)


class _CallBackward:
    """The vector-Jacobian product of one guided call.

    Graded branches are walked one after the other, or together where the backbone batches them. A detached one is not
    walked at all, so there is nothing to batch it with.
    """

    def __init__(self, backbone: Backbone, conditioning: Conditioning, uncond: Uncond):
        self.backbone = backbone
        guided = conditioning.negative is not None and uncond != "none"
        w = conditioning.guidance_scale if guided else 1.0
        branches: list[tuple[Branch, float]] = [(conditioning.positive, w)]
        if guided and uncond == "graded":
            branches.append((conditioning.negative, 1.0 - w))
        # What shares a network call.
        self.groups = [branches] if backbone.cfg_batching == "batched" else [[branch] for branch in branches]

    def __call__(
        self, x: torch.Tensor, step: LinearStep, g: torch.Tensor, b: float, input_gradient: bool
    ) -> torch.Tensor | None:
        """Accumulate b (df/dtheta)^T g into the parameters; return b (df/dx)^T g when asked for."""
        total = None
        for group in self.groups:
            leaf = x.detach().requires_grad_(input_gradient)
            with torch.enable_grad():
                predictions = self.backbone.predict_together(leaf, step, [branch for branch, _ in group])
            torch.autograd.backward(predictions, [(b * weight) * g for _, weight in group])
            if input_gradient:
                total = leaf.grad if total is None else total + leaf.grad
        return total
