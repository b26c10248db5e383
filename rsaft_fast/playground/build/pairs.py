"""Pairs of images of one prompt, compared by r*: what proxy rewards learn from and are examined on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from rsaft_fast.playground import scenes, true_preference
from rsaft_fast.playground.build.data import pale
from rsaft_fast.playground.build.generator import Sampler

CHUNK = 64


@dataclass(frozen=True)
class Pairs:
    """Two images for each prompt and how much r* prefers the first."""

    first: Tensor  # (P, 3, 32, 32)
    second: Tensor
    margin: Tensor  # (P,) difference of r*
    prompts: list[str]


def make_pairs(n: int, seed: int, generators: list[Sampler] | None) -> Pairs:
    """Make pairs of right and wrong scenes.

    With `generators` they are of different quality: renders, spoilt renders, samples. Without, all are exact renders:
    such pairs say what a scene must show, but not how.
    """
    rng = random.Random(seed)
    drawn = [scenes.sample(rng) for _ in range(n)]
    prompts = [scene.prompt for scene in drawn]
    first, second = (_images(drawn, rng, generators) for _ in range(2))
    return compared(first, second, prompts)


def sampled_pairs(n: int, seed: int, generator: Sampler) -> Pairs:
    """Make pairs of two samples of the generator."""
    rng = random.Random(seed)
    prompts = [scenes.sample_constraints(rng).prompt for _ in range(n)]
    first, second = (generator.sample(prompts, seed=rng.getrandbits(32)) for _ in range(2))
    return compared(first, second, prompts)


def compared(first: Tensor, second: Tensor, prompts: list[str]) -> Pairs:
    """Make pairs of images (P, 3, 32, 32), labelled by r*."""
    return Pairs(first, second, preference(first, prompts) - preference(second, prompts), prompts)


def joined(sets: Sequence[Pairs]) -> Pairs:
    """Put sets of pairs one after the other."""
    first, second, margin = (torch.cat([getattr(s, name) for s in sets]) for name in ("first", "second", "margin"))
    return Pairs(first, second, margin, [prompt for s in sets for prompt in s.prompts])


@torch.no_grad()
def preference(images: Tensor, prompts: list[str]) -> Tensor:
    """Compute r* (B,) of images for prompts, in parts."""
    parts = range(0, len(images), CHUNK)
    return torch.cat([true_preference(images[i : i + CHUNK], prompts[i : i + CHUNK]) for i in parts])


def preference_gradient(images: Tensor, prompts: list[str]) -> Tensor:
    """Compute ∇r* with respect to each image."""
    gradients = []
    for i in range(0, len(images), CHUNK):
        pixels = images[i : i + CHUNK].clone().requires_grad_(True)
        total = true_preference(pixels, prompts[i : i + CHUNK]).sum()
        gradients.append(torch.autograd.grad(total, pixels)[0])
    return torch.cat(gradients)


def match_set(n: int, seed: int, generator: Sampler) -> tuple[Tensor, Tensor, list[str]]:
    """Make samples of the generator, ∇r* at them, and their prompts."""
    rng = random.Random(seed)
    prompts = [scenes.sample_constraints(rng).prompt for _ in range(n)]
    images = generator.sample(prompts, seed)
    return images, preference_gradient(images, prompts), prompts


def _images(drawn: list[scenes.Scene], rng: random.Random, generators: list[Sampler] | None) -> Tensor:
    n = len(drawn)
    shown = [scene if rng.random() < 0.7 else altered(scene, rng) for scene in drawn]
    images = scenes.render(shown)
    if generators is None:
        return images
    noise = torch.Generator().manual_seed(rng.getrandbits(32))
    source = torch.tensor([rng.randrange(4 + len(generators)) for _ in range(n)])
    rows = [(source == kind).nonzero()[:, 0] for kind in range(4 + len(generators))]
    images[rows[0]] = _varied_contrast(images[rows[0]], rng)
    images[rows[1]] = _blurred(images[rows[1]], rng)
    strength = torch.rand(len(rows[2]), 1, 1, 1, generator=noise) * 0.15
    images[rows[2]] += strength * torch.randn(images[rows[2]].shape, generator=noise)
    for generator, chosen in zip(generators, rows[4:]):
        images[chosen] = generator.sample([shown[i].prompt for i in chosen], seed=rng.getrandbits(32))
    return images.clamp(0, 1)


def altered(scene: scenes.Scene, rng: random.Random) -> scenes.Scene:
    """Change a scene so that it breaks the prompt in one respect: a colour, a shape, the relation or the count."""
    nouns, relation = list(scene.constraints.nouns), scene.constraints.relation
    respect = rng.choice(("colour", "shape", "structure"))
    if respect == "structure" and relation:
        relation = rng.choice([other for other in scenes.RELATIONS if other != relation])
    elif respect == "structure":
        count = rng.choice([c for c in (1, 2, 3, 4) if c != len(nouns)])
        nouns = [scenes.Noun(nouns[0].colour, nouns[0].shape)] * count
    else:
        used = [noun.colour for noun in nouns]
        colour = rng.choice([c for c in scenes.COLOURS if c not in used]) if respect == "colour" else used[0]
        shape = rng.choice([s for s in scenes.SHAPES if s != nouns[0].shape]) if respect == "shape" else nouns[0].shape
        changed = scenes.Noun(colour, shape, nouns[0].size)
        nouns = [changed, *nouns[1:]] if relation else [changed] * len(nouns)
    return scenes.realise(scenes.Constraints(tuple(nouns), relation), rng)


def _varied_contrast(images: Tensor, rng: random.Random) -> Tensor:
    return pale(images, torch.tensor([rng.uniform(0.4, 1.6) for _ in images]), grey=0.5)


def _blurred(images: Tensor, rng: random.Random) -> Tensor:
    if not len(images):
        return images
    width = torch.tensor([rng.uniform(0.4, 1.5) for _ in images])
    kernel = torch.exp(-torch.arange(-4.0, 5.0).square() / (2 * width[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, dim=0)
    padded = pad(images, (4, 4, 4, 4), mode="replicate").reshape(1, -1, *(side + 8 for side in images.shape[2:]))
    rows = conv2d(padded, kernel[:, None, :, None], groups=len(kernel))
    return conv2d(rows, kernel[:, None, None, :], groups=len(kernel)).reshape(images.shape)
