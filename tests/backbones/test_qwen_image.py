"""What Qwen-Image has that others have not: texts of their own lengths, guidance that keeps lengths, a causal VAE."""

import json
import math

import numpy as np
import pytest
import torch
from builders.backbones import PROMPTS, SIZE, make_backbone, noise_source
from builders.damages import change
from builders.messages import says
from builders.pipelines import tiny_qwen_image
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps
from numpy import linspace
from safetensors import safe_open
from sampling.test_adjoint import check_against_autograd

from rsaft_fast.backbones import LoRASettings, add_lora, load_backbone, save_lora
from rsaft_fast.backbones.flow import dynamic_shift
from rsaft_fast.backbones.lora_formats import KOHYA_FILE, save_kohya
from rsaft_fast.backbones.published import published_pipeline
from rsaft_fast.backbones.qwen_image import MOST_TEXT
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.errors import UserError
from rsaft_fast.methods import DRaFT
from rsaft_fast.recipe.config import SamplerSettings
from rsaft_fast.sampling import flow_schedule, rollout
from rsaft_fast.sampling.branches import LENGTHS, join_rows
from rsaft_fast.sampling.protocol import LORA_FILE

STEPS = 3
SCHEDULER = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
LONG = "z1 " * 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen_image(tmp_path_factory.mktemp("qwen") / "pipeline")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, height=SIZE, width=SIZE)


def plain(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(backbone, conditioning, noise):
    plan = DRaFT().draw(STEPS, None)
    with torch.no_grad():
        end = rollout(backbone, backbone.schedule(STEPS), plan, backbone.initial_latents(noise), conditioning, noise)
        return backbone.decode(end.endpoints[0]).clamp(0, 1)


@pytest.mark.parametrize(
    ("prompts", "w", "negative", "size"),
    [
        (PROMPTS[:3], 1.0, None, (24, 40)),
        (PROMPTS[:3], 4.0, None, (40, 24)),
        (("one", LONG), 2.5, "ugly", (16, 16)),
    ],
)
def test_pictures_are_the_pipelines_whatever_the_lengths(folder, prompts, w, negative, size):
    """Prompts of unequal lengths are masked; one that is too long is cut; no negative prompt is a space."""
    backbone, noise = load_backbone(folder, height=size[0], width=size[1]), noise_source(len(prompts))
    images = sampled(backbone, backbone.encode(prompts, negative, guidance_scale=w), noise)
    truth = plain(folder)(
        list(prompts),
        negative_prompt=None if w == 1 else [negative or " "] * len(prompts),
        true_cfg_scale=w,
        num_inference_steps=STEPS,
        latents=backbone.initial_latents(noise),
        height=size[0],
        width=size[1],
        output_type="pt",
    ).images
    assert images.shape == truth.shape and truth.std() > 0.05
    assert (images - truth).abs().max() < 1e-4


def test_text_is_what_the_pipeline_reads_without_the_template_before_it(folder, backbone):
    pipeline = plain(folder)
    before = pipeline.prompt_template_encode.partition("{}")[0]
    assert len(pipeline.tokenizer(before)["input_ids"]) == pipeline.prompt_template_encode_start_idx
    prompts = [*PROMPTS, LONG]
    theirs, mask = pipeline.encode_prompt(prompts, max_sequence_length=MOST_TEXT)
    ours = backbone.embed_text(prompts)
    assert ours[LENGTHS].tolist() == mask.sum(1).tolist() and ours[LENGTHS].max() == MOST_TEXT
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs, rtol=1e-5, atol=1e-6)
    assert not ours["encoder_hidden_states"][~mask.bool()].any()
    (note,) = backbone.cut_prompts(prompts)
    assert says("text_encoder", MOST_TEXT, 1, 5, len(pipeline.tokenizer(LONG)["input_ids"])).search(note)
    assert backbone.cut_prompts(PROMPTS) == []


@pytest.mark.parametrize("multiple", [1, 7, 64])
def test_a_prompts_prediction_does_not_depend_on_its_neighbours(backbone, monkeypatch, multiple):
    x, step = backbone.initial_latents(noise_source(4)), backbone.schedule(4)[1]
    with torch.no_grad():
        alone = [backbone.predict(x[i : i + 1], step, backbone.encode([p]).positive) for i, p in enumerate(PROMPTS)]
        monkeypatch.setattr(backbone, "text_multiple", multiple)
        branch = backbone.encode(PROMPTS).positive
        text, mask = backbone.masked_text(branch)
        assert text.shape[1] % multiple == 0 and mask.sum(1).tolist() == branch[LENGTHS].tolist()
        together = backbone.predict(x, step, branch)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_prompts_of_one_length_need_no_mask(backbone):
    branch = backbone.encode(["one", "two"]).positive
    assert backbone.masked_text(branch)[1] is None
    encoded = EncodedPrompts.encode(backbone, ["one", *PROMPTS], SamplerSettings(guidance_scale=4.0))
    assert backbone.masked_text(encoded(["one", "one"]).positive)[1] is None
    mixed = encoded(["one", "a red circle"])
    assert not backbone.masked_text(mixed.positive)[1].all() and backbone.masked_text(mixed.negative)[1] is None
    joined = join_rows([mixed.positive, mixed.negative])
    assert joined["encoder_hidden_states"].shape[0] == 4 and joined[LENGTHS].tolist()[2] < joined[LENGTHS].tolist()[1]


