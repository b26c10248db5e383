"""What ships: plain diffusers and transformers load it, build.json describes it, and its proxies differ in honesty."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from builders.messages import says
from diffusers import StableDiffusion3Pipeline
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from rsaft_fast.playground import (
    ASSETS,
    REWARDS,
    eval_prompts,
    pipeline_path,
    reward_path,
    true_preference,
)
from rsaft_fast.playground.build import stages
from rsaft_fast.playground.build.cards import examine, questions
from rsaft_fast.playground.build.denoiser import load
from rsaft_fast.playground.build.generator import Sampler
from rsaft_fast.playground.build.record import hashes
from rsaft_fast.playground.build.reward import ClipReward
from rsaft_fast.playground.build.settings import Settings
from rsaft_fast.rewards import RewardSettings, load_reward


@pytest.fixture(scope="module")
def record():
    return json.loads((ASSETS / "build.json").read_text())


@pytest.fixture(scope="module")
def sampler():
    return Sampler(load(pipeline_path()), Settings().sampler_steps[0])


def test_size_and_hashes(record):
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12e6
    assert record["files"] == hashes(ASSETS)
    assert set(record["stages"]) == stages.STAGES.keys()


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


def test_proxies_differ_in_honesty(record):
    """What the names promise, by the cards: whose gradient helps, and who can judge the pipeline's samples."""
    cards = record["stages"]["cards"]["results"]
    cosine = {name: card["gradient_cosine"]["parameters"] for name, card in cards.items()}
    samples = {name: card["pair_accuracy"]["samples"] for name, card in cards.items()}
    assert abs(cosine["brittle"]) < 0.2 < 0.3 < cosine["fair"]
    assert min(samples["fair"], samples["adversarial"]) > samples["brittle"]


def test_the_ensembles_line_of_the_docs_is_one_reward_of_its_members():
    page = (Path(__file__).parents[2] / "docs" / "playground.md").read_text()
    text = re.search(r"```yaml\n(reward:.*?)```", page, re.DOTALL)[1]
    ensemble = load_reward(RewardSettings(**yaml.safe_load(text)["reward"]))
    images, prompts = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)), eval_prompts()[:3]
    images.requires_grad_(True)
    members = [load_reward(RewardSettings(path=f"playground/ensemble-{i}")) for i in range(3)]
    scores = torch.stack([member.score(images, prompts) for member in members])
    expected = scores.mean(0) - scores.std(0, correction=0)
    found = ensemble.score(images, prompts)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(score.sum(), images)[0] for score in (found, expected)]
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_recorded_cards_are_those_of_the_shipped_files(record):
    asked = questions(Settings(), ASSETS)
    for name in ("brittle", "fair"):
        found, recorded = examine(ClipReward.load(reward_path(name)), asked), record["stages"]["cards"]["results"][name]
        for key, values in found.items():
            assert values == pytest.approx(recorded[key], abs=0.02), key
