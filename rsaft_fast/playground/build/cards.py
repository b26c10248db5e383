"""A proxy reward's card: how far it agrees with r*, and how sharp it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rsaft_fast.playground import eval_prompts, train_prompts, true_preference
from rsaft_fast.playground.build.attack import unit
from rsaft_fast.playground.build.generator import Sampler
from rsaft_fast.playground.build.pairs import Pairs, make_pairs, preference_gradient, sampled_pairs
from rsaft_fast.playground.build.proxies import generators, pair_accuracy
from rsaft_fast.playground.build.reward import ClipReward
from rsaft_fast.playground.build.settings import Settings


@dataclass(frozen=True)
class Questions:
    """What every proxy is asked, and r*'s answers."""

    pairs: dict[str, Pairs]  # by kind
    images: Tensor  # (N, 3, 32, 32) samples of the pipeline
    prompts: list[str]
    gradient: Tensor  # ∇r* at the images
    generator: Sampler
    latents: Tensor  # before the last call, of the samples at which the parameter gradients are taken; their prompts
    words: list[str]
    parameter_gradient: Tensor  # of the mean r*
    radii: tuple[float, ...]


def questions(settings: Settings, assets: Path) -> Questions:
    """Draw what the proxies are examined on, from the pipeline in `assets`."""
    own, sources = settings.examination, generators(settings, assets)
    generator, prompts = sources[0], eval_prompts(own.pictures)
    pairs = {
        "exact": make_pairs(own.pairs, own.seed, None),
        "mixed": make_pairs(own.pairs, own.seed + 1, sources),
        "samples": sampled_pairs(own.pairs, own.seed + 2, generator),
    }
    images = generator.sample(prompts, own.seed)
    words = train_prompts()[: own.gradient_pictures]
    latents = generator.before_last(generator.noise(len(words), own.seed), generator.encode(words))
    truth = generator.parameter_gradient(lambda x: true_preference(x, words), latents, words)
    return Questions(
        pairs, images, prompts, preference_gradient(images, prompts), generator, latents, words, truth, own.radii
    )


def examine(reward: ClipReward, asked: Questions) -> dict[str, Any]:
    """Measure a proxy's card.

    Returns:
        pair_accuracy: by kind of held-out pairs, the share that it orders as r* does.
        gradient_cosine: with ∇r*; "parameters" of DRaFT-1's gradient of the mean over the pictures, "images" the mean
            over single pictures' gradients.
        spread: standard deviation of the reward over pictures.
        s1: by radius, the mean of r(x) − r(x − radius · g / |g|) (arXiv 2603.21175, eq. 10).
    """
    words = reward.embed_text(asked.words)
    parameters = asked.generator.parameter_gradient(lambda x: reward.score(x, words), asked.latents, asked.words)
    words = reward.embed_text(asked.prompts)
    gradient = reward.gradient(asked.images, words)
    with torch.no_grad():
        score = reward.score(asked.images, words)
        lowered = {radius: reward.score(asked.images - radius * unit(gradient), words) for radius in asked.radii}
    agreement = cosine_similarity(gradient.flatten(1), asked.gradient.flatten(1), dim=1).mean()
    return {
        "pair_accuracy": {kind: round(pair_accuracy(reward, pairs), 4) for kind, pairs in asked.pairs.items()},
        "gradient_cosine": {
            "parameters": round(cosine_similarity(parameters, asked.parameter_gradient, dim=0).item(), 4),
            "images": round(agreement.item(), 4),
        },
        "spread": round(score.std().item(), 4),
        "s1": {f"{radius:g}": round((score - low).mean().item(), 4) for radius, low in lowered.items()},
    }


def table(cards: dict[str, dict[str, Any]]) -> str:
    """Write cards by name as a Markdown table; S1 against the spread."""
    first = next(iter(cards.values()))
    heads = [f"pairs, {kind}, %" for kind in first["pair_accuracy"]]
    heads += [f"cosine, {space}" for space in first["gradient_cosine"]]
    heads += ["spread", *(f"S1 at {radius} / spread" for radius in first["s1"])]
    rows = [["proxy", *heads], ["---", *("---:" for _ in heads)]]
    for name, card in cards.items():
        accuracy = [f"{100 * value:.1f}" for value in card["pair_accuracy"].values()]
        agreement = [f"{value:.3f}" for value in card["gradient_cosine"].values()]
        sharpness = [f"{value / card['spread']:.2f}" for value in card["s1"].values()]
        rows.append([f"`{name}`", *accuracy, *agreement, f"{card['spread']:.2f}", *sharpness])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
