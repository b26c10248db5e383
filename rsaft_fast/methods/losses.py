"""Losses of a reward: the three maps that the reward-gradient methods train with."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from rsaft_fast.settings import Settings


class Loss(Settings):
    """A per-sample map from reward r to loss, averaged over samples.

    Attributes:
        map: "linear" is -r (DRaFT, DRTune); "hinge" is relu(margin - r) (ReFL); "target" is |target - r| (AlignProp).
        margin: of the hinge; samples above it stop pulling (ReFL: 2 for ImageReward).
        target: of the target map (AlignProp: 10 for the aesthetic score).
        scale: factor on the loss (ReFL 1e-3). Adam's step does not depend on it, weight decay and clipping do.
    """

    map: Literal["linear", "hinge", "target"] = "linear"
    margin: float = 2.0
    target: float = 10.0
    scale: float = Field(default=1.0, gt=0)

    def __call__(self, rewards: torch.Tensor) -> torch.Tensor:
        """Compute the loss (B,) of rewards (B,)."""
        if self.map == "linear":
            return -self.scale * rewards
        if self.map == "hinge":
            return self.scale * torch.relu(self.margin - rewards)
        return self.scale * (self.target - rewards).abs()

    def derivative(self, rewards: torch.Tensor) -> torch.Tensor:
        """Compute dloss/dr (B,), 0 at a hinge's or target's kink."""
        leaf = rewards.detach().requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self(leaf).sum(), leaf)
        return slope
