"""The linear steps are diffusers' own samplers."""

import pytest
import torch
from builders.messages import says
from builders.pipelines import tiny_sd15
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from rsaft_fast.errors import UserError
from rsaft_fast.sampling import ddim_schedule, flow_schedule

SD15 = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("alpha_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(prediction_type, spacing, alpha_one, eta):
    config = dict(SD15, prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=alpha_one)
    for num_steps in (1, 7, 50):
        steps = ddim_schedule(DDIMScheduler(**config), num_steps, eta)
        theirs = DDIMScheduler(**config)
        theirs.set_timesteps(num_steps)
        assert [s.t for s in steps] == theirs.timesteps.tolist()
        # Their tables are fp32 numbers; computing with them in float64 shows the formula without their rounding.
        theirs.alphas_cumprod = theirs.alphas_cumprod.double()
        theirs.final_alpha_cumprod = torch.as_tensor(theirs.final_alpha_cumprod).double()
        generator = torch.Generator().manual_seed(num_steps)
        for step, t in zip(steps, theirs.timesteps):
            x, f, noise = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
            out = theirs.step(f, t, x, eta=eta, variance_noise=noise)
            assert_close(step.a * x + step.b * f + step.c * noise, out.prev_sample, 1e-12)
            assert_close(step.x0_a * x + step.x0_b * f, out.pred_original_sample, 1e-12)
            assert_close(step.alpha * x + step.sigma * noise, theirs.add_noise(x, noise, t), 1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sd15_ddim_equals_diffusers_in_fp32(eta):
    theirs = DDIMScheduler(**SD15, set_alpha_to_one=False)
    theirs.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    for step, t in zip(ddim_schedule(DDIMScheduler(**SD15, set_alpha_to_one=False), 50, eta), theirs.timesteps):
        x, f, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        out = theirs.step(f, t, x, eta=eta, variance_noise=noise).prev_sample
        assert_close(step.a * x + step.b * f + step.c * noise, out, 1e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_zero_terminal_snr_is_exact(prediction_type, eta, num_steps):
    """At alpha 0, x is noise alone and v is -x0; the whole rollout and its derivative are diffusers' in float64."""
    config = dict(
        SD15, prediction_type=prediction_type, rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=0
    )
    steps = ddim_schedule(DDIMScheduler(**config), num_steps, eta)
    first = steps[0]
    assert (first.t, first.alpha, first.sigma) == (999.0, 0.0, 1.0)
    assert (first.x0_a, first.x0_b) == ((0.0, -1.0) if prediction_type == "v_prediction" else (0.0, 1.0))
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(num_steps)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = torch.as_tensor(theirs.final_alpha_cumprod).double()
    generator = torch.Generator().manual_seed(num_steps)
    x, weight = torch.randn(2, 1, 4, 4, 4, generator=generator, dtype=torch.float64)
    noises = torch.randn(num_steps, 1, 4, 4, 4, generator=generator, dtype=torch.float64)
    # A network that depends on its weight: rolled out by our numbers, and by their scheduler.
    ends = []
    for ours in (True, False):
        w = weight.clone().requires_grad_()
        latents = x
        for step, noise, t in zip(steps, noises, theirs.timesteps):
            f = torch.tanh(w * latents)
            if ours:
                latents = step.a * latents + step.b * f + step.c * noise
            else:
                latents = theirs.step(f, t, latents, eta=eta, variance_noise=noise).prev_sample
        (gradient,) = torch.autograd.grad(latents.square().sum(), w)
        ends.append((latents.detach(), gradient))
    assert_close(ends[0][0], ends[1][0], 1e-12)
    assert_close(ends[0][1], ends[1][1], 1e-12)
    # At eta 1 diffusers takes the root of a rounding error, now and then NaN: the limit is noise around x0.
    ancestral = ddim_schedule(DDIMScheduler(**config), num_steps, 1.0)[0]
    left = ancestral.b / ancestral.x0_b
    assert abs(ancestral.a) < 1e-7 and ancestral.c == pytest.approx((1 - left**2) ** 0.5, rel=1e-12)


def test_epsilon_at_zero_snr_is_refused_only_where_a_step_is_there():
    config = dict(SD15, rescale_betas_zero_snr=True, timestep_spacing="leading")
    steps = ddim_schedule(DDIMScheduler(**config), 50)
    assert steps[0].alpha > 0


def assert_close(ours, truth, tolerance):
    """Largest difference relative to the largest value."""
    assert (ours - truth).abs().max() <= tolerance * max(float(truth.abs().max()), 1.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4, 28])
def test_flow_euler_equals_diffusers(shift, num_steps):
    steps = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=shift), num_steps)
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(num_steps)
    assert [s.t for s in steps] == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(num_steps)
    for step, t in zip(steps, theirs.timesteps):
        x, f = torch.randn(2, 2, 4, 8, 8, generator=generator)
        assert (step.a * x + step.b * f - theirs.step(f, t, x).prev_sample).abs().max() < 1e-6
        assert step.c == 0
        # x_t = (1 - sigma) x0 + sigma noise with v = noise - x0 gives x0 back.
        noised = step.alpha * x + step.sigma * f
        assert torch.allclose(step.x0_a * noised + step.x0_b * (f - x), x, atol=1e-6)


