"""What Stable Diffusion XL has that 1.5 has not: Euler configs, time ids, zeros without a prompt, a VAE beyond fp16."""

import copy

import pytest
import torch
from builders.backbones import PROMPTS, noise_source
from builders.damages import change
from builders.messages import says
from builders.pipelines import tiny_sdxl
from diffusers import DDIMScheduler, DiffusionPipeline, EDMEulerScheduler, EulerDiscreteScheduler

from rsaft_fast.backbones import load_backbone
from rsaft_fast.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_euler_config_is_sampled_as_diffusers_ddim_does(folder, spacing, eta):
    backbone = load_backbone(folder)
    config = dict(backbone.pipeline.scheduler.config, timestep_spacing=spacing)
    backbone.pipeline.scheduler = EulerDiscreteScheduler.from_config(config)
    theirs = DDIMScheduler.from_config(backbone.pipeline.scheduler.config)
    for num_steps in (1, 7, 50):
        theirs.set_timesteps(num_steps)
        steps = backbone.schedule(num_steps, eta)
        assert [step.t for step in steps] == theirs.timesteps.tolist()
        for step, t in zip(steps, theirs.timesteps):
            x, f, noise = torch.randn(3, 2, 4, 8, 8)
            truth = theirs.step(f, t, x, eta=eta, variance_noise=noise).prev_sample
            ours = step.a * x + step.b * f + step.c * noise
            assert (ours - truth).abs().max() <= 1e-6 * max(float(truth.abs().max()), 1)


def test_conditioning_is_what_the_pipeline_gives_its_unet(folder):
    """Text, pooled text and time ids as the UNet of diffusers' own call receives them, at a size that is not square."""
    backbone = load_backbone(folder, height=24, width=40)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda *args, **options: seen.append(options) or forward(*args, **options)
    latents = backbone.initial_latents(noise_source(2))
    for negative in (None, "", "blurry"):
        pipeline(
            list(PROMPTS[:2]),
            negative_prompt=None if negative is None else [negative] * 2,
            guidance_scale=3.0,
            latents=latents,
            height=24,
            width=40,
            num_inference_steps=1,
            output_type="latent",
        )
        ours, theirs = backbone.encode(PROMPTS[:2], negative, 3.0), seen.pop()
        for rows, branch in ((slice(0, 2), ours.negative), (slice(2, 4), ours.positive)):
            assert torch.allclose(branch["encoder_hidden_states"], theirs["encoder_hidden_states"][rows], atol=1e-5)
            for name in ("text_embeds", "time_ids"):
                assert torch.allclose(branch[name], theirs["added_cond_kwargs"][name][rows], atol=1e-5)
        assert ours.negative["encoder_hidden_states"].any() == (negative is not None)
    assert ours.positive["time_ids"].tolist() == [[24, 40, 0, 0, 24, 40]] * 2


def test_an_fp16_run_decodes_in_fp32_where_fp16_overflows(folder):
    full, half = load_backbone(folder), load_backbone(folder, dtype=torch.float16)
    assert (half.pipeline.vae.dtype, half.denoiser.dtype) == (torch.float32, torch.float16)
    for backbone in (full, half):
        with torch.no_grad():
            # GroupNorm hides the factor from the picture; SDXL's own activations grow beyond fp16 in the same way.
            backbone.pipeline.vae.decoder.conv_in.weight.mul_(1e6)
            backbone.pipeline.vae.decoder.conv_in.bias.mul_(1e6)
    x = full.initial_latents(noise_source(2))
    with torch.no_grad():
        naive = copy.deepcopy(half.pipeline.vae).half().decode(x.half()).sample
    assert not torch.isfinite(naive).all(), "or the test shows nothing"
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    images = [backbone.decode(leaf) for backbone, leaf in zip((half, full), leaves)]
    assert torch.equal(*images) and images[0].dtype == torch.float32
    # A reward's gradient a pixel can lie below fp16's smallest number; it must arrive.
    for image in images:
        (1e-8 * image).sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad) and leaves[0].grad.abs().max() > 0


def test_what_ddim_or_this_family_cannot_do_is_refused(folder, tmp_path):
    backbone = load_backbone(folder)
    backbone.pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(UserError, match=says("EDMEulerScheduler", "beta_schedule")):
        backbone.schedule(4)
    with pytest.raises(UserError, match=says("true_cfg_scale", 2.0, "FLUX.1")):
        backbone.encode(PROMPTS, None, 3.0, true_cfg_scale=2.0)
    changed = tiny_sdxl(tmp_path / "other")
    change(changed / "unet/config.json", addition_time_embed_dim=4)
    with pytest.raises(UserError, match=says("text_embeds", 16, 40)):
        load_backbone(changed).encode(PROMPTS)
