"""A penalty that holds the trained model near the untrained one: the KL baseline of reward fine-tuning.

A sampler's step is x' = a x + b f(x) + c noise, so two models' steps from one x differ by b (f - f_base), and the
divergence of two Gaussian steps of one variance is that difference squared over twice the variance (DPOK, arXiv
2305.16381). The factors of the steps are left out: of the calls that carry gradient all count alike, and samplers
without noise have a penalty, too.
"""

from __future__ import annotations

import torch

from rsaft_fast.algorithms.copies import replaced
from rsaft_fast.distributed.lockstep import know_copy
from rsaft_fast.distributed.shards import local
from rsaft_fast.phases import ANCHORING, phase
from rsaft_fast.sampling import LinearStep, Trajectory
from rsaft_fast.sampling.adjoint import call_backward
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.sampling.rollout import guided_prediction


class DistanceToBase:
    """weight * mean (f - f_base)^2 over samples, elements and graded calls, the calls' latents held constant.

    The base is the model as it stands when this is made: before any training, and before a checkpoint is loaded.

    Attributes:
        base: what is trained, by name, as it was; of sharded weights this rank's parts.
    """

    def __init__(self, backbone: Backbone, weight: float):
        self.backbone, self.weight = backbone, weight
        parameters = backbone.trainable_parameters
        self.base = {name: local(p).detach().clone() for name, p in parameters.items()}
        know_copy(parameters, self.base)

    @phase(ANCHORING)
    def backward(self, trajectory: Trajectory, total: int) -> torch.Tensor:
        """Accumulate the penalty's gradient at the present weights into `.grad`.

        Args:
            trajectory: of these samples.
            total: samples that the mean is over, those of other micro-batches included.

        Returns:
            these samples' share of the mean squared difference, without the weight, a scalar in float64.
        """
        calls = _graded_calls(trajectory)
        conditioning, uncond = trajectory.conditioning, trajectory.plan.uncond
        with torch.no_grad(), replaced(self.backbone.trainable_parameters, self.base):
            bases = [guided_prediction(self.backbone, x, step, conditioning, uncond) for x, step in calls]
        squares = []
        for (x, step), base in zip(calls, bases):
            count = base[0].numel() * total * len(calls)

            def cotangent(f: torch.Tensor, base: torch.Tensor = base, count: int = count) -> torch.Tensor:
                squares.append((f - base).double().square().sum() / count)
                return (2 * self.weight / count) * (f - base)

            call_backward(self.backbone, x, step, conditioning, cotangent, uncond=uncond)
        return torch.stack(squares).sum()


def _graded_calls(trajectory: Trajectory) -> list[tuple[torch.Tensor, LinearStep]]:
    """Latent and step of each call that carries gradient, re-noised ones last."""
    plan, schedule = trajectory.plan, trajectory.schedule
    chain = [(trajectory.inputs[index], schedule[index]) for index in plan.graded]
    return chain + [(x, schedule[index]) for (index, _), x in zip(plan.renoise, trajectory.renoised)]
