"""Scores of what an iteration has sampled, on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rsaft_fast.algorithms.gate_signals import gradient_disagreement
from rsaft_fast.algorithms.reward_gradient import PART
from rsaft_fast.phases import SCORING, phase
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.combine import Combination
from rsaft_fast.rewards.features import Features
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.objective import image_perturbation, observe, perturbed_rewards, require_finite
from rsaft_fast.smoothing.settings import ImageSmoothing


@dataclass
class Scores:
    """Scores of samples, float64 on the host.

    Attributes:
        rewards: (N,).
        others: (N,) each, by the names of the log: the parts of a combination, s1, and the disagreement of gradients.
        features: (N, D) of the pictures, where they were asked for.
    """

    rewards: torch.Tensor
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    features: torch.Tensor | None = None

    @staticmethod
    def cat(scores: Sequence[Scores]) -> Scores:
        """Join the scores of several batches."""
        names = scores[0].others
        others = {name: torch.cat([s.others[name] for s in scores]) for name in names}
        features = [s.features for s in scores if s.features is not None]
        return Scores(torch.cat([s.rewards for s in scores]), others, torch.cat(features) if features else None)


@phase(SCORING)
@torch.no_grad()
def score(
    backbone: Backbone,
    reward: Reward,
    latents: torch.Tensor,
    prompts: Sequence[str],
    probe: ImageSmoothing | None = None,
    features: Features | None = None,
    compared: Sequence[str] = (),
) -> Scores:
    """Decode and score clean latents.

    Args:
        latents: (B, *latent_shape).
        probe: the ball at which the sharpness S1 is measured, in a pixel space, of a reward that has a gradient.
        features: of the pictures, where they are wanted.
        compared: parts of a combination whose gradients are compared with the whole's, in "disagreement".

    Raises:
        NonFiniteRewardError: a score is NaN or infinite.
    """
    if probe is None:
        images = backbone.decode(latents)
        rewards, parts = reward.score_parts(images, prompts)
        rewards = on_host(rewards.detach()).double()
        require_finite(rewards, prompts)
        others: dict[str, torch.Tensor] = {}
    else:
        seen = observe(backbone, reward, latents, prompts, space=probe.space)
        delta = image_perturbation(backbone, seen, probe)
        lowest = perturbed_rewards(backbone, reward, seen, prompts, delta, probe.space)
        rewards, parts, images = on_host(seen.rewards).double(), seen.parts, seen.images
        others = {"s1": rewards - on_host(lowest).double()}
    others |= _parts(parts)
    if compared:
        others["disagreement"] = on_host(_disagreement(reward, images, prompts, compared))
    return Scores(rewards, others, None if features is None else on_host(features(images)))


@phase(SCORING)
@torch.no_grad()
def begin_scoring(
    backbone: Backbone, reward: Reward, latents: torch.Tensor, prompts: Sequence[str], features: Features | None = None
) -> Callable[[], Scores]:
    """Decode clean latents, score them as far as the device does it, and return what is left to do.

    What is left touches the host alone, so that another thread may do it while the device samples on. Both together
    give what `score` gives; a combination is put together on the host.

    Args:
        reward: `elsewhere`, or a combination with such parts.
        latents, features: see `score`.
    """
    images = backbone.decode(latents)
    rewards = [part.reward for part in reward.parts] if isinstance(reward, Combination) else [reward]
    known = [None if one.elsewhere else on_host(one.score(images, prompts)) for one in rewards]
    seen = None if features is None else on_host(features(images))
    pictures = on_host(images)

    @phase(SCORING)
    @torch.no_grad()
    def finish() -> Scores:
        own = [one.score(pictures, prompts) if found is None else found for one, found in zip(rewards, known)]
        if isinstance(reward, Combination):
            total, parts = reward.combine(own, prompts), {part.name: found for part, found in zip(reward.parts, own)}
        else:
            (total,), parts = own, {}
        total = total.double()
        require_finite(total, prompts)
        return Scores(total, _parts(parts), seen)

    return finish


def _parts(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scores of a combination's parts by the names of the log."""
    return {PART + name: on_host(values.detach()).double() for name, values in parts.items()}


def _disagreement(
    reward: Reward, images: torch.Tensor, prompts: Sequence[str], compared: Sequence[str]
) -> torch.Tensor:
    """Of the combined score's gradient and those of the named parts, (B,)."""
    assert isinstance(reward, Combination)

    def gradient(of: Reward) -> torch.Tensor:
        leaf = images.detach().requires_grad_(True)
        with torch.enable_grad():
            (found,) = torch.autograd.grad(of.score(leaf, prompts).sum(), leaf)
        return found

    return gradient_disagreement(
        gradient(reward), (gradient(part.reward) for part in reward.parts if part.name in compared)
    )


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the host; of shapes alone, numbers that differ, for whoever compares them."""
    if tensor.is_meta:
        return torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return tensor.cpu()
