"""What pictures of the playground are worth: true preference and its terms, rewards, sharpness, by picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rsaft_fast.playground.preference import true_terms
from rsaft_fast.rewards.base import Reward
from rsaft_fast.smoothing.settings import ImageSmoothing
from rsaft_fast.smoothing.sharpness import sharpness

TRUTH = "r*"
TERMS = ("colour", "shape", "relation", "count", "fidelity")
_TOGETHER = 64  # pictures whose renderer is fitted together: beyond that memory grows and time does not shrink


@torch.no_grad()
def truth_of(images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Compute r* and its terms of pictures (N, 3, 32, 32), (N,) each in float64; NaN for a term that does not apply."""
    parts = []
    for first in range(0, len(images), _TOGETHER):
        terms = true_terms(images[first : first + _TOGETHER], prompts[first : first + _TOGETHER])
        own = {name: getattr(terms, name) for name in TERMS} | {TRUTH: terms.mean()}
        own["relation"] = torch.where(terms.related > 0, own["relation"], float("nan"))
        parts.append(own)
    return {name: torch.cat([part[name] for part in parts]).double() for name in (TRUTH, *TERMS)}


def score_of(reward: Reward, images: torch.Tensor, prompts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """Score pictures (N, 3, H, W) without gradient, on the reward's device: (N,) in float64 on the host."""
    with torch.no_grad():
        parts = [
            reward.score(images[first : first + batch_size].to(reward.device), prompts[first : first + batch_size])
            for first in range(0, len(images), batch_size)
        ]
    return torch.cat(parts).double().cpu()


def sharpness_of(reward: Reward, images: torch.Tensor, prompts: Sequence[str], ball: ImageSmoothing) -> torch.Tensor:
    """Compute the sharpness S1 of pictures (N, 3, H, W) at a ball in a pixel space: (N,) in float64 on the host."""
    space: Any = ball.space
    images = images.to(reward.device)
    values = sharpness(reward, images, prompts, ball.number, ball.norm, space, batch_size=32)
    return values.detach().double().cpu()


def means(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Average each quantity over the pictures to which it applies; NaN where it applies to none."""
    return {name: float(own.nanmean()) for name, own in values.items()}
