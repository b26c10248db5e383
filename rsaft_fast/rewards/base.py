"""The protocol of a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class RewardSpec:
    """What produced a score, written into every result.

    Attributes:
        name: family name ("clip", "hpsv2.1", ...).
        source: path or hub id as the user gave it.
        sha256: hash of the weights file.
        preprocessing: every choice that changes a score (size, filter, crop, mean, std, clamp).
        licence: of the weights, where known.
    """

    name: str
    source: str = ""
    sha256: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    licence: str = ""


class Reward(nn.Module):
    """A frozen model that scores images against prompts; the score of a picture does not depend on its neighbours.

    `score` is `score_inputs(preprocess(images), prompts)`; the two halves are public because the image perturbation
    may live in the reward's own input space.
    """

    differentiable: bool = True
    spec: RewardSpec

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), nominally 0 to 1 and possibly outside, to the reward network's input; differentiable."""
        raise NotImplementedError(f"{type(self).__name__} has no separate input space")

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) in fp32 (float64 for a float64 model) of preprocessed inputs; higher is better."""
        raise NotImplementedError(f"{type(self).__name__} has no separate input space")

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) of images (B, 3, H, W), nominally 0 to 1."""
        return self.score_inputs(self.preprocess(images), prompts)

    forward = score
