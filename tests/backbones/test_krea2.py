"""What Krea-2 has that the others have not: layers of a text encoder side by side, norms in fp32."""

import math
import re
import shutil

import numpy as np
import pytest
import torch
from builders.backbones import PROMPTS, SIZE, make_backbone, noise_source
from builders.damages import change
from builders.messages import says
from builders.pipelines import tiny_krea2
from builders.recipes import config
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel
from diffusers.loaders import lora_conversion_utils as theirs
from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift, retrieve_timesteps
from numpy import linspace
from safetensors import safe_open
from safetensors.torch import load_file
from sampling.test_adjoint import check_against_autograd

from rsaft_fast.backbones import LoRASettings, add_lora, load_backbone, random_backbone, save_lora
from rsaft_fast.backbones.flow import dynamic_shift
from rsaft_fast.backbones.krea2 import MOST_TEXT
from rsaft_fast.backbones.lora_files import load_lora
from rsaft_fast.backbones.lora_formats import KOHYA_FILE, kohya_places, save_kohya
from rsaft_fast.backbones.published import published_pipeline
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.data.text_files import TextFiles
from rsaft_fast.errors import UserError
from rsaft_fast.memory import checkpoint_denoiser
from rsaft_fast.methods import DRaFT
from rsaft_fast.recipe.check import check_model
from rsaft_fast.recipe.config import SamplerSettings
from rsaft_fast.sampling import rollout
from rsaft_fast.sampling.branches import LENGTHS
from rsaft_fast.sampling.protocol import LORA_FILE

STEPS = 3
SCHEDULER = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400)
LONG = "z1 " * 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_krea2(tmp_path_factory.mktemp("krea") / "pipeline")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, height=SIZE, width=SIZE)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "pipeline")


def plain(folder, **options):
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(backbone, conditioning, noise):
    plan = DRaFT().draw(STEPS, None)
    with torch.no_grad():
        end = rollout(backbone, backbone.schedule(STEPS), plan, backbone.initial_latents(noise), conditioning, noise)
        return backbone.decode(end.endpoints[0]).clamp(0, 1)


def pictures(pipeline, backbone, noise, prompts, negative, g):
    return pipeline(
        list(prompts),
        negative_prompt=None if negative is None else [negative] * len(prompts),
        guidance_scale=g,
        num_inference_steps=STEPS,
        latents=backbone.initial_latents(noise),
        height=backbone.height,
        width=backbone.width,
        output_type="pt",
    ).images


@pytest.mark.parametrize(
    ("prompts", "w", "negative", "size"),
    [
        (PROMPTS[:3], 1.0, None, (24, 40)),
        (PROMPTS[:3], 5.5, None, (40, 24)),
        (("one", LONG), 2.5, "ugly", (16, 16)),
    ],
)
def test_pictures_are_the_pipelines_whatever_the_lengths(folder, prompts, w, negative, size):
    """The pipeline pads every prompt to 512 tokens; here each has its own. What it calls guidance is w - 1."""
    backbone, noise = load_backbone(folder, height=size[0], width=size[1]), noise_source(len(prompts))
    conditioning = backbone.encode(prompts, negative, guidance_scale=w)
    assert (conditioning.negative is None) == (w == 1)
    assert len(set(conditioning.positive[LENGTHS].tolist())) > 1
    images = sampled(backbone, conditioning, noise)
    truth = pictures(plain(folder), backbone, noise, prompts, negative, w - 1)
    assert images.shape == truth.shape and truth.std() > 0.05
    assert (images - truth).abs().max() < 1e-4


def test_guidance_that_the_pipeline_would_not_make_is_refused(backbone):
    with pytest.raises(UserError, match=says("sampler.guidance_scale", 0.5, -0.5, "set it to 1")):
        backbone.encode(["one"], guidance_scale=0.5)


def test_a_picture_depends_on_the_prompt_on_guidance_and_on_what_it_leads_away_from(backbone):
    noise, given = noise_source(1), [(PROMPTS[0], None, 1.0), (PROMPTS[1], None, 1.0), (PROMPTS[0], None, 5.5)]
    given.append((PROMPTS[0], "ugly", 5.5))
    drawn = [sampled(backbone, backbone.encode([p], n, guidance_scale=w), noise) for p, n, w in given]
    for i, image in enumerate(drawn):
        assert all((image - other).abs().max() > 1e-3 for other in drawn[:i])


