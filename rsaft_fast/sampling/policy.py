"""Stochastic steps of a sampler as a policy: x' ~ N(a x + b f(x), c^2), and the log-probability of what was drawn.

A policy gradient needs steps that draw. Those of flows are made here of the Euler steps; DDIM's are made with eta > 0
by `ddim_schedule`. All of them are `LinearStep`s: rollouts and noise keys are those of every other sampler.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import LinearStep, Schedule

LogProbForm = Literal["gaussian", "squared"]
Reduction = Literal["mean", "sum"]


def is_flow(schedule: Schedule) -> bool:
    """Tell whether these are Euler steps of a rectified flow, x_t = (1 - sigma) x0 + sigma noise."""
    return all(step.a == 1 and step.c == 0 and step.alpha == 1 - step.sigma for step in schedule)


def sde_schedule(euler: Schedule, noise_level: float) -> Schedule:
    """Make Flow-GRPO's SDE steps (arXiv 2505.05470, eq. 9) of a flow's Euler steps; the marginals stay the flow's.

    dx = [v + s^2 / (2 sigma) (x + (1 - sigma) v)] dsigma + s dw, s = noise_level sqrt(sigma / (1 - sigma)). At sigma 1
    the denominator takes the sigma that follows, as the released code does.

    Args:
        euler: of `flow_schedule`.
        noise_level: 0 gives the Euler steps; the paper takes 0.7 for SD3.5 and 0.9 for FLUX.1.

    Raises:
        UserError: the steps are no flow's.
    """
    steps = []
    for step in _flow(euler, "sde"):
        sigma, delta = step.sigma, step.b
        before_one = sigma if sigma < 1 else sigma + delta
        s2 = noise_level**2 * sigma / (1 - before_one)
        a = 1 + s2 * delta / (2 * sigma)
        b = (1 + s2 * (1 - sigma) / (2 * sigma)) * delta
        steps.append(replace(step, a=a, b=b, c=math.sqrt(s2 * -delta)))
    return tuple(steps)


def cps_schedule(euler: Schedule, noise_level: float) -> Schedule:
    """Make coefficients-preserving steps (Flow-CPS, arXiv 2509.05952) of a flow's Euler steps.

    x' = (1 - sigma') x0 + sqrt(sigma'^2 - c^2) x1 + c noise, c = sigma' sin(noise_level pi / 2): no more noise in x'
    than its sigma says. The last step, to sigma' 0, draws nothing.

    Args:
        euler: of `flow_schedule`.
        noise_level: eta of the paper, 0 (the Euler steps) to 1; the authors take 0.8.

    Raises:
        UserError: the steps are no flow's, or a level outside 0 to 1.
    """
    if not 0 <= noise_level <= 1:
        raise UserError(f"method.noise_level is {noise_level}; CPS steps take 0 (deterministic) to 1")
    steps = []
    for step in _flow(euler, "cps"):
        after = max(step.sigma + step.b, 0.0)
        kept = after * math.cos(noise_level * math.pi / 2)
        a = (1 - after) + kept
        b = kept * (1 - step.sigma) - (1 - after) * step.sigma
        steps.append(replace(step, a=a, b=b, c=after * math.sin(noise_level * math.pi / 2)))
    return tuple(steps)


def _flow(euler: Schedule, name: str) -> Schedule:
    if not is_flow(euler):
        raise UserError(f"method.step is {name}, whose noise is that of a flow (SD3, FLUX.1); DDIM models take ddim")
    return euler


def residual(step: LinearStep, x: torch.Tensor, f: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Compute what was drawn, x' - (a x + b f), at prediction f: c * noise, where f is the one that x' came of."""
    return after - (step.a * x + step.b * f)


def log_prob(
    step: LinearStep, drawn: torch.Tensor, reduction: Reduction = "mean", form: LogProbForm = "gaussian"
) -> torch.Tensor:
    """Compute the log-probability of a step that drew x'.

    Args:
        step: with c > 0.
        drawn: x' - (a x + b f), (B, *latent_shape), fp32 or float64; see `residual`.
        reduction: mean over the latent's elements, as Flow-GRPO and DDPO take it, or their sum.
        form: gaussian is log N(x'; a x + b f, c^2); squared is -(x' - a x - b f)^2, CPS's, without variance.

    Returns:
        (B,) float64.
    """
    squares = drawn.square().flatten(1)
    total = squares.sum(1, dtype=torch.float64)
    elements = squares.shape[1]
    if form == "gaussian":
        total = -total / (2 * step.c**2) - elements * (math.log(step.c) + 0.5 * math.log(2 * math.pi))
    else:
        total = -total
    return total / elements if reduction == "mean" else total


def log_prob_slope(
    step: LinearStep, drawn: torch.Tensor, reduction: Reduction = "mean", form: LogProbForm = "gaussian"
) -> torch.Tensor:
    """Compute d log_prob / d f, (B, *latent_shape) in the dtype of `drawn`."""
    slope = step.b / step.c**2 if form == "gaussian" else 2 * step.b
    return drawn * (slope / drawn[0].numel() if reduction == "mean" else slope)
