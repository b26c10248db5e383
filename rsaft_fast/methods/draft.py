"""DRaFT-K and DRaFT-LV: the gradient of the last calls of the sampler (Clark et al. 2024)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from rsaft_fast.methods.base import GradientMethod, require_at_most
from rsaft_fast.sampling.plan import GradientPlan


class DRaFT(GradientMethod):
    """Gradient through the last K calls, network input included.

    Attributes:
        k: number of graded calls; 1 gives the best reward per compute.
    """

    name: Literal["draft"] = "draft"
    k: int = Field(default=1, ge=1, le=1000)

    def draw(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        require_at_most("method.k", self.k, num_steps)
        return last_calls(num_steps, self.k, self.uncond)


class DRaFTLV(GradientMethod):
    """DRaFT-1, and n more one-call endpoints from the finished sample noised again: lower variance for about 10 % more.

    Attributes:
        n_extra: re-noised endpoints beside the chain's own, each with a noise of its own; all count alike. Ports differ
            on whether the paper's n counts the chain's own endpoint, so it is not counted here and said so.
    """

    name: Literal["draft_lv"] = "draft_lv"
    n_extra: int = Field(default=2, ge=1, le=1000)

    def draw(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        last, endpoints = num_steps - 1, 1 + self.n_extra
        return GradientPlan(
            num_steps,
            last=last,
            finish="sampler",
            graded=(last,),
            through=(last,),
            renoise=tuple((last, key) for key in range(self.n_extra)),
            weights=(1 / endpoints,) * endpoints,
            uncond=self.uncond,
        )


def last_calls(num_steps: int, k: int, uncond) -> GradientPlan:
    """Make the plan in which the last `k` calls are graded, input included."""
    graded = tuple(range(num_steps - k, num_steps))
    return GradientPlan(num_steps, last=num_steps - 1, finish="sampler", graded=graded, through=graded, uncond=uncond)
