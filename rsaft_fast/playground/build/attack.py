"""Attacks on a proxy reward: pictures that it likes more than it should, labelled by r*."""

import copy
import random

import torch
from torch import Tensor

from rsaft_fast.playground import scenes
from rsaft_fast.playground.build.generator import Sampler
from rsaft_fast.playground.build.pairs import Pairs, compared
from rsaft_fast.playground.build.reward import ClipReward
from rsaft_fast.playground.build.settings import Attack


def attacked_pairs(reward: ClipReward, generator: Sampler, attack: Attack, rng: random.Random) -> dict[str, Pairs]:
    """Make pairs of what an attack made of a sample, first, and the sample; by the kind of attack."""
    prompts, seed = [scenes.sample_constraints(rng).prompt for _ in range(attack.pictures)], rng.getrandbits(32)
    samples = generator.sample(prompts, seed)
    radius = torch.tensor([rng.uniform(*attack.radius) for _ in prompts])
    tuned = fine_tuned(generator, reward, attack, rng)
    made = {
        "climbed": climbed(reward, samples, prompts, radius, attack.climb_steps),
        "fine-tuned": tuned.sample(prompts, seed),
    }
    return {kind: compared(images, samples, prompts) for kind, images in made.items()}


def climbed(reward: ClipReward, images: Tensor, prompts: list[str], radius: Tensor, steps: int) -> Tensor:
    """Climb the reward from images (B, 3, H, W) in [0, 1], each within its `radius` (B,): projected gradient ascent."""
    words, radius = reward.embed_text(prompts), radius[:, None, None, None]
    moved = images
    for _ in range(steps):
        delta = moved - images + 2.5 / steps * radius * unit(reward.gradient(moved, words))
        length = delta.flatten(1).norm(dim=1)[:, None, None, None]
        moved = (images + delta * (radius / length.clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)
    return moved


def unit(gradient: Tensor) -> Tensor:
    """Scale each image's gradient (B, 3, H, W) to length 1."""
    return gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]


def fine_tuned(generator: Sampler, reward: ClipReward, attack: Attack, rng: random.Random) -> Sampler:
    """Fine-tune a copy of the denoiser on the reward by plain DRaFT-1."""
    tuned = copy.copy(generator)
    tuned.pipeline = copy.copy(generator.pipeline)
    tuned.pipeline.transformer = copy.deepcopy(generator.transformer).requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned.transformer.parameters(), lr=attack.lr, weight_decay=0.0)
    for _ in range(attack.updates):
        prompts = [scenes.sample_constraints(rng).prompt for _ in range(attack.batch)]
        images = tuned.images(tuned.noise(attack.batch, rng.getrandbits(32)), tuned.encode(prompts))
        (-reward.score(images, reward.embed_text(prompts)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.transformer.requires_grad_(False)
    return tuned
