"""SAMAdamW over a backbone's trainable parameters, and its learning rate at every update."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.optim import SAMAdamW
from rsaft_fast.optim.moments import MOMENTS
from rsaft_fast.recipe.config import OptimizerSettings
from rsaft_fast.smoothing.settings import ParameterSmoothing


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
        replicas=False,  # gradients are summed over ranks before it sees them: what is not finite is so on all
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


def check_state(
    optimizer: SAMAdamW, names: Sequence[str], saved: Mapping[str, Any], saved_names: Sequence[str] | None
) -> None:
    """Refuse the state of another optimizer: torch would take a state by its place and broadcast what does not fit.

    Args:
        names: of the parameters, in the optimizer's order.
        saved: a state dict.
        saved_names: the names in its order; None where the checkpoint is from before they were noted.

    Raises:
        UserError: the first thing that does not fit.
    """
    own = [len(group["params"]) for group in optimizer.param_groups]
    try:
        found = [len(group["params"]) for group in saved["param_groups"]]
        states = saved["state"]
        if own != found or (saved_names is not None and list(saved_names) != list(names)):
            raise UserError(
                f"resume: the checkpoint's optimizer has {sum(found)} parameters in groups of {found}, and this "
                f"recipe's {sum(own)} in groups of {own}, or in another order; set smoothing.parameters.groups as the "
                "run had it"
            )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not states.keys() <= set(range(len(parameters))):
            raise KeyError(f"state of parameter {min(states.keys() - set(range(len(parameters))), key=str)!r}")
        for index, state in states.items():
            for moment in MOMENTS:
                if state[moment].shape != parameters[index].shape:
                    raise ValueError(f"{moment} of {names[index]} is {tuple(state[moment].shape)}")
            if "master" in state and state["master"].shape != parameters[index].shape:
                raise ValueError(f"the master of {names[index]} is {tuple(state['master'].shape)}")
            if torch.as_tensor(state["step"]).numel() != 1:
                raise ValueError(f"step of {names[index]} is no number")
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"resume: the checkpoint's optimizer state cannot be used ({type(error).__name__}: {error}); it is not "
            "what a run wrote"
        ) from error


def load_state(optimizer: SAMAdamW, saved: Mapping[str, Any]) -> None:
    """Take over a checked state dict's moments and counters.

    Rates and radii are the recipe's: a resumed run has said which of them changed.
    """
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    for group, settings in zip(optimizer.param_groups, own):
        group.update(settings)
