"""What ships: it loads with plain diffusers and transformers, is what build.json says, and its fair proxy is fair."""

import json

import pytest
import torch
from builders.messages import says
from diffusers import StableDiffusion3Pipeline
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from rsaft_fast.playground import (
    ASSETS,
    REWARDS,
    eval_prompts,
    pipeline_path,
    reward_path,
    train_prompts,
    true_preference,
)
from rsaft_fast.playground.build.denoiser import load
from rsaft_fast.playground.build.finetune import gradient_cosine
from rsaft_fast.playground.build.generator import Sampler
from rsaft_fast.playground.build.record import hashes
from rsaft_fast.playground.build.reward import ClipReward
from rsaft_fast.playground.build.settings import Settings


@pytest.fixture(scope="module")
def record():
    return json.loads((ASSETS / "build.json").read_text())


@pytest.fixture(scope="module")
def sampler():
    return Sampler(load(pipeline_path()), Settings().admission.plain.sampler_steps)


def test_size_and_hashes(record):
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12e6
    assert record["files"] == hashes(ASSETS)
    assert set(record["stages"]) == {"vae", "denoiser", "guidance", "proxies", "admission"}


def test_settings_are_those_recorded(record):
    from dataclasses import asdict

    assert record["settings"] == json.loads(json.dumps(asdict(Settings())))


def test_plain_diffusers_draws_the_same_images_as_our_sampler(sampler):
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_path())
    pipeline.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    prompts = eval_prompts()[:4]
    theirs = pipeline(
        prompts,
        num_inference_steps=len(sampler.sigmas) - 1,
        guidance_scale=1.0,
        max_sequence_length=pipeline.tokenizer_3.model_max_length,
        latents=sampler.noise(4, seed=0),
        output_type="pt",
    ).images
    assert theirs.shape == (4, 3, 32, 32)
    torch.testing.assert_close(theirs, sampler.sample(prompts, seed=0), rtol=0, atol=1e-4)


def test_samples_show_their_prompts(sampler):
    """r* of samples lies well above that of the same samples under one another's prompts."""
    prompts = eval_prompts()
    images = sampler.sample(prompts, seed=7)
    own, other = true_preference(images, prompts), true_preference(images, prompts[1:] + prompts[:1])
    assert own.mean() > other.mean() + 0.1


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_load_with_plain_transformers(name):
    folder = reward_path(name)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32 and len(AutoTokenizer.from_pretrained(folder)) > 26
    ours, prompts = ClipReward.load(folder), eval_prompts()[:3]
    images = (torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 255).round() / 255
    inputs = processor(
        text=prompts,
        images=list((images * 255).byte()),
        return_tensors="pt",
        padding="max_length",
        max_length=model.config.text_config.max_position_embeddings,
    )
    with torch.no_grad():
        theirs = model(**inputs).logits_per_image.diagonal()
        torch.testing.assert_close(ours.score(images, ours.embed_text(prompts)), theirs, rtol=0, atol=1e-4)


def test_an_unknown_reward_is_refused_by_name():
    with pytest.raises(ValueError, match=says("'honest'", "fair, brittle")):
        reward_path("honest")


def test_the_fair_proxy_was_admitted_and_the_brittle_was_not(record):
    verdicts = record["stages"]["admission"]["results"]
    fair, brittle = verdicts["fair"], verdicts["brittle"]
    assert fair["admitted"] and fair["plain"]["rises"] and fair["plain"]["falls"]
    assert fair["plain"]["peak"] > fair["plain"]["start"] and fair["plain"]["peak"] > fair["plain"]["end"]
    assert not brittle["admitted"]
    for verdict in (fair, brittle):  # the proxy itself went on rising: the fall of r* is reward hacking
        assert verdict["plain"]["proxy"][1] > verdict["plain"]["proxy"][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", REWARDS)
def test_the_recorded_gradient_cosine_is_that_of_the_shipped_files(record, sampler, name):
    own = Settings().admission
    prompts = train_prompts()[: own.gradient_prompts]
    cosine = gradient_cosine(sampler, ClipReward.load(reward_path(name)), prompts, own.gradient_seed)
    assert cosine == pytest.approx(record["stages"]["admission"]["results"][name]["gradient_cosine"], abs=0.02)
    assert (cosine >= own.least_cosine) == (name == "fair")
