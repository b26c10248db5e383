"""Proxy rewards: small CLIP models trained to agree with r* on pairs of images of one prompt."""

import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity

from rsaft_fast.playground.build.attack import attacked_pairs
from rsaft_fast.playground.build.denoiser import load
from rsaft_fast.playground.build.generator import Sampler
from rsaft_fast.playground.build.pairs import Pairs, joined, make_pairs, match_set
from rsaft_fast.playground.build.record import Log
from rsaft_fast.playground.build.reward import ClipReward
from rsaft_fast.playground.build.settings import Proxy, Settings

Match = tuple[Tensor, Tensor, list[str]]
"""Images (M, 3, 32, 32), ∇r* there, and their prompts."""


def generators(settings: Settings, assets: Path) -> list[Sampler]:
    """Give the shipped pipeline at the step counts that the pairs are drawn from."""
    pipeline = load(assets / "pipeline")
    return [Sampler(pipeline, steps) for steps in settings.sampler_steps]


def train(own: Proxy, length: int, sources: list[Sampler], log: Log) -> ClipReward:
    """Train a proxy on preferences alone or, as its settings say, on ∇r* as well or against attacks.

    Args:
        length: of prompts, in tokens.
        sources: of samples; attacks start from the first.
    """
    torch.manual_seed(own.seed)
    reward = ClipReward.untrained(own, length)
    pairs = make_pairs(own.pairs, own.seed, sources if own.mixed_quality else None)
    match = match_set(own.match_images, own.seed, sources[0]) if own.match else None
    draw = torch.Generator().manual_seed(own.seed)
    _fit(reward, own, pairs, match, own.steps, draw, log)
    if own.attack:
        sets, rng, fooled = [pairs], random.Random(f"attacks of {own.seed}"), []
        for _ in range(own.attack.rounds):
            found = attacked_pairs(reward, sources[0], own.attack, rng)
            fooled.append({kind: round(1 - pair_accuracy(reward, new), 4) for kind, new in found.items()})
            log.result(fooled=fooled)
            sets += found.values()
            _fit(reward, own, joined(sets), match, own.attack.steps, draw, log)
    reward.model.requires_grad_(False)
    return reward


def _fit(
    reward: ClipReward, own: Proxy, pairs: Pairs, match: Match | None, steps: int, draw: torch.Generator, log: Log
) -> None:
    """Train for `steps`, the learning rate rising and falling once."""
    parameters = list(reward.model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=own.lr, betas=(0.9, 0.98), weight_decay=own.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, own.lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(len(pairs.prompts), (own.batch,), generator=draw)
        words = reward.embed_text([pairs.prompts[i] for i in rows])
        images = torch.cat([pairs.first[rows], pairs.second[rows]])
        better, worse = reward.score(images, torch.cat([words, words])).chunk(2)
        wanted = torch.sigmoid(own.sharpness * pairs.margin[rows])
        loss = preference_loss = binary_cross_entropy_with_logits(better - worse, wanted)
        values = {"preference": preference_loss}
        if match:
            values["match"] = _mismatch(reward, match, draw, own.match_batch)
            loss = loss + own.match * values["match"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.step(step, **values)


def _mismatch(reward: ClipReward, match: Match, draw: torch.Generator, n: int) -> Tensor:
    """Compute the mean of 1 − cos(∇ proxy, ∇ r*) over `n` of the match images."""
    images, wanted, prompts = match
    rows = torch.randint(len(images), (n,), generator=draw)
    pixels = images[rows].clone().requires_grad_(True)
    score = reward.score(pixels, reward.embed_text([prompts[i] for i in rows])).sum()
    gradient = torch.autograd.grad(score, pixels, create_graph=True)[0]
    return 1 - cosine_similarity(gradient.flatten(1), wanted[rows].flatten(1), dim=1).mean()


@torch.no_grad()
def pair_accuracy(reward: ClipReward, pairs: Pairs) -> float:
    """Compute the share of pairs, r* apart by more than 0.02, that the proxy orders as r* does; NaN of none."""
    words = reward.embed_text(pairs.prompts)
    apart = pairs.margin.abs() > 0.02
    agree = (reward.score(pairs.first, words) > reward.score(pairs.second, words)) == (pairs.margin > 0)
    return agree[apart].float().mean().item()