def test_text_is_the_layers_that_the_index_names_without_the_template_before_them(folder, backbone):
    pipeline, prompts = plain(folder), [*PROMPTS, LONG]
    assert pipeline.text_encoder_select_layers == (0, 1, 3)
    assert len(pipeline.tokenizer(pipeline.prompt_template_encode_prefix)["input_ids"]) == 34
    assert len(pipeline.tokenizer(pipeline.prompt_template_encode_suffix)["input_ids"]) == 5
    found, mask = pipeline.encode_prompt(prompts)
    ours = backbone.embed_text(prompts)
    assert ours[LENGTHS].tolist() == mask.sum(1).tolist() and ours[LENGTHS].max() == MOST_TEXT == found.shape[1]
    for row, kept, length, expected in zip(ours["encoder_hidden_states"], mask, ours[LENGTHS], found, strict=True):
        torch.testing.assert_close(row[:length], expected[kept].flatten(1), rtol=1e-5, atol=1e-6)
        assert not row[length:].any()


def test_prompts_that_are_cut_are_named(backbone):
    fits = "x" * (MOST_TEXT - 5)
    assert backbone.cut_prompts([fits, *PROMPTS]) == [] and backbone.embed_text([fits])[LENGTHS].tolist() == [512]
    (note,) = backbone.cut_prompts([fits, fits + "x"])
    assert says("text_encoder", MOST_TEXT - 5, "1 of 2", MOST_TEXT - 4).search(note)


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


def test_both_branches_in_one_call_give_the_same_and_rows_are_picked_whole(backbone, monkeypatch):
    settings = SamplerSettings(guidance_scale=3.0, negative_prompt="x")
    encoded, noise = EncodedPrompts.encode(backbone, PROMPTS, settings), noise_source(4)
    separate = sampled(backbone, encoded(PROMPTS), noise)
    monkeypatch.setattr(backbone, "cfg_batching", "batched")
    torch.testing.assert_close(sampled(backbone, encoded(PROMPTS), noise), separate, rtol=1e-4, atol=1e-5)
    row = encoded(PROMPTS).select([3])
    assert row.positive["encoder_hidden_states"].shape[1] == row.positive[LENGTHS].item()


def test_a_kernel_without_masks_is_for_one_branch_of_one_prompt(tiny, out):
    speed = {"data__batch_size": 1, "speed": {"attention": "flash", "cfg": "batched"}}
    check_model(config(tiny, out, "krea", sampler__guidance_scale=1.0, **speed), None)
    with pytest.raises(UserError, match=says("speed.attention", "mask", "speed.cfg batched")):
        check_model(config(tiny, out, "krea", sampler__guidance_scale=2.0, **speed), None)


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6889])
@pytest.mark.parametrize("distilled", [False, True])
def test_the_schedule_is_the_pipelines_at_real_sizes(tokens, distilled):
    ours = random_backbone("krea-2", height=16, width=16 * tokens, device="meta")
    ours.pipeline.register_to_config(is_distilled=distilled)
    mu = 1.15 if distilled else calculate_shift(tokens, 256, 6400, 0.5, 1.15)
    for num_steps in (1, 8, 28):
        scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        assert ours.shift(num_steps) == pytest.approx(mu, rel=1e-12)
        assert [s.sigma for s in ours.schedule(num_steps)] == scheduler.sigmas[:-1].tolist()


def test_the_distilled_model_is_said_and_draws_by_its_own_shift(tmp_path, backbone):
    assert not backbone.training_notes and backbone.usual_sampling == (28, 5.5)
    turbo = tiny_krea2(tmp_path / "pipeline", is_distilled=True)
    ours = load_backbone(turbo, height=SIZE, width=SIZE)
    assert says("warning", "distilled", "is_distilled", "trained").search(ours.training_notes[0])
    assert ours.usual_sampling == (8, 1.0)
    noise = noise_source(2)
    truth = pictures(plain(turbo), ours, noise, PROMPTS[:2], None, 0.0)
    assert (sampled(ours, ours.encode(PROMPTS[:2]), noise) - truth).abs().max() < 1e-4
    (note,) = load_backbone(turbo.rename(tmp_path / "Krea-2-Turbo"), text=False).training_notes
    assert says("distilled").search(note)


def test_normalisations_stay_in_fp32_as_in_the_pipeline(folder):
    ours = load_backbone(folder, height=SIZE, width=SIZE, dtype=torch.bfloat16)
    denoiser = plain(folder, torch_dtype=torch.bfloat16).transformer
    dtypes = {name: p.dtype for name, p in denoiser.named_parameters()}
    assert {name: p.dtype for name, p in ours.denoiser.named_parameters()} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert all(torch.equal(p, denoiser.get_parameter(name)) for name, p in ours.denoiser.named_parameters())
    for options in ({"networks": False, "text": False}, {"offload_blocks": 1}, {"quantize": "int8"}):
        other = load_backbone(folder, height=SIZE, width=SIZE, dtype=torch.bfloat16, **options)
        for name, p in other.denoiser.named_parameters():
            assert p.dtype == dtypes[name] or "quantize" in options and not p.is_floating_point(), (options, name)


