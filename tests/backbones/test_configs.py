"""Keys of a stranger's configs that change pictures: applied as diffusers' pipelines do, or said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from builders.backbones import FAMILIES, SIZE
from builders.damages import change, retensor, sharded, weight_file
from builders.messages import says
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from rsaft_fast.backbones import adapter_for, load_backbone
from rsaft_fast.errors import UserError


def load(folder, **options):
    return load_backbone(folder, height=SIZE, width=SIZE, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_honest_folder_has_nothing_to_say(originals, family):
    assert load(originals[family]).notes == ()


def test_means_and_spreads_of_latents_are_applied_as_sdxls_pipeline_does(copy):
    folder = copy("sdxl")
    change(folder / "vae/config.json", latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.5, 2.0, 0.8])
    backbone = load(folder)
    theirs = StableDiffusionXLPipeline.from_pretrained(folder)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    # With no steps the pipeline decodes what it was given, times the first sigma of its scheduler.
    theirs.scheduler.set_timesteps(1)
    captured = {}
    decode = theirs.vae.decode
    theirs.vae.decode = lambda latents, **options: (
        captured.setdefault("latents", latents) is None or decode(latents, **options)
    )
    step = lambda *args, **options: (x,)  # noqa: E731
    theirs.scheduler.step = step
    theirs(["a", "b"], num_inference_steps=1, height=SIZE, width=SIZE, guidance_scale=1.0, output_type="pt")
    seen = {}
    ours = backbone.pipeline.vae.decode
    backbone.pipeline.vae.decode = lambda latents, **options: (
        seen.setdefault("latents", latents) is None or ours(latents, **options)
    )
    with torch.no_grad():
        images = backbone.decode(x)
    assert torch.allclose(seen["latents"], captured["latents"], rtol=0, atol=1e-6)
    plain = load(folder)
    plain.pipeline.vae.register_to_config(latents_mean=None, latents_std=None)
    assert not torch.allclose(plain.decode(x), images, atol=1e-3)
    # And back: what the VAE says of a picture, through the config's numbers.
    pictures = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.3, -0.2, 0.1, 0.5]).view(4, 1, 1), torch.tensor([1.5, 0.5, 2.0, 0.8]).view(4, 1, 1)
    whole = plain.encode_images(pictures) / plain.pipeline.vae.config.scaling_factor
    expected = (whole - mean) * plain.pipeline.vae.config.scaling_factor / std
    assert torch.allclose(backbone.encode_images(pictures), expected, atol=1e-6)


@pytest.mark.parametrize(
    "family, file, keys, words",
    [
        ("sd15", "unet/config.json", {"no_such_key": 3}, ["unet/config.json", "no_such_key"]),
        ("sd15", "vae/config.json", {"latent_bias": 0.1}, ["vae/config.json", "latent_bias"]),
        ("flux", "transformer/config.json", {"no_such_key": True}, ["no_such_key"]),
        ("sdxl", "scheduler/scheduler_config.json", {"use_karras_sigmas": True}, ["use_karras_sigmas", "DDIM"]),
        ("sdxl", "scheduler/scheduler_config.json", {"no_such_key": 1}, ["no_such_key"]),
        ("sd15", "model_index.json", {"clip_skip": 2}, ["clip_skip"]),
    ],
)
def test_keys_that_nobody_reads_are_said(copy, family, file, keys, words):
    folder = copy(family)
    change(folder / file, **keys)
    (note,) = load(folder, networks=False, text=False).notes
    assert all(word in note for word in words), note


def test_keys_of_other_samplers_are_no_news(copy):
    folder = copy("sdxl")
    keys = {"algorithm_type": "dpmsolver++", "solver_order": 2, "lambda_min_clipped": -float("inf"), "no": None}
    change(folder / "scheduler/scheduler_config.json", **keys)
    assert load(folder, networks=False, text=False).notes == ()


def test_clipping_that_the_named_scheduler_does_not_know_is_not_in_effect(copy):
    folder = copy("sdxl")
    change(folder / "scheduler/scheduler_config.json", clip_sample=True, thresholding=True)
    assert len(load(folder, networks=False, text=False).schedule(4)) == 4
    change(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(UserError, match="clip_sample=False"):
        load(folder, networks=False, text=False).schedule(4)


def test_the_size_of_a_pair_is_its_side(copy):
    folder = copy("sd15")
    change(folder / "unet/config.json", sample_size=[16, 16])
    assert load_backbone(folder, networks=False, text=False).height == 32
    change(folder / "unet/config.json", sample_size=None)
    assert load(folder, networks=False, text=False).height == SIZE


@pytest.mark.parametrize("family, part", [("sd15", "text_encoder"), ("sd3", "text_encoder_3"), ("flux", "vae")])
def test_a_network_is_never_completed_with_drawn_weights(copy, family, part):
    folder = copy(family)
    retensor(weight_file(folder, part), "key missing")
    with pytest.raises(UserError, match=says(f"{part}/config.json", 2 if family == "sd3" else 1, "lacks", ".weight")):
        load(folder)


@pytest.mark.parametrize("shards", [False, True])
def test_the_one_variant_there_is_is_taken_and_said(copy, originals, shards):
    folder = copy("sd15")
    for part in ("unet", "vae", "text_encoder"):
        file = weight_file(folder, part)
        if shards and part == "unet":
            keys = dict.fromkeys(load_file(file), "diffusion_pytorch_model-00001-of-00001.fp16.safetensors")
            sharded(folder / part, keys)
            (folder / part / "diffusion_pytorch_model-00001-of-00001.safetensors").rename(
                folder / part / "diffusion_pytorch_model-00001-of-00001.fp16.safetensors"
            )
            index = "diffusion_pytorch_model.safetensors.index.json"
            (folder / part / index).rename(folder / part / index.replace("index", "index.fp16"))
        else:
            file.rename(file.with_suffix(".fp16.safetensors"))
    backbone = load(folder)
    assert [note for part in ("unet", "vae", "text_encoder") for note in backbone.notes if f"/{part} " in note]
    assert len(backbone.notes) == 3 and all("fp16" in note for note in backbone.notes)
    plain = load(originals["sd15"]).denoiser.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in backbone.denoiser.state_dict().items())


def test_several_variants_are_named_and_the_plain_file_comes_first(copy):
    folder = copy("sd15")
    file = weight_file(folder, "unet")
    for variant in ("fp16", "non_ema"):
        save_file({"odd": torch.ones(1)}, file.with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
    assert load(folder).notes == ()
    file.unlink()
    with pytest.raises(UserError, match=says(".fp16.safetensors", ".non_ema.safetensors")):
        load(folder)


def test_only_code_of_diffusers_and_transformers_runs(copy, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('a stranger ran')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("unet", "safety_checker", "nothing_of_this_pipeline"):
        folder = copy("sd15")
        change(folder / "model_index.json", **{name: ["stranger", "UNet2DConditionModel"]})
        with pytest.raises(UserError, match=says("model_index.json", name, "'stranger'")):
            adapter_for(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "family, usual", [("sd15", (50, 7.5)), ("sdxl", (50, 5.0)), ("sd3", (28, 7.0)), ("flux", (28, 3.5))]
)
def test_usual_sampling_and_limits_of_text(originals, family, usual):
    backbone = load(originals[family], networks=False)
    assert backbone.usual_sampling == usual
    limits = backbone.text_limits
    long = "x" * 60 + " " + "y" * 20  # a byte a token, start and end
    notes = backbone.cut_prompts(["short", long, long])
    assert len(notes) == sum(limit < 82 for limit in limits.values())
    assert all("1 of 2" in note and "xxx" in note for note in notes)
    # Cut where the encoder cuts: what comes after the limit changes nothing, what comes before it does.
    if family == "sd15":
        ours = [backbone.embed(["x" * count])["encoder_hidden_states"] for count in (74, 75, 76, 77)]
        assert limits == {"text_encoder": 77}
        assert not torch.equal(ours[0], ours[1]) and torch.equal(ours[2], ours[3])
        assert backbone.cut_prompts(["x" * 75]) == [] and len(backbone.cut_prompts(["x" * 76])) == 1


def test_a_single_file_is_told_how_it_becomes_a_folder(tmp_path):
    for suffix in ("safetensors", "ckpt"):
        file = tmp_path / f"civitai.{suffix}"
        file.write_bytes(b"x")
        with pytest.raises(UserError, match=says("from_single_file", "save_pretrained")):
            adapter_for(file)


def test_a_config_in_two_bytes_a_character_or_with_a_mark_reads_or_is_named(copy):
    folder = copy("sd15")
    index = folder / "model_index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert json.loads(index.read_text("utf-8-sig"))
    assert load(folder, networks=False, text=False).notes == ()
