"""Scores of what an iteration has sampled, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rsaft_fast.algorithms.reward_gradient import PART
from rsaft_fast.phases import SCORING, phase
from rsaft_fast.rewards.base import Reward
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.objective import (
    ImageSmoothing,
    image_perturbation,
    observe,
    perturbed_rewards,
    require_finite,
)


@dataclass
class Scores:
    """Scores of samples, float64 on the host.

    Attributes:
        rewards: (N,).
        others: (N,) each, by the names of the log: the parts of a combination, and s1.
    """

    rewards: torch.Tensor
    others: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def cat(scores: Sequence[Scores]) -> Scores:
        """Join the scores of several batches."""
        names = scores[0].others
        others = {name: torch.cat([s.others[name] for s in scores]) for name in names}
        return Scores(torch.cat([s.rewards for s in scores]), others)


@phase(SCORING)
@torch.no_grad()
def score(
    backbone: Backbone,
    reward: Reward,
    latents: torch.Tensor,
    prompts: Sequence[str],
    probe: ImageSmoothing | None = None,
) -> Scores:
    """Decode and score clean latents.

    Args:
        latents: (B, *latent_shape).
        probe: the ball at which the sharpness S1 is measured, in a pixel space, of a reward that has a gradient.

    Raises:
        NonFiniteRewardError: a score is NaN or infinite.
    """
    if probe is None:
        rewards, parts = reward.score_parts(backbone.decode(latents), prompts)
        rewards = on_host(rewards.detach()).double()
        require_finite(rewards, prompts)
        others = {}
    else:
        seen = observe(backbone, reward, latents, prompts, space=probe.space)
        delta = image_perturbation(backbone, seen, probe)
        lowest = perturbed_rewards(backbone, reward, seen, prompts, delta, probe.space)
        rewards, parts = on_host(seen.rewards).double(), seen.parts
        others = {"s1": rewards - on_host(lowest).double()}
    return Scores(rewards, others | {PART + name: on_host(values.detach()).double() for name, values in parts.items()})


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the host; of shapes alone, numbers that differ, for whoever compares them."""
    if tensor.is_meta:
        return torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return tensor.cpu()
