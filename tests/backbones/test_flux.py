"""What FLUX.1 has that SD3 has not: packed latents, guidance as an embedding, a schedule of its own."""

import pytest
import torch
from builders.backbones import PROMPTS, SIZE, make_backbone, noise_source
from builders.messages import says
from builders.pipelines import tiny_flux
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from numpy import linspace

from rsaft_fast.algorithms.flow_grpo import FlowGRPO
from rsaft_fast.algorithms.nft import NFT
from rsaft_fast.backbones import load_backbone
from rsaft_fast.backbones.flow import dynamic_shift
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.errors import UserError
from rsaft_fast.methods import NFT as NFTSettings
from rsaft_fast.methods import DRaFT
from rsaft_fast.methods import FlowGRPO as Settings
from rsaft_fast.recipe.config import SamplerSettings
from rsaft_fast.rewards import RewardSpec
from rsaft_fast.rewards.python import FunctionReward
from rsaft_fast.sampling import flow_schedule, rollout

STEPS = 3


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return tiny_flux(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    return tiny_flux(tmp_path_factory.mktemp("schnell"), guidance_embeds=False)


def load(folder, **size):
    return load_backbone(folder, **({"height": SIZE, "width": SIZE} | size))


def images_of_both(folder, negative, ours, theirs, height=SIZE, width=SIZE):
    """Our pictures and those of the pipeline's own call."""
    backbone, noise = load(folder, height=height, width=width), noise_source(2)
    latents, plan = backbone.initial_latents(noise), DRaFT().draw(STEPS, None)
    conditioning = backbone.encode(PROMPTS[:2], negative, **ours)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        end = rollout(backbone, backbone.schedule(STEPS), plan, latents, conditioning, noise)
        images = backbone.decode(end.endpoints[0]).clamp(0, 1)
    truth = pipeline(
        list(PROMPTS[:2]),
        negative_prompt=None if negative is None else [negative] * 2,
        num_inference_steps=STEPS,
        latents=latents,
        max_sequence_length=backbone.t5_length,
        height=height,
        width=width,
        output_type="pt",
        **theirs,
    ).images
    assert truth.std() > 0.05
    return images, truth


@pytest.mark.parametrize(
    "model, negative, ours, theirs",
    [
        ("dev", None, {"guidance_scale": 5.0}, {"guidance_scale": 5.0}),
        ("dev", None, {}, {"guidance_scale": 1.0}),
        ("dev", "ugly", {"guidance_scale": 3.5, "true_cfg_scale": 4.0}, {"guidance_scale": 3.5, "true_cfg_scale": 4.0}),
        ("schnell", None, {}, {}),
        ("schnell", "ugly", {"true_cfg_scale": 2.0}, {"true_cfg_scale": 2.0}),
    ],
)
def test_guidance_is_the_pipelines(request, model, negative, ours, theirs):
    images, truth = images_of_both(request.getfixturevalue(model), negative, ours, theirs)
    assert (images - truth).abs().max() < 1e-4


def test_pictures_that_are_not_square(dev):
    images, truth = images_of_both(dev, None, {}, {"guidance_scale": 1.0}, height=24, width=40)
    assert images.shape == (2, 3, 24, 40) and (images - truth).abs().max() < 1e-4


def test_embedded_guidance_is_felt_and_costs_no_branch(dev):
    backbone = load(dev)
    x, step = backbone.initial_latents(noise_source(2)), backbone.schedule(2)[0]
    encoded = [backbone.encode(PROMPTS[:2], "ugly", w) for w in (1.0, 6.0)]
    assert all(c.negative is None and c.guidance_scale == 1.0 for c in encoded)
    with torch.no_grad():
        low, high = (backbone.predict(x, step, c.positive) for c in encoded)
    assert (low - high).abs().max() > 1e-3


def test_schnell_has_no_place_for_a_guidance_scale(schnell, dev):
    backbone = load(schnell)
    assert backbone.t5_length == 40 and "guidance" not in backbone.encode(PROMPTS).positive
    with pytest.raises(UserError, match=says("sampler.guidance_scale", 3.5, "schnell", "sampler.true_cfg_scale")):
        backbone.encode(PROMPTS, guidance_scale=3.5)
    with pytest.raises(UserError, match=says("sampler.negative_prompt", "sampler.true_cfg_scale", 1)):
        EncodedPrompts.encode(load(dev), PROMPTS, SamplerSettings(negative_prompt="ugly", guidance_scale=3.5))


def test_tokens_are_packed_as_the_pipeline_packs_them(dev):
    backbone = load(dev, height=24, width=40)
    x = torch.randn(2, 4, 12, 20)
    tokens = backbone.pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 12, 20))
    assert tokens.shape[1:] == backbone.latent_shape == (60, 16)
    assert torch.equal(backbone.unpack(tokens), x)
    ids = FluxPipeline._prepare_latent_image_ids(2, 6, 10, torch.device("cpu"), torch.float32)
    assert torch.equal(backbone._image_ids, ids)


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096, 6144])
def test_the_schedule_is_the_pipelines_at_real_sizes(num_tokens):
    config = dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    for num_steps in (1, 4, 28):
        theirs = FlowMatchEulerDiscreteScheduler(**config)
        unshifted = linspace(1.0, 1 / num_steps, num_steps)
        mu = calculate_shift(num_tokens)
        retrieve_timesteps(theirs, num_steps, "cpu", sigmas=unshifted, mu=mu)
        scheduler = FlowMatchEulerDiscreteScheduler(**config)
        assert dynamic_shift(scheduler.config, num_tokens) == pytest.approx(mu, rel=1e-12)
        steps = flow_schedule(scheduler, num_steps, dynamic_shift(scheduler.config, num_tokens), unshifted)
        assert [s.t for s in steps] == theirs.timesteps.tolist()
        assert [s.sigma for s in steps] == theirs.sigmas[:-1].tolist()


