"""Which network calls of a rollout carry a gradient, and over which path: the whole difference between the methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rsaft_fast.errors import UserError

Uncond = Literal["graded", "detached", "none"]
Finish = Literal["sampler", "x0"]


@dataclass(frozen=True)
class Leap:
    """A stretch of calls that the gradient crosses in one linear piece; see `rsaft_fast.sampling.leaps`.

    Attributes:
        start: the call at which it begins.
        stop: the call before which it ends; the schedule's length is the picture.
        supports: calls whose predictions it is drawn through, ascending, `start` the first.
    """

    start: int
    stop: int
    supports: tuple[int, ...]


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
        leaps: the gradient's path in place of the sampler's steps, one leap after the other up to the picture; each
            graded call is a support of one. Empty: the sampler's steps.
        input_share: share of the gradient that passes through the inputs of `through` calls, 0 to 1.
        support_share: share of their gradient that a leap's graded supports keep beyond the first.
        rescale: how far graded calls stand for those that are not: 0 not at all, 1 up to the length of all together.
        similarity_floor: weigh samples by the inverse of their leaps' errors, of each at least this; None does not.
    """

    num_steps: int
    last: int
    finish: Finish
    graded: tuple[int, ...]
    through: tuple[int, ...] = ()
    renoise: tuple[tuple[int, int], ...] = ()
    weights: tuple[float, ...] = (1.0,)
    uncond: Uncond = "graded"
    leaps: tuple[Leap, ...] = ()
    input_share: float = 1.0
    support_share: float = 1.0
    rescale: float = 0.0
    similarity_floor: float | None = None

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
        if not (0 <= self.input_share <= 1 and 0 <= self.support_share <= 1 and self.rescale >= 0):
            raise UserError(
                f"input_share {self.input_share} and support_share {self.support_share} must be 0 to 1, and rescale "
                f"{self.rescale} at least 0"
            )
        whole = self.finish == "sampler" and self.last == self.num_steps - 1 and not self.renoise
        if (self.leaps or self.rescale) and not whole:
            raise UserError(
                f"leaps and rescale go with all of the sampler's calls; finish is {self.finish}, last {self.last} of "
                f"{self.num_steps}, and {len(self.renoise)} calls are re-noised"
            )
        self._check_leaps()

    def _check_leaps(self) -> None:
        if not self.leaps:
            if self.similarity_floor is not None:
                raise UserError(f"similarity_floor is {self.similarity_floor} without leaps, whose errors it is of")
            return
        for leap, after in zip(self.leaps, (*(leap.start for leap in self.leaps[1:]), self.num_steps)):
            ascends = list(leap.supports) == sorted(set(leap.supports)) and leap.supports[:1] == (leap.start,)
            if not ascends or leap.stop != after or leap.supports[-1] >= leap.stop or leap.start not in self.graded:
                raise UserError(
                    f"the leap {leap} must end at {after}, begin with a graded call, and have supports that ascend "
                    "from its start within it"
                )
        supports = {call for leap in self.leaps for call in leap.supports}
        if not set(self.graded) <= supports or not set(self.through) <= {leap.start for leap in self.leaps}:
            raise UserError(
                f"graded {self.graded} must be among the leaps' supports, and through {self.through} among their starts"
            )

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
