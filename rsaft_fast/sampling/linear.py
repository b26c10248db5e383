"""Samplers as linear steps.

Every deterministic or ancestral step used here is linear in the latent and in the network's prediction,

    x' = a x + b f(input_scale * x, t) + c noise,        x0 = x0_a x + x0_b f,

so a sampler is a tuple of scalars and its reverse-mode derivative can be walked by hand (`backpropagate`).
Scalars are Python floats (float64), computed from the tables that diffusers' own schedulers hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from rsaft_fast.errors import UserError


@dataclass(frozen=True)
class LinearStep:
    """One network call and the update that follows it.

    Attributes:
        t: timestep handed to the network, in the scheduler's own unit (0 to 1000).
        a, b, c: x' = a*x + b*f + c*noise, noise ~ N(0, I).
        input_scale: the network sees input_scale * x (1 for DDIM and flow matching).
        x0_a, x0_b: predicted clean latent, x0 = x0_a*x + x0_b*f.
        alpha, sigma: forward process at t, x_t = alpha*x0 + sigma*noise (re-noising, denoising loss).
    """

    t: float
    a: float
    b: float
    c: float
    x0_a: float
    x0_b: float
    alpha: float
    sigma: float
    input_scale: float = 1.0


Schedule = tuple[LinearStep, ...]


def ddim_schedule(scheduler: DDIMScheduler, num_steps: int, eta: float = 0.0) -> Schedule:
    """DDIM (Song et al. 2021, eq. 12) at the scheduler's own timesteps.

    Betas rescaled to zero terminal SNR (Lin et al. 2024, arXiv 2305.08891) put alpha at 0 on the first step, where x is
    noise alone: v is minus x0 there, and `sample` x0 itself. Of eps nothing follows for x0.

    Args:
        scheduler: any diffusers scheduler config built as `DDIMScheduler`; its betas, spacing, offset, final alpha
            and prediction type are used.
        num_steps: number of network calls, at most the scheduler's training timesteps.
        eta: 0 deterministic, 1 ancestral (DDPM variance).

    Raises:
        UserError: a setting that makes the step non-linear (clipping, thresholding), eta outside [0, 1], betas that
            diffusers cannot place, or a step at which x0 does not follow from the prediction.
    """
    config = scheduler.config
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}; DDIM takes 0 (deterministic) to 1 (ancestral)")
    for key in ("clip_sample", "thresholding"):
        if config.get(key):
            raise UserError(
                f"the scheduler has {key}=True, which makes a step non-linear; build it with {key}=False "
                f"(for example DDIMScheduler.from_config(config, {key}=False))"
            )
    _check_num_steps(num_steps, config.num_train_timesteps)
    _place(scheduler, num_steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    cumulative = scheduler.alphas_cumprod.double()
    if len(cumulative) == config.num_train_timesteps <= max(timesteps):
        raise UserError(
            f"sampler.steps is {num_steps}, which timestep_spacing {config.timestep_spacing} with steps_offset "
            f"{config.steps_offset} begins at timestep {max(timesteps)}, and the last is {len(cumulative) - 1}; take "
            "fewer steps"
        )
    if len(cumulative) <= max(timesteps):
        raise UserError(f"the scheduler has {len(cumulative)} betas for timestep {max(timesteps)}; give all of them")
    stride = config.num_train_timesteps // num_steps
    steps = []
    for t in timesteps:
        previous = t - stride
        abar = float(cumulative[t])
        abar_previous = float(cumulative[previous]) if previous >= 0 else float(scheduler.final_alpha_cumprod)
        steps.append(_ddim_step(t, abar, abar_previous, eta, config.prediction_type))
    return _checked(steps)


def _ddim_step(t: int, abar: float, abar_previous: float, eta: float, prediction_type: str) -> LinearStep:
    known = {"epsilon": "0 < alpha <= 1", "v_prediction": "0 <= alpha <= 1", "sample": "0 <= alpha < 1"}
    if prediction_type not in known:
        raise UserError(f"prediction_type {prediction_type!r} is unknown; DDIM knows {', '.join(known)}")
    if not (0 <= abar <= 1 and 0 < abar_previous <= 1) or abar == {"epsilon": 0, "sample": 1}.get(prediction_type):
        raise UserError(
            f"timestep {t} has alpha^2 {abar:g}, and the one after it {abar_previous:g}; a step of prediction_type "
            f"{prediction_type} needs {known[prediction_type]}: "
            + ("rescale_betas_zero_snr is for v_prediction" if abar == 0 else "its betas are damaged")
        )
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5
    # x0 and eps, each as (coefficient of x, coefficient of f).
    if prediction_type == "epsilon":
        x0, eps = (1 / alpha, -sigma / alpha), (0.0, 1.0)
    elif prediction_type == "v_prediction":
        x0, eps = (alpha, -sigma), (sigma, alpha)
    else:
        x0, eps = (0.0, 1.0), (1 / sigma, -alpha / sigma)
    variance = (1 - abar_previous) / (1 - abar) * (1 - abar / abar_previous) if abar < 1 else 0.0
    std = eta * max(variance, 0.0) ** 0.5
    direction = max(1 - abar_previous - std**2, 0.0) ** 0.5
    alpha_previous = abar_previous**0.5
    return LinearStep(
        t=float(t),
        a=alpha_previous * x0[0] + direction * eps[0],
        b=alpha_previous * x0[1] + direction * eps[1],
        c=std,
        x0_a=x0[0],
        x0_b=x0[1],
        alpha=alpha,
        sigma=sigma,
    )


def flow_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_steps: int,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """Euler steps of the rectified flow x_t = (1 - sigma) x0 + sigma noise, v = noise - x0 (SD3, FLUX).

    Args:
        scheduler: its shift (or dynamic shift, with `mu`) places the sigmas exactly as the pipeline does.
        num_steps: number of network calls.
        mu: the dynamic shift for `use_dynamic_shifting` schedulers (FLUX: from the number of image tokens).
        sigmas: one a call, before the shift, as FLUX's pipeline sets them; None takes the scheduler's own.

    Raises:
        UserError: a setting that steps another way, or one that diffusers cannot place the sigmas with.
    """
    config = scheduler.config
    if config.get("stochastic_sampling"):
        raise UserError("stochastic_sampling=True of the flow scheduler is not supported; turn it off")
    if config.get("invert_sigmas"):
        raise UserError("invert_sigmas=True of the flow scheduler is another model's way; turn it off")
    if config.get("use_dynamic_shifting") and mu is None:
        raise UserError(
            "this flow scheduler shifts dynamically and needs mu, which its pipeline computes from the image size"
        )
    # Stretched to end at a given sigma, the last one cannot be the first as well.
    terminal = config.get("shift_terminal")
    _check_num_steps(num_steps, config.num_train_timesteps, least=2 if terminal else 1)
    shift = {"mu": mu} if config.get("use_dynamic_shifting") else {}
    _place(scheduler, num_steps, sigmas=None if sigmas is None else list(sigmas), **shift)
    placed = scheduler.sigmas.double().tolist()
    return _checked(
        LinearStep(t=float(t), a=1.0, b=after - now, c=0.0, x0_a=1.0, x0_b=-now, alpha=1.0 - now, sigma=now)
        for t, now, after in zip(scheduler.timesteps, placed[:-1], placed[1:])
    )


def _place(scheduler: SchedulerMixin, num_steps: int, **options: Any) -> None:
    """`set_timesteps`; what a config makes impossible there becomes one line."""
    try:
        scheduler.set_timesteps(num_steps, **options)
    except Exception as error:
        # A spacing without its package, a wrong name, no number where one is needed: each its own kind.
        raise UserError(
            f"the scheduler's config does not give {num_steps} steps ({type(error).__name__}: {error}); change sampler."
            "steps, or mend scheduler/scheduler_config.json"
        ) from error


def _checked(steps: Iterable[LinearStep]) -> Schedule:
    steps = tuple(steps)
    for step in steps:
        if odd := [name for name, value in vars(step).items() if not math.isfinite(value)]:
            raise UserError(
                f"the scheduler's step at {step.t:g} has {odd[0]} {getattr(step, odd[0])}; its config is damaged: mend "
                "scheduler/scheduler_config.json"
            )
    return steps


def _check_num_steps(num_steps: int, limit: int, least: int = 1) -> None:
    if not least <= num_steps <= limit:
        raise UserError(f"sampler.steps is {num_steps}; this scheduler takes {least} to {limit}")