def test_the_backbones_schedule_is_the_one_its_pipeline_ran(dev):
    backbone = load(dev)
    pipeline = DiffusionPipeline.from_pretrained(dev)
    pipeline.set_progress_bar_config(disable=True)
    pipeline("one", num_inference_steps=5, height=SIZE, width=SIZE, output_type="latent", max_sequence_length=8)
    assert [s.t for s in backbone.schedule(5)] == pipeline.scheduler.timesteps.tolist()


def test_bf16_latents_stay_fp32_and_the_default_size_is_the_pipelines(dev):
    backbone = load_backbone(dev, dtype=torch.bfloat16)
    assert (backbone.height, backbone.width) == (128 * 2, 128 * 2)
    backbone = load(dev, height=16)
    x = backbone.initial_latents(noise_source(1))
    f = backbone.predict(x, backbone.schedule(2)[0], backbone.encode(["one"], guidance_scale=3.5).positive)
    assert x.dtype == f.dtype == torch.float32 and f.shape == x.shape and torch.isfinite(f).all()


def test_lora_reaches_both_kinds_of_blocks(dev, tmp_path):
    backbone = make_backbone("flux", tmp_path, train="lora")
    names = backbone.trainable_parameters
    assert any(name.startswith("transformer_blocks.0.attn.add_q_proj") for name in names)
    assert any(name.startswith("single_transformer_blocks.0.attn.to_q") for name in names)


@pytest.mark.parametrize("policy, settings", [(FlowGRPO, Settings()), (NFT, NFTSettings())])
def test_a_policy_gradient_warns_about_a_distilled_model(schnell, dev, policy, settings):
    reward = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)), RewardSpec("mean"), differentiable=False)
    notes = {folder: policy(load(folder), reward, settings, 4).notes for folder in (schnell, dev)}
    assert says(4, "distilled").search(notes[schnell][0]) and not notes[dev]