def test_flow_dynamic_shift_is_the_pipelines(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(UserError, match=r"\bmu\b"):
        flow_schedule(scheduler, 4)
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs.set_timesteps(4, mu=0.7)
    assert [s.t for s in flow_schedule(scheduler, 4, mu=0.7)] == theirs.timesteps.tolist()


def test_last_ddim_step_of_sd15_is_not_x0():
    last = ddim_schedule(DDIMScheduler(**SD15, set_alpha_to_one=False), 50)[-1]
    assert abs(last.b - last.x0_b) > 1e-2
    last = ddim_schedule(DDIMScheduler(**SD15, set_alpha_to_one=True), 50)[-1]
    assert last.b == pytest.approx(last.x0_b, abs=1e-12)


@pytest.mark.parametrize(
    "setting, word",
    [
        ({"clip_sample": True}, "clip_sample"),
        ({"clip_sample": False, "thresholding": True}, "thresholding"),
        (dict(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"), "rescale_betas_zero_snr"),
    ],
)
def test_non_linear_settings_are_refused(setting, word):
    with pytest.raises(UserError, match=word):
        ddim_schedule(DDIMScheduler(**setting), 5)


def test_bad_numbers_are_refused():
    scheduler = DDIMScheduler(**SD15)
    for num_steps, eta in ((0, 0.0), (1001, 0.0), (5, -0.1), (5, 1.5)):
        with pytest.raises(UserError):
            ddim_schedule(scheduler, num_steps, eta)


def test_a_number_of_steps_that_the_scheduler_cannot_place_is_the_samplers_fault():
    """A last sigma that is given cannot be the first as well; an offset can move the first step off the table."""
    stretched = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    with pytest.raises(UserError, match=says("sampler.steps", 1, 2, 1000)):
        flow_schedule(stretched, 1)
    assert [round(s.alpha, 6) for s in flow_schedule(stretched, 2)] == [0, 0.9]
    assert len(flow_schedule(FlowMatchEulerDiscreteScheduler(), 1)) == 1
    with pytest.raises(UserError, match=says("sampler.steps is 1000", "steps_offset 1", "timestep 1000", 999)):
        ddim_schedule(DDIMScheduler(**SD15), 1000)
    assert ddim_schedule(DDIMScheduler(**SD15), 999)[0].t == 999
    with pytest.raises(UserError, match=says("betas", 10, "timestep", 901)):
        ddim_schedule(DDIMScheduler(**SD15 | {"trained_betas": [0.01] * 10}), 10)


def test_pndm_config_without_clip_sample_is_not_clipped(tmp_path):
    from rsaft_fast.backbones import load_backbone

    backbone = load_backbone(tiny_sd15(tmp_path / "sd15"))
    assert "clip_sample" not in backbone.pipeline.scheduler.config
    steps = backbone.schedule(10)
    reference = DDIMScheduler.from_config(backbone.pipeline.scheduler.config, clip_sample=False)
    reference.set_timesteps(10)
    assert [s.t for s in steps] == reference.timesteps.tolist()
    with pytest.raises(UserError, match=says("eta", 2.0, 0, 1)):
        backbone.schedule(10, eta=2.0)
