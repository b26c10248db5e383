"""SAMAdamW over a backbone's trainable parameters, and its learning rate at every update."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.objective import ParameterSmoothing
from rsaft_fast.optim import SAMAdamW
from rsaft_fast.train.config import OptimizerSettings


def build_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    settings: OptimizerSettings,
    smoothing: ParameterSmoothing | None,
    seed: int = 0,
) -> SAMAdamW:
    """One parameter group for each radius. `seed` is that of stochastic rounding.

    Raises:
        UserError: a group of `smoothing.parameters.groups` matches no parameter, or two match the same.
    """
    # Without parameter smoothing nothing is ever perturbed; the optimizer still wants a radius.
    smoothing = smoothing or ParameterSmoothing()
    rest = dict(parameters)
    groups = []
    for group in smoothing.groups:
        matched = [name for name in rest if re.search(group.match, name)]
        if not matched:
            raise UserError(
                f"smoothing.parameters.groups: {group.match!r} matches no trainable parameter that is left; "
                f"they are named like {next(iter(parameters))}"
            )
        groups.append({"params": [rest.pop(name) for name in matched], "rho": group.rho})
    if rest:
        groups.append({"params": list(rest.values())})
    return SAMAdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        rho=smoothing.rho,
        adaptive=smoothing.adaptive,
        max_grad_norm=settings.max_grad_norm,
        state_bits=settings.state_bits,
        stochastic_rounding=settings.stochastic_rounding,
        seed=seed,
        backup=settings.backup,
        release_gradients=settings.release_gradients,
        offload=settings.offload,
    )


def learning_rate(settings: OptimizerSettings, step: int, max_steps: int) -> float:
    """The learning rate of update `step` (from 0): a function of the step alone, so there is no state to resume."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / (max_steps - settings.warmup_steps)
    if settings.schedule == "linear":
        return settings.lr * (1 - progress)
    return settings.lr * (1 + math.cos(math.pi * progress)) / 2
