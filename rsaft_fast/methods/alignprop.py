"""AlignProp: gradient through a random number of last calls (Prabhudesai et al. 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from rsaft_fast.methods.base import GradientMethod
from rsaft_fast.methods.draft import last_calls
from rsaft_fast.methods.losses import Loss
from rsaft_fast.sampling.plan import GradientPlan


class AlignProp(GradientMethod):
    """Gradient through all calls from a random one on, network input included.

    It is call b of T, drawn once per batch from N(mean, std) within 1 to T - 1. The predictions before it are detached.
    Detaching the predictions leaves nothing before b that depends on the parameters, so the plan is DRaFT-(T - b).

    Attributes:
        mean: where the graded calls begin on average, as a fraction of the sampler's steps (the released code: 42 of
            50); all calls from there to the end carry gradient.
        std: standard deviation of that beginning, as a fraction of the sampler's steps (the released code: 5 of 50).
    """

    name: Literal["alignprop"] = "alignprop"
    mean: float = Field(default=0.84, ge=0.0, le=1.0)
    std: float = Field(default=0.1, ge=0.0, le=1.0)

    default_loss: ClassVar[Loss] = Loss(map="linear", scale=0.01)

    def draw(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        if num_steps == 1:
            return last_calls(1, 1, self.uncond)
        # Rejection, as the released code does; a mean far outside falls back to the nearest end.
        for _ in range(1000):
            b = int(rng.normal(self.mean * num_steps, self.std * num_steps))
            if 1 <= b <= num_steps - 1:
                break
        else:
            b = min(max(round(self.mean * num_steps), 1), num_steps - 1)
        return last_calls(num_steps, num_steps - b, self.uncond)
