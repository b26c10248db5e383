"""Pictures of fixed prompts at fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from rsaft_fast.phases import GRID, phase
from rsaft_fast.sampling.linear import Schedule
from rsaft_fast.sampling.noise import NoiseSource
from rsaft_fast.sampling.protocol import Backbone, Conditioning
from rsaft_fast.sampling.rollout import sample_chain

# Keyed like an update that no run reaches, so that no training picture shares a sample's noise.
SAMPLE_STEP = 2**32 - 1


@phase(GRID)
@torch.no_grad()
def sample_images(
    backbone: Backbone,
    schedule: Schedule,
    conditioning: Conditioning,
    seed: int,
    batch_size: int = 8,
    stop: Callable[[], bool] = lambda: False,
    samples: Sequence[int] | None = None,
    watch: Callable[[Sequence[int]], Iterable[int]] = iter,
    seen: Callable[[torch.Tensor], object] | None = None,
    only: range | None = None,
) -> torch.Tensor | None:
    """Draw images (B, 3, H, W), nominally 0 to 1, onto the host: one for each row of `conditioning`, or of `only` some.

    None when `stop` says so.

    Picture i depends on (seed, i) and its prompt alone, whatever the batch size; with `samples`, on (seed, samples[i]).
    `watch` goes through the indices of the batches' first pictures, and may tell how far it is;
    `seen` is shown the guided prediction of every call, (b, *latent_shape), batch by batch.
    """
    pictures = []
    only = range(len(conditioning)) if only is None else only
    for first in watch(range(only.start - only.start % batch_size, only.stop, batch_size)):
        if stop():
            return None
        rows = range(max(first, only.start), min(first + batch_size, only.stop))
        numbers = tuple(rows) if samples is None else tuple(samples[row] for row in rows)
        noise = NoiseSource(seed, SAMPLE_STEP, numbers)
        latents = backbone.initial_latents(noise)
        part = conditioning.select(slice(rows.start, rows.stop))
        x, _ = sample_chain(backbone, schedule, latents, part, noise, seen=seen)
        pictures.append(backbone.decode(x).cpu())
    return torch.cat(pictures)