def test_the_gradient_is_autograds(tmp_path):
    """Every method, all parameters, and guidance off, are tried with the other backbones (sampling/test_adjoint.py)."""
    ours = make_backbone("krea", tmp_path, dtype=torch.float64)
    plan = DRaFT(k=2).draw(4, np.random.default_rng(0))
    conditioning = ours.encode(PROMPTS[:2], "blurry", guidance_scale=3.0)
    check_against_autograd(ours, ours.schedule(4), plan, conditioning, seed=1)


@pytest.mark.parametrize("network", ["decoder", "decoder-strips"])
def test_recomputed_decoders_give_the_same(folder, network):
    found = []
    for networks in ([], [network]):
        ours = load_backbone(folder, height=24, width=40)
        ours.recompute(networks)
        x = torch.randn(2, *ours.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        images = ours.decode(x)
        found.append((images.detach(), torch.autograd.grad(images.square().sum(), x)[0]))
    for both in zip(*found, strict=True):
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_blocks_over_the_text_are_recomputed_too(tmp_path):
    """diffusers leaves them out; of a real model's 512 tokens they would keep more than all blocks' inputs."""
    ours, calls = make_backbone("krea", tmp_path), []
    fusion = [*ours.denoiser.text_fusion.layerwise_blocks, *ours.denoiser.text_fusion.refiner_blocks]
    for block in fusion:
        block.ff.register_forward_pre_hook(lambda *_: calls.append(1))
    x, step = ours.initial_latents(noise_source(2)), ours.schedule(3)[1]
    branch, slopes = ours.encode(PROMPTS[:2]).positive, []
    for enabled in (False, True, False):
        checkpoint_denoiser(ours.denoiser, enabled)
        calls.clear()
        out = ours.predict(x, step, branch).square().sum()
        slopes.append(torch.autograd.grad(out, list(ours.trainable_parameters.values())))
        assert len(calls) == (1 + enabled) * len(fusion)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*slopes, strict=True))
    names = [name for name, slope in zip(ours.trainable_parameters, slopes[0]) if slope.any()]
    assert any(name.startswith("text_fusion.layerwise_blocks.0.attn.to_gate") for name in names)
    assert any(name.startswith("transformer_blocks.1.attn.to_out.0") for name in names)


@pytest.mark.parametrize(
    ("file", "keys", "words"),
    [
        ("transformer/config.json", {"axes_dims_rope": [4, 4, 4]}, ("axes_dims_rope", "attention_head_dim", 8)),
        ("vae/config.json", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, ("latents_std", 0)),
        ("model_index.json", {"patch_size": 1}, ("patch_size", 1, 2)),
        ("model_index.json", {"patch_size": "2"}, ("patch_size", "'2'", "int")),
        ("model_index.json", {"is_distilled": "no"}, ("is_distilled", "'no'", "bool")),
        (
            "model_index.json",
            {"text_encoder_select_layers": [0, 1]},
            ("text_encoder_select_layers", "num_text_layers", 3),
        ),
        ("model_index.json", {"text_encoder_select_layers": [0, 1, 4]}, ("text_encoder_select_layers", 4, 3)),
        ("model_index.json", {"text_encoder_select_layers": "all"}, ("text_encoder_select_layers", "'all'")),
        ("model_index.json", {"text_encoder_select_layers": None}, ("text_encoder_select_layers", 35, 3)),
        ("model_index.json", {"vae": [1, 2]}, ("model_index.json", "vae", "library")),
        ("model_index.json", {"text_encoder": ["transformers", "Qwen3VLTextModel"]}, ("text_encoder", "Qwen3VLModel")),
        ("model_index.json", {"tokenizer": ["transformers", "CLIPTokenizer"]}, ("CLIPTokenizer", "Qwen2Tokenizer")),
    ],
)
def test_configs_that_do_not_go_together_are_refused(copied, file, keys, words):
    change(copied / file, **keys)
    with pytest.raises(UserError, match=says(*words)):
        load_backbone(copied, height=SIZE, width=SIZE)


def test_other_layers_of_the_text_encoder_are_other_encodings(folder, copied):
    before = TextFiles(str(folder), None).identity()
    assert TextFiles(str(copied), None).identity() == before
    change(copied / "model_index.json", text_encoder_select_layers=[0, 2, 3])
    assert TextFiles(str(copied), None).identity() != before
    ours = load_backbone(copied, height=SIZE, width=SIZE)
    assert not torch.equal(
        ours.embed_text(["one"])["encoder_hidden_states"],
        load_backbone(folder, height=SIZE, width=SIZE).embed_text(["one"])["encoder_hidden_states"],
    )


