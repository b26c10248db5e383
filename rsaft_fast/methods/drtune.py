"""DRTune: spread gradient calls, detached network inputs, early stop (Wu et al. 2024)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from rsaft_fast.methods.base import GradientMethod, require_at_most
from rsaft_fast.sampling.plan import GradientPlan


class DRTune(GradientMethod):
    """Gradient through K equally spaced calls from a random offset on, the network's input detached in all of them.

    The rollout stops 1 to M calls before the end and finishes with the predicted x0. Indices are spread over the calls
    that run, so that all K survive the early stop.

    Attributes:
        k: graded calls; null takes a tenth of the sampler's steps (5 of 50), at least 1.
        early_stop: at most this fraction of the sampler's steps is left out at the end, a random number at each draw
            (0.4: 1 to 20 of 50), and the picture predicted from there; 0 runs all calls.
    """

    name: Literal["drtune"] = "drtune"
    k: int | None = Field(default=None, ge=1, le=1000)
    early_stop: float = Field(default=0.4, ge=0.0, lt=1.0)

    def draw(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        k = self.k or max(1, num_steps // 10)
        require_at_most("method.k", k, num_steps)
        most = min(int(self.early_stop * num_steps), num_steps - k)
        left_out = int(rng.integers(1, most + 1)) if most >= 1 else 0
        executed = num_steps - left_out
        spacing = executed // k
        offset = int(rng.integers(0, spacing))
        graded = tuple(offset + i * spacing for i in range(k))
        return GradientPlan(num_steps, last=executed - 1, finish="x0", graded=graded, uncond=self.uncond)
