"""What a policy gradient makes of a group's rewards, and of a batch with groups that say nothing."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

Spread = Literal["none", "group", "global"]

LEAST_STD = 1e-4
"""Added to a standard deviation that advantages are divided by, as the released code does."""


def zero_spread(rewards: torch.Tensor) -> torch.Tensor:
    """Tell of each group, (P,), whether all its rewards (P, G) are equal: it says nothing about better and worse."""
    return rewards.amax(1) == rewards.amin(1)


def group_advantages(rewards: torch.Tensor, std: Spread = "group", clip: float | None = 5.0) -> torch.Tensor:
    """Compute A = (r - mean of the group) / (std + 1e-4), float64, clipped to +-clip.

    Args:
        rewards: (P, G), a row a prompt.
        std: of each group (Flow-GRPO's paper), of all rewards of the iteration (its released configurations), or none:
            A = r - mean (GARDO, Dr. GRPO). Population standard deviations, as the released code takes.
    """
    rewards = rewards.double()
    advantages = rewards - rewards.mean(1, keepdim=True)
    if std == "group":
        advantages = advantages / (rewards.std(1, correction=0, keepdim=True) + LEAST_STD)
    elif std == "global":
        advantages = advantages / (spread(rewards) + LEAST_STD)
    return advantages if clip is None else advantages.clamp(-clip, clip)


def spread(values: torch.Tensor) -> torch.Tensor:
    """Compute the population standard deviation of all values, a float64 scalar."""
    values = values.double()
    return ((values - values.sum() / values.numel()).square().sum() / values.numel()).sqrt()


def full_batches(
    kept: list[int], left_out: list[int], size: int, updates: int, rng: np.random.Generator
) -> list[list[tuple[int, ...]]]:
    """Deal samples into the micro-batches of each update, all of them full.

    Args:
        kept: samples to train on. Among several updates they are shuffled.
        left_out: samples that fill the last micro-batch; `kept` and these together make whole ones.
        size: samples of a micro-batch.
        updates: among which the micro-batches are dealt, as evenly as they go; some get none where there are few.

    Returns:
        for each update its micro-batches.
    """
    order = list(kept)
    if updates > 1:
        order = [order[i] for i in rng.permutation(len(order))]
    order += left_out[: -len(order) % size]
    batches = [tuple(order[first : first + size]) for first in range(0, len(order), size)]
    bounds = np.linspace(0, len(batches), updates + 1).round().astype(int)
    return [batches[first:last] for first, last in zip(bounds[:-1], bounds[1:])]