def test_both_branches_in_one_call_give_the_same(backbone, monkeypatch):
    conditioning, noise = backbone.encode(PROMPTS[:2], "x", guidance_scale=3.0), noise_source(2)
    separate = sampled(backbone, conditioning, noise)
    monkeypatch.setattr(backbone, "cfg_batching", "batched")
    torch.testing.assert_close(sampled(backbone, conditioning, noise), separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("uncond", ["graded", "detached"])
def test_the_gradient_is_autograds_through_the_rescaled_guidance(tmp_path, uncond):
    """Every method, and guidance off, are tried with the other backbones (tests/sampling/test_adjoint.py)."""
    backbone = make_backbone("qwen", tmp_path, dtype=torch.float64)
    plan = DRaFT(k=2, uncond=uncond).draw(4, np.random.default_rng(0))
    conditioning = backbone.encode(PROMPTS[:2], "blurry", guidance_scale=4.0)
    check_against_autograd(backbone, backbone.schedule(4), plan, conditioning, seed=1)


def test_guidance_keeps_each_tokens_length(backbone):
    c, u = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    guided = backbone.guide(c, u, 4.0)
    torch.testing.assert_close(guided.norm(dim=-1), c.norm(dim=-1))
    torch.testing.assert_close(
        torch.nn.functional.normalize(guided, dim=-1), torch.nn.functional.normalize(u + 4 * (c - u), dim=-1)
    )


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6889])
def test_the_schedule_is_the_pipelines_at_real_sizes(tokens):
    for num_steps in (2, 8, 50):
        theirs = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        unshifted = linspace(1.0, 1 / num_steps, num_steps)
        mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
        retrieve_timesteps(theirs, num_steps, "cpu", sigmas=unshifted, mu=mu)
        ours = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        assert dynamic_shift(ours.config, tokens) == pytest.approx(mu, rel=1e-12)
        steps = flow_schedule(ours, num_steps, dynamic_shift(ours.config, tokens), unshifted)
        assert [s.sigma for s in steps] == theirs.sigmas[:-1].tolist()
        assert steps[-1].sigma == pytest.approx(0.02, rel=1e-5)


def test_scales_that_the_pipeline_would_ignore_are_refused(backbone):
    with pytest.raises(UserError, match=says("sampler.guidance_scale", 0.5, "Qwen-Image", 1)):
        backbone.encode(PROMPTS, guidance_scale=0.5)
    with pytest.raises(UserError, match=says("sampler.true_cfg_scale", 4.0, "sampler.guidance_scale")):
        backbone.encode(PROMPTS, true_cfg_scale=4.0)


def test_pictures_beyond_the_range_keep_their_gradient(folder):
    """diffusers' `decode` clamps to the range, and the gradient outside would be lost."""
    backbone = load_backbone(folder, height=SIZE, width=SIZE, dtype=torch.float64)
    backbone.pipeline.vae.decoder.conv_out.bias.add_(3.0)
    x = torch.randn(1, *backbone.latent_shape, dtype=torch.float64, requires_grad=True)
    images = backbone.decode(x)
    assert (images > 1).all()
    assert torch.autograd.grad(images.sum(), x)[0].abs().min() > 0


@pytest.mark.parametrize("network", ["decoder", "decoder-strips"])
def test_recomputed_decoders_give_the_same(folder, network):
    pictures, slopes = [], []
    for networks in ([], [network]):
        backbone = load_backbone(folder, height=24, width=40)
        backbone.recompute(networks)
        x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        images = backbone.decode(x)
        pictures.append(images.detach())
        slopes.append(torch.autograd.grad(images.square().sum(), x)[0])
    for both in (pictures, slopes):
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "keys", "words"),
    [
        ("transformer/config.json", {"guidance_embeds": True}, ("guidance_embeds", True, False)),
        ("transformer/config.json", {"zero_cond_t": True}, ("zero_cond_t",)),
        ("transformer/config.json", {"use_layer3d_rope": True}, ("use_layer3d_rope",)),
        ("transformer/config.json", {"axes_dims_rope": [4, 4, 4]}, ("axes_dims_rope", "attention_head_dim", 8)),
        ("vae/config.json", {"input_channels": 4}, ("input_channels", 4, 3)),
        ("vae/config.json", {"latents_std": None}, ("latents_mean", "latents_std")),
        ("vae/config.json", {"latents_mean": None, "latents_std": None}, ("latents_mean", 4)),
        ("vae/config.json", {"latents_mean": [0.0] * 3}, ("latents_mean", 3, 4)),
        ("vae/config.json", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, ("latents_std", 0)),
    ],
)
def test_configs_that_another_pipeline_has_are_refused(tmp_path, file, keys, words):
    folder = tiny_qwen_image(tmp_path / "pipeline")
    change(folder / file, **keys)
    with pytest.raises(UserError, match=says(*words)):
        load_backbone(folder, height=SIZE, width=SIZE, text=False, networks=False)


