"""Samplers as linear steps.

Every deterministic or ancestral step used here is linear in the latent and in the network's prediction,

    x' = a x + b f(input_scale * x, t) + c noise,        x0 = x0_a x + x0_b f,

so a sampler is a tuple of scalars and its reverse-mode derivative can be walked by hand (`backpropagate`).
Scalars are Python floats (float64), computed from the tables that diffusers' own schedulers hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

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

    Args:
        scheduler: any diffusers scheduler config built as `DDIMScheduler`; its betas, spacing, offset, final alpha
            and prediction type are used.
        num_steps: number of network calls, at most the scheduler's training timesteps.
        eta: 0 deterministic, 1 ancestral (DDPM variance).

    Raises:
        UserError: a setting that makes the step non-linear (clipping, thresholding) or eta outside [0, 1].
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
    if config.get("rescale_betas_zero_snr"):
        raise UserError(
            "rescale_betas_zero_snr=True puts alpha at 0 on the first step; x0 is undefined there: turn it off"
        )
    _check_num_steps(num_steps, config.num_train_timesteps)
    scheduler.set_timesteps(num_steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    cumulative = scheduler.alphas_cumprod.double()
    stride = config.num_train_timesteps // num_steps
    steps = []
    for t in timesteps:
        previous = t - stride
        abar = float(cumulative[t])
        abar_previous = float(cumulative[previous]) if previous >= 0 else float(scheduler.final_alpha_cumprod)
        steps.append(_ddim_step(t, abar, abar_previous, eta, config.prediction_type))
    return tuple(steps)


def _ddim_step(t: int, abar: float, abar_previous: float, eta: float, prediction_type: str) -> LinearStep:
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5
    # x0 and eps, each as (coefficient of x, coefficient of f).
    if prediction_type == "epsilon":
        x0, eps = (1 / alpha, -sigma / alpha), (0.0, 1.0)
    elif prediction_type == "v_prediction":
        x0, eps = (alpha, -sigma), (sigma, alpha)
    elif prediction_type == "sample":
        x0, eps = (0.0, 1.0), (1 / sigma, -alpha / sigma)
    else:
        raise UserError(f"prediction_type {prediction_type!r} is unknown; DDIM knows epsilon, v_prediction and sample")
    variance = (1 - abar_previous) / (1 - abar) * (1 - abar / abar_previous)
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
    """
    config = scheduler.config
    if config.get("stochastic_sampling"):
        raise UserError("stochastic_sampling=True of the flow scheduler is not supported; turn it off")
    if config.get("use_dynamic_shifting") and mu is None:
        raise UserError(
            "this flow scheduler shifts dynamically and needs mu, which its pipeline computes from the image size"
        )
    _check_num_steps(num_steps, config.num_train_timesteps)
    shift = {"mu": mu} if config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(num_steps, sigmas=None if sigmas is None else list(sigmas), **shift)
    sigmas = scheduler.sigmas.double().tolist()
    return tuple(
        LinearStep(t=float(t), a=1.0, b=after - now, c=0.0, x0_a=1.0, x0_b=-now, alpha=1.0 - now, sigma=now)
        for t, now, after in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:])
    )


def _check_num_steps(num_steps: int, limit: int) -> None:
    if not 1 <= num_steps <= limit:
        raise UserError(f"steps is {num_steps}; this scheduler takes 1 to {limit}")