def test_which_hub_ids_are_known():
    for known in ("krea/Krea-2-Raw", "krea/Krea-2-Turbo"):
        assert published_pipeline(known)[0].name == "Krea-2"
    for other in ("black-forest-labs/FLUX.1-Krea-dev", "krea/krea-realtime-video"):
        family = published_pipeline(other)
        assert family is None or family[0].name != "Krea-2"


def drawn_adapters(backbone, targets):
    settings = LoRASettings(rank=2, alpha=5.0, targets=targets)
    add_lora(backbone, settings)
    with torch.no_grad():
        for i, parameter in enumerate(backbone.trainable_parameters.values()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return settings


ALL = ("to_q", "to_k", "to_v", "to_gate", "to_out.0", "ff.gate", "ff.up", "ff.down", "projector", "img_in")
ALL += ("txt_in.linear_1", "txt_in.linear_2", "time_embed.linear_1", "time_embed.linear_2", "time_mod_proj")
ALL += ("final_layer.linear",)


@pytest.mark.slow
def test_the_lora_file_gives_our_pictures_in_plain_diffusers_and_here(folder, backbone, tmp_path):
    adapted, noise = load_backbone(folder, height=SIZE, width=SIZE), noise_source(2)
    settings = drawn_adapters(adapted, ALL)
    conditioning = adapted.encode(PROMPTS[:2], "ugly", guidance_scale=5.5)
    ours = sampled(adapted, conditioning, noise)
    assert (ours - sampled(backbone, conditioning, noise)).abs().max() > 1e-2
    save_lora(adapted, tmp_path, settings)
    pipeline = plain(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    assert (ours - pictures(pipeline, adapted, noise, PROMPTS[:2], "ugly", 4.5)).abs().max() < 1e-4
    again = load_backbone(folder, height=SIZE, width=SIZE)
    assert load_lora(again, tmp_path / LORA_FILE) == []
    assert (ours - sampled(again, conditioning, noise)).abs().max() < 1e-4


def test_kohyas_file_has_the_models_own_name_of_every_linear_layer(folder, tmp_path):
    """diffusers reads those names under ComfyUI's prefix, not under kohya's: its table is the judge of ours."""
    adapted = load_backbone(folder, height=SIZE, width=SIZE)
    settings = drawn_adapters(adapted, ALL)
    save_lora(adapted, tmp_path, settings)
    save_kohya(adapted, tmp_path, settings, "base")
    with safe_open(tmp_path / KOHYA_FILE, "pt") as opened:
        assert opened.metadata()["ss_base_model_version"] == "krea2"
        assert opened.metadata()["ss_network_module"] == "networks.lora_krea2"
    linears = [n.removesuffix(".base_layer") for n, m in adapted.denoiser.named_modules() if type(m) is torch.nn.Linear]
    linears = {name for name in linears if "lora_" not in name}
    place, kohya, state = kohya_places(adapted), load_file(tmp_path / KOHYA_FILE), {}
    for layer in linears:
        key = "lora_unet_" + place(layer).name.replace(".", "_")
        scale = kohya[f"{key}.alpha"].item() / 2
        state[f"diffusion_model.{place(layer).name}.lora_A.weight"] = kohya[f"{key}.lora_down.weight"]
        state[f"diffusion_model.{place(layer).name}.lora_B.weight"] = kohya[f"{key}.lora_up.weight"] * scale
    assert len(kohya) == 3 * len(linears)
    expected, found = load_file(tmp_path / LORA_FILE), theirs._convert_non_diffusers_krea2_lora_to_diffusers(state)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], tensor) for name, tensor in expected.items())


def test_a_full_sized_model_has_264_linear_layers_and_each_a_name_of_its_own():
    """As many as musubi-tuner trains."""
    with torch.device("meta"):
        denoiser = Krea2Transformer2DModel()
    linears = [name for name, module in denoiser.named_modules() if type(module) is torch.nn.Linear]
    place = published_pipeline("krea/Krea-2-Raw")[0].kohya_place
    places = {place(name, {}).name for name in linears}
    assert len(places) == len(linears) == 264
    assert all(re.match(r"(blocks|txtfusion|first|last|tmlp|tproj|txtmlp)\b", name) for name in places)
    assert place("rotary_emb", {}) is None


def test_mu_is_linear_in_the_tokens():
    config = FlowMatchEulerDiscreteScheduler(**SCHEDULER).config
    assert dynamic_shift(config, 6400) == pytest.approx(1.15) and math.isclose(dynamic_shift(config, 256), 0.5)
