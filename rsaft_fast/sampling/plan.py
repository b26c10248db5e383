"""Which network calls of a rollout carry a gradient: the whole difference between ReFL, DRaFT, AlignProp and DRTune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rsaft_fast.errors import UserError

Uncond = Literal["graded", "detached", "none"]
Finish = Literal["sampler", "x0"]


@dataclass(frozen=True)
class GradientPlan:
    """One draw of a reward-gradient method, replayed unchanged by the second pass of a step.

    Attributes:
        num_steps: length T of the schedule that the plan was drawn for.
        last: index of the last executed network call, 0 to T - 1.
        finish: "sampler" ends with the sampler's own step at `last`; "x0" with the predicted clean latent there.
        graded: calls whose prediction carries parameter gradient, ascending.
        through: those of `graded` whose input carries gradient too; elsewhere the network sees a detached latent, while
            the sampler's linear path keeps its gradient (DRTune).
        renoise: for each extra endpoint (step, noise_key): the detached first endpoint, noised again to the level
            of `step`, and finished by one graded call there (DRaFT-LV).
        weights: weight of each endpoint's reward, first the chain's own; they sum to 1.
        uncond: what classifier-free guidance's unconditional branch carries in graded calls: "graded", "detached"
            (no gradient, neither of parameters nor of the input); "none" turns guidance off in the whole rollout.
    """

    num_steps: int
    last: int
    finish: Finish
    graded: tuple[int, ...]
    through: tuple[int, ...] = ()
    renoise: tuple[tuple[int, int], ...] = ()
    weights: tuple[float, ...] = (1.0,)
    uncond: Uncond = "graded"

    def __post_init__(self) -> None:
        if not 0 <= self.last < self.num_steps:
            raise UserError(f"last is {self.last}; a schedule of {self.num_steps} steps has 0 to {self.num_steps - 1}")
        if list(self.graded) != sorted(set(self.graded)) or any(not 0 <= i <= self.last for i in self.graded):
            raise UserError(f"graded is {self.graded}; it must ascend within 0 to last ({self.last})")
        if not set(self.through) <= set(self.graded):
            raise UserError(f"through {self.through} must be a subset of graded {self.graded}")
        if any(not 0 <= step < self.num_steps for step, _ in self.renoise):
            raise UserError(f"renoise {self.renoise} names a step outside 0 to {self.num_steps - 1}")
        if not self.graded and not self.renoise:
            raise UserError("the plan has no graded call; nothing would be trained")
        if len(self.weights) != 1 + len(self.renoise) or abs(sum(self.weights) - 1) > 1e-9:
            raise UserError(f"weights {self.weights} must be {1 + len(self.renoise)} numbers that sum to 1")

    @property
    def first_graded(self) -> int:
        """Index of the earliest call that carries gradient in the chain (`last` + 1 when only re-noised calls do)."""
        return min(self.graded, default=self.last + 1)

    def backward_calls(self, guided: bool, batched: bool = False) -> int:
        """How often a walk back through the plan calls backward.

        Args:
            guided: at a guidance scale other than 1.
            batched: both branches of a guided call go through the network together.
        """
        branches = 2 if guided and self.uncond == "graded" and not batched else 1
        return branches * (len(self.graded) + len(self.renoise))
