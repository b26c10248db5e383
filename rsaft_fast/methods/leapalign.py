"""LeapAlign: the gradient of any two calls, over two leaps (Liang et al. 2026, arXiv 2604.15311)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from rsaft_fast.errors import UserError
from rsaft_fast.methods.base import GradientMethod
from rsaft_fast.sampling.plan import GradientPlan, Leap


class LeapAlign(GradientMethod):
    """Gradient through two calls anywhere, over a path of two leaps: from the first to the second, and to the picture.

    The picture is the sampler's own, and the reward is taken there; the leaps are the gradient's path alone. Flow
    models, and DDIM without noise on models that predict epsilon. Its authors train FLUX.1 with loss hinge, margin 0.55
    (HPSv2.1), 0.4 (PickScore as they scale it) or 13.5 (HPSv3), 25 steps, learning rate 1e-5, batch 64, 300 updates.

    Attributes:
        window: from which fraction of the sampler's steps to which the two calls are drawn, the end left out; the paper
            draws from all, and did worse with the first half alone.
        discount: alpha of eq. 9, the share of the gradient that goes through the second call's input; 0 leaves the
            nested gradient out, 1 keeps it whole.
        similarity: tau of eq. 12: a sample counts by one over its leaps' mean absolute errors, of each at least this;
            null counts all alike.
    """

    name: Literal["leapalign"] = "leapalign"
    window: tuple[float, float] = Field(default=(0.0, 1.0))
    discount: float = Field(default=0.3, ge=0.0, le=1.0)
    similarity: float | None = Field(default=0.1, gt=0, le=1e6)

    @model_validator(mode="after")
    def _window_is_an_interval(self) -> LeapAlign:
        low, high = self.window
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"window is {self.window}; it takes two fractions with 0 <= low < high <= 1")
        return self

    def draw(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        low, high = int(self.window[0] * num_steps), int(self.window[1] * num_steps)
        if high - low < 2:
            raise UserError(
                f"method leapalign draws two calls, and method.window {self.window} of sampler.steps {num_steps} has "
                f"{max(high - low, 0)}; widen the window, or raise sampler.steps"
            )
        k, j = draw_two(low, high, rng)
        return GradientPlan(
            num_steps,
            last=num_steps - 1,
            finish="sampler",
            graded=(k, j),
            through=(j,),
            uncond=self.uncond,
            leaps=(Leap(k, j, (k,)), Leap(j, num_steps, (j,))),
            input_share=self.discount,
            similarity_floor=self.similarity,
        )


def draw_two(low: int, high: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw two different calls of [low, high), any pair as likely as another; the earlier one first."""
    k, j = sorted(int(call) for call in rng.choice(np.arange(low, high), size=2, replace=False))
    return k, j
