"""Base of all methods: settings, and for reward gradients a draw of the plan they describe."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from rsaft_fast.errors import UserError
from rsaft_fast.methods.losses import Loss
from rsaft_fast.sampling.plan import GradientPlan, Uncond
from rsaft_fast.settings import Settings


class Method(Settings):
    """Base of what `method` may be.

    Attributes:
        default_loss: the loss map its authors train with; a recipe's `loss` replaces it.
        needs_gradient: whether it follows the reward's gradient, which the reward then must have.
        updates: optimizer updates of one iteration, as far as the settings know.
    """

    default_loss: ClassVar[Loss] = Loss()
    needs_gradient: ClassVar[bool] = True

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer updates made from one iteration, as far as the settings know."""
        return 1


class GradientMethod(Method):
    """Base of the reward-gradient methods.

    Attributes:
        uncond: gradient of the unconditional branch of classifier-free guidance: "graded", "detached", or "none" for
            a rollout without guidance.
    """

    uncond: Uncond = "graded"

    def draw(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        """Draw the plan of one step for a schedule of `num_steps` calls.

        Raises:
            UserError: the method's settings do not fit into `num_steps`.
        """
        raise NotImplementedError


def require_at_most(name: str, value: int, num_steps: int) -> None:
    """Refuse a count of gradient steps that the schedule does not have."""
    if value > num_steps:
        raise UserError(f"{name} is {value}, but sampler.steps is {num_steps}; lower {name} or raise sampler.steps")
