"""ReFL: the gradient of one randomly chosen late call, through its one-step prediction (Xu et al. 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from rsaft_fast.methods.base import GradientMethod
from rsaft_fast.methods.losses import Loss
from rsaft_fast.sampling.plan import GradientPlan, Uncond


class ReFL(GradientMethod):
    """Gradient through one call, at random in a late window; the picture is the clean one that it predicts.

    Attributes:
        window: from which fraction of the sampler's steps to which the one graded call is drawn, the end left out. The
            released code draws from {30..39} of 40 steps, its paper's flow descendants from the last 11 of 25.
    """

    name: Literal["refl"] = "refl"
    window: tuple[float, float] = Field(default=(0.75, 1.0))
    # The released code trains and samples without guidance.
    uncond: Uncond = "none"

    default_loss: ClassVar[Loss] = Loss(map="hinge", margin=2.0, scale=1e-3)

    @model_validator(mode="after")
    def _window_is_an_interval(self) -> ReFL:
        low, high = self.window
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"window is {self.window}; it takes two fractions with 0 <= low < high <= 1")
        return self

    def draw(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        low = min(int(self.window[0] * num_steps), num_steps - 1)
        high = max(int(self.window[1] * num_steps), low + 1)
        m = int(rng.integers(low, high))
        return GradientPlan(num_steps, last=m, finish="x0", graded=(m,), uncond=self.uncond)
