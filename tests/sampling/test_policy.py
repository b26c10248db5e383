"""Stochastic steps against the equations, written again in float64."""

from __future__ import annotations

import math

import pytest
import torch
from builders.messages import says
from diffusers import DDIMScheduler

from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import LinearStep, Schedule, ddim_schedule
from rsaft_fast.sampling.policy import cps_schedule, is_flow, log_prob, log_prob_slope, residual, sde_schedule

SIGMAS = (1.0, 0.93, 0.81, 0.6, 0.33, 0.0)


def euler(sigmas=SIGMAS) -> Schedule:
    return tuple(
        LinearStep(t=1000 * s, a=1.0, b=after - s, c=0.0, x0_a=1.0, x0_b=-s, alpha=1.0 - s, sigma=s)
        for s, after in zip(sigmas, sigmas[1:])
    )


def drawn_values(seed=11):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("index", range(5))
def test_an_sde_step_is_the_equations(index):
    a, (x, v, noise) = 0.7, drawn_values()
    sigma, after = SIGMAS[index], SIGMAS[index + 1]
    step, dt = sde_schedule(euler(), a)[index], sigma - after  # dt > 0, backwards in sigma
    s = a * math.sqrt(sigma / (1 - (SIGMAS[1] if sigma == 1 else sigma)))
    x1, x0 = x + (1 - sigma) * v, x - sigma * v  # noise and clean, as the flow predicts them
    # The reversed drift is v less half s^2 times the score, which is -x1 / sigma.
    mean = x - v * dt - 0.5 * s**2 * (x1 / sigma) * dt
    torch.testing.assert_close(step.a * x + step.b * v, mean, rtol=1e-12, atol=1e-12)
    assert step.c == pytest.approx(s * math.sqrt(dt), rel=1e-12)
    torch.testing.assert_close(step.x0_a * x + step.x0_b * v, x0)
    check_log_prob(step, x, v, mean + step.c * noise, mean, s * math.sqrt(dt))


@pytest.mark.parametrize("index", range(4))
def test_a_cps_step_is_the_equations(index):
    eta, (x, v, noise) = 0.8, drawn_values()
    sigma, after = SIGMAS[index], SIGMAS[index + 1]
    step = cps_schedule(euler(), eta)[index]
    std = after * math.sin(eta * math.pi / 2)
    mean = (1 - after) * (x - sigma * v) + math.sqrt(after**2 - std**2) * (x + (1 - sigma) * v)
    torch.testing.assert_close(step.a * x + step.b * v, mean, rtol=1e-12, atol=1e-12)
    assert step.c == pytest.approx(std, rel=1e-12)
    check_log_prob(step, x, v, mean + std * noise, mean, std)


def check_log_prob(step, x, f, after, mean, std):
    """All forms and reductions, and their derivatives by autograd."""
    f = f.clone().requires_grad_(True)
    mean = mean + step.b * (f - f.detach())
    for form, each in (
        ("gaussian", torch.distributions.Normal(mean, std).log_prob(after)),
        ("squared", -(after - mean).square()),
    ):
        for reduction in ("mean", "sum"):
            wanted = getattr(each.flatten(1), reduction)(1)
            drawn = residual(step, x, f.detach(), after)
            torch.testing.assert_close(log_prob(step, drawn, reduction, form), wanted.detach(), rtol=1e-10, atol=1e-10)
            (slope,) = torch.autograd.grad(wanted.sum(), f, retain_graph=True)
            torch.testing.assert_close(log_prob_slope(step, drawn, reduction, form), slope, rtol=1e-10, atol=1e-12)


def test_without_noise_both_are_the_flows_own_steps():
    for made in (sde_schedule(euler(), 0.0), cps_schedule(euler(), 0.0)):
        for step, plain in zip(made, euler()):
            assert step.c == 0
            assert (step.a, step.b) == pytest.approx((plain.a, plain.b), abs=1e-15)
    assert cps_schedule(euler(), 0.8)[-1].c == 0 < sde_schedule(euler(), 0.7)[-1].c


@pytest.mark.parametrize("make", [lambda s: s, lambda s: sde_schedule(s, 0.7)], ids=["ode", "sde"])
def test_the_marginals_of_a_gaussian_flow_are_kept(make):
    """All is linear and Gaussian, so that mean and variance of the samples follow without sampling."""
    center, width = 1.5, 0.6

    def ends(count):
        sigmas = [0.98 * (1 - i / count) for i in range(count)] + [0.0]
        at = lambda s: ((1 - s) * center, (1 - s) ** 2 * width**2 + s**2)  # noqa: E731
        mean, variance = at(sigmas[0])
        for step, sigma in zip(make(euler(sigmas)), sigmas):
            m, total = at(sigma)
            # E[eps - x0 | x] = slope (x - m) - center
            slope = (sigma - (1 - sigma) * width**2) / total
            gain = step.a + step.b * slope
            mean = step.a * mean + step.b * (slope * (mean - m) - center)
            variance = gain**2 * variance + step.c**2
        return abs(mean - center), abs(variance - width**2)

    coarse, fine = ends(500), ends(2000)
    assert max(fine) < 3e-3
    assert fine[1] < 0.4 * coarse[1]  # first order in the step


def test_samples_of_the_sde_have_the_odes_marginals():
    """The same by sampling: 20000 chains each, 100 steps; 4 standard errors, and the discretisation's 0.02."""
    generator = torch.Generator().manual_seed(3)
    center, width, count, n = 1.5, 0.6, 100, 20_000
    sigmas = [0.98 * (1 - i / count) for i in range(count)] + [0.0]
    found = {}
    for name, schedule in (("ode", euler(sigmas)), ("sde", sde_schedule(euler(sigmas), 0.7))):
        begin = (0.02**2 * width**2 + 0.98**2) ** 0.5
        x = 0.02 * center + begin * torch.randn(n, generator=generator, dtype=torch.float64)
        for step, sigma in zip(schedule, sigmas):
            slope = (sigma - (1 - sigma) * width**2) / ((1 - sigma) ** 2 * width**2 + sigma**2)
            v = slope * (x - (1 - sigma) * center) - center
            x = step.a * x + step.b * v + step.c * torch.randn(n, generator=generator, dtype=torch.float64)
        found[name] = x
    gap = found["sde"].mean() - found["ode"].mean()
    assert abs(gap) < 4 * width * (2 / n) ** 0.5 + 0.02
    assert abs(found["sde"].std() - found["ode"].std()) < 4 * width / n**0.5 + 0.02


def test_ddim_steps_are_policies_too():
    x, f, noise = drawn_values()
    schedule = ddim_schedule(DDIMScheduler(clip_sample=False), 5, eta=1.0)
    step, after = schedule[1], schedule[2]
    assert not is_flow(schedule) and is_flow(euler())
    clean = (x - step.sigma * f) / step.alpha
    ratio = step.alpha / after.alpha
    std = after.sigma / step.sigma * math.sqrt(1 - ratio**2)
    mean = after.alpha * clean + math.sqrt(after.sigma**2 - std**2) * f
    check_log_prob(step, x, f, mean + std * noise, mean, std)


def test_what_is_no_flow_is_refused():
    ddim = ddim_schedule(DDIMScheduler(clip_sample=False), 5)
    for make, name in ((sde_schedule, "sde"), (cps_schedule, "cps")):
        with pytest.raises(UserError, match=says("method.step", name, "ddim")):
            make(ddim, 0.5)
    with pytest.raises(UserError, match=says("method.noise_level", 1.5, 1)):
        cps_schedule(euler(), 1.5)