def test_another_familys_folder_is_refused(tmp_path):
    folder = tiny_qwen_image(tmp_path / "pipeline")
    change(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    with pytest.raises(UserError, match=says("AutoencoderKL", "AutoencoderKLQwenImage")):
        load_backbone(folder)
    change(folder / "model_index.json", _class_name="QwenImageEditPipeline")
    with pytest.raises(UserError, match=says("QwenImageEditPipeline", "QwenImagePipeline")):
        load_backbone(folder)


def test_without_its_text_encoder_no_prompt_is_encoded(folder):
    backbone = load_backbone(folder, height=SIZE, width=SIZE, text=False)
    with pytest.raises(UserError, match=says("prompts", "text_encoder")):
        backbone.encode(["one"])


def test_distilled_versions_are_said(tmp_path, backbone):
    assert not backbone.training_notes
    folder = tiny_qwen_image(tmp_path / "pipeline")
    (note,) = load_backbone(folder.rename(tmp_path / "Qwen-Image-Lightning"), text=False).training_notes
    assert says("distilled", "lightning", "trained").search(note)
    folder = tiny_qwen_image(tmp_path / "pipeline")
    shift = math.log(3)
    change(folder / "scheduler/scheduler_config.json", base_shift=shift, max_shift=shift, shift_terminal=None)
    (note,) = load_backbone(folder, text=False).training_notes
    assert says("distilled", 1.099).search(note)


def test_which_hub_ids_are_known():
    for known in ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"):
        assert published_pipeline(known)[0].name == "Qwen-Image"
    for other in ("Qwen/Qwen-Image-Edit-2511", "Qwen/Qwen-Image-Layered", "Qwen/Qwen-Image-2.1"):
        assert published_pipeline(other) is None


def test_both_lora_files_give_our_pictures_in_plain_diffusers(folder, backbone, tmp_path):
    """Diffusers' and kohya's, in musubi-tuner's names, with adapters on every kind of layer of the blocks."""
    adapted, noise = load_backbone(folder, height=SIZE, width=SIZE), noise_source(2)
    targets = ("to_q", "add_k_proj", "to_out.0", "to_add_out", "net.0.proj", "net.2", "img_mod.1", "txt_mod.1")
    settings = LoRASettings(rank=2, alpha=5.0, targets=targets)
    add_lora(adapted, settings)
    with torch.no_grad():
        for i, parameter in enumerate(adapted.trainable_parameters.values()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    conditioning = adapted.encode(PROMPTS[:2], "ugly", guidance_scale=4.0)
    ours = sampled(adapted, conditioning, noise)
    assert (ours - sampled(backbone, conditioning, noise)).abs().max() > 1e-2
    save_lora(adapted, tmp_path, settings)
    save_kohya(adapted, tmp_path, settings, "base")
    with safe_open(tmp_path / KOHYA_FILE, "pt") as opened:
        assert opened.metadata()["ss_base_model_version"] == "qwen_image"
        assert all(name.startswith("lora_unet_transformer_blocks_") for name in opened.keys())
    for file in (LORA_FILE, KOHYA_FILE):
        pipeline = plain(folder)
        pipeline.load_lora_weights(tmp_path, weight_name=file)
        theirs = pipeline(
            list(PROMPTS[:2]),
            negative_prompt=["ugly"] * 2,
            true_cfg_scale=4.0,
            num_inference_steps=STEPS,
            latents=adapted.initial_latents(noise),
            height=SIZE,
            width=SIZE,
            output_type="pt",
        ).images
        assert (ours - theirs).abs().max() < 1e-4, file


def test_adapters_reach_both_streams_and_text_stays_half_as_wide_as_it_is(tmp_path):
    backbone = make_backbone("qwen", tmp_path, dtype=torch.bfloat16)
    names = backbone.trainable_parameters
    for layer in ("to_q", "add_k_proj", "to_out.0", "to_add_out"):
        assert any(name.startswith(f"transformer_blocks.1.attn.{layer}") for name in names), layer
    branch = backbone.encode(PROMPTS[:2]).positive
    assert branch["encoder_hidden_states"].dtype == torch.bfloat16 and branch[LENGTHS].dtype == torch.int64
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImagePipeline"
