"""FlowBP's surrogate trajectories: Sparse, Bridge and Lagrange (Wang et al. 2026, arXiv 2606.11075).

Each keeps the sampler's own picture for the reward and chooses the path that the gradient takes back. Their released
configurations differ by model; defaults here are those of FLUX.1-dev, see docs/trajectory-methods.md for the others.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from rsaft_fast.errors import UserError
from rsaft_fast.methods.base import GradientMethod, require_at_most
from rsaft_fast.methods.leapalign import draw_two
from rsaft_fast.sampling.plan import GradientPlan, Leap, Uncond

Concentration = Annotated[float, Field(gt=0, le=1e3)]


class FlowBPSparse(GradientMethod):
    """Gradient through K calls drawn from all, the later the likelier, the network's input detached in all of them.

    DRTune's gradient with the sampler's own picture at its end, and other draws. Every sampler.

    Attributes:
        k: graded calls (FLUX.1 3, SD3.5 4).
        late_bias: call i of 1 to T is drawn with probability in proportion to i to this power; 0 draws evenly.
        rescale: how far the graded calls stand for those left out: their gradients are multiplied by
            1 + rescale (R - 1), R the sum of all steps' lengths over that of the graded ones (FLUX.1 1, SD3.5 0.5,
            FLUX.2-klein 0).
    """

    name: Literal["flowbp_sparse"] = "flowbp_sparse"
    k: int = Field(default=3, ge=1, le=1000)
    late_bias: float = Field(default=2.0, ge=0, le=20)
    rescale: float = Field(default=1.0, ge=0, le=100)
    uncond: Uncond = "detached"

    def draw(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        require_at_most("method.k", self.k, num_steps)
        return GradientPlan(
            num_steps,
            last=num_steps - 1,
            finish="sampler",
            graded=draw_late(0, num_steps, self.k, self.late_bias, rng),
            uncond=self.uncond,
            rescale=self.rescale,
        )


class FlowBPBridge(GradientMethod):
    """FlowBP-Sparse on both sides of a call j, which alone passes a share of its gradient on through its input.

    j is the later of two calls drawn evenly, and always graded; the K calls are divided between both sides by their
    lengths, at least one on each. Every sampler.

    Attributes:
        k: graded calls (FLUX.1 and SD3.5 5, FLUX.2-klein 3).
        late_bias: as of flowbp_sparse, within each side.
        rescale: as of flowbp_sparse (FLUX.1 1, SD3.5 0, FLUX.2-klein 0.5).
        coupling: alpha, the share of the gradient that goes through the input of call j (FLUX.1 0.1, SD3.5 0.5,
            FLUX.2-klein 1); 0 is without the bridge.
    """

    name: Literal["flowbp_bridge"] = "flowbp_bridge"
    k: int = Field(default=5, ge=2, le=1000)
    late_bias: float = Field(default=2.0, ge=0, le=20)
    rescale: float = Field(default=1.0, ge=0, le=100)
    coupling: float = Field(default=0.1, ge=0, le=1)
    uncond: Uncond = "detached"

    def draw(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        require_at_most("method.k", self.k, num_steps)
        _, j = draw_two(0, num_steps, rng)
        before, after = j, num_steps - j
        early = min(max(round(self.k * before / num_steps), 1, self.k - after), before, self.k - 1)
        graded = (
            *draw_late(0, before, early, self.late_bias, rng),
            j,
            *draw_late(j + 1, num_steps, self.k - early - 1, self.late_bias, rng),
        )
        return GradientPlan(
            num_steps,
            last=num_steps - 1,
            finish="sampler",
            graded=graded,
            through=(j,),
            uncond=self.uncond,
            input_share=self.coupling,
            rescale=self.rescale,
        )


class FlowBPLagrange(GradientMethod):
    """LeapAlign with leaps that follow the sampler: each is an integrated polynomial through several predictions.

    Flow models, and DDIM without noise on models that predict epsilon.

    Attributes:
        order: predictions that a leap is drawn through, its first call's and others evenly spread over it; a leap over
            fewer calls takes them all. 1 is LeapAlign's leap.
        active: of those, how many carry gradient, from the leap's first call on.
        support_share: the share of their gradient that those beyond a leap's first call keep.
        rescale: how far the active predictions stand for the leap's others, see flowbp_sparse; of each leap by itself
            (FLUX.1 0.5, SD3.5 and FLUX.2-klein 0).
        discount: alpha, as of leapalign.
        similarity: tau, as of leapalign (FLUX.2-klein 0.1).
        stretches: concentrations of a Dirichlet distribution that divides the sampler's calls in three: after the
            second leap's first call, between the two, and before the first; null draws both calls evenly, as leapalign
            does.
    """

    name: Literal["flowbp_lagrange"] = "flowbp_lagrange"
    order: int = Field(default=3, ge=1, le=12)
    active: int = Field(default=2, ge=1, le=12)
    support_share: float = Field(default=0.25, ge=0, le=1)
    rescale: float = Field(default=0.5, ge=0, le=100)
    discount: float = Field(default=0.1, ge=0, le=1)
    similarity: float | None = Field(default=0.2, gt=0, le=1e6)
    stretches: tuple[Concentration, Concentration, Concentration] | None = (2.5, 6.0, 2.0)
    uncond: Uncond = "detached"

    def draw(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        least = 2 if self.stretches is None else 3
        if num_steps < least:
            raise UserError(
                f"sampler.steps is {num_steps}, and method flowbp_lagrange divides at least {least}; raise "
                "sampler.steps"
            )
        k, j = (
            draw_two(0, num_steps, rng) if self.stretches is None else _draw_stretches(num_steps, self.stretches, rng)
        )
        leaps = (Leap(k, j, spread(k, j, self.order)), Leap(j, num_steps, spread(j, num_steps, self.order)))
        return GradientPlan(
            num_steps,
            last=num_steps - 1,
            finish="sampler",
            graded=tuple(call for leap in leaps for call in leap.supports[: self.active]),
            through=(j,),
            uncond=self.uncond,
            leaps=leaps,
            input_share=self.discount,
            support_share=self.support_share,
            rescale=self.rescale,
            similarity_floor=self.similarity,
        )


def draw_late(low: int, high: int, count: int, bias: float, rng: np.random.Generator) -> tuple[int, ...]:
    """Draw different calls of [low, high), ascending; the n-th of them in proportion to n to the power of `bias`."""
    if not count:
        return ()
    weights = np.arange(1, high - low + 1, dtype=np.float64) ** bias
    drawn = rng.choice(np.arange(low, high), size=count, replace=False, p=weights / weights.sum())
    return tuple(sorted(int(call) for call in drawn))


def spread(start: int, stop: int, order: int) -> tuple[int, ...]:
    """Return `order` calls of [start, stop), evenly spread, first and last among them; all where there are fewer."""
    if order == 1:
        return (start,)
    if stop - start <= order:
        return tuple(range(start, stop))
    return tuple(start + round(place) for place in np.linspace(0, stop - start - 1, order).tolist())


def _draw_stretches(num_steps: int, concentrations: tuple[float, ...], rng: np.random.Generator) -> tuple[int, int]:
    """Divide the calls in three parts of at least one; return where the second and the third from the end begin."""
    shares = rng.dirichlet(concentrations)
    parts = np.rint(shares * num_steps).astype(int)
    parts[shares.argmax()] += num_steps - parts.sum()
    parts = parts.clip(min=1)
    parts[parts.argmax()] += num_steps - parts.sum()
    after, between, _ = (int(part) for part in parts)
    # The last call is never one of the two.
    return num_steps - 1 - after - between, num_steps - 1 - after
