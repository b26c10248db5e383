"""Batches of prompts: which, in which order, with which draws; all of it follows from (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.distributed import World
from rsaft_fast.recipe.config import DataSettings
from rsaft_fast.sampling import NoiseSource, derive_rng
from rsaft_fast.sampling.protocol import Backbone, Conditioning


def epoch_order(seed: int, size: int, first: int, count: int, stream: int = 0) -> list[int]:
    """Give indices `first` to `first + count` of an endless sequence of permutations of range(size), one an epoch."""
    places = (divmod(n, size) for n in range(first, first + count))
    return [_permutation(seed, epoch, size, stream)[place] for epoch, place in places]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int, stream: int) -> list[int]:
    return derive_rng(seed, epoch, "prompts", stream).permutation(size).tolist()


@dataclass
class MicroBatch:
    """Samples that go through the network together, and the source of their random draws.

    Attributes:
        prompts: B prompts.
        conditioning: their encoding, B rows.
        latents: x_T, (B, *latent_shape).
        noise: source of all later draws of these samples.
        index: its place among the micro-batches of the whole update, those of other ranks included.
    """

    prompts: Sequence[str]
    conditioning: Conditioning
    latents: torch.Tensor
    noise: NoiseSource
    index: int = 0


class PromptBatches:
    """Micro-batches of every iteration."""

    def __init__(self, settings: DataSettings, prompts: Sequence[str], seed: int, world: World | None = None):
        """`world`: each rank takes `batch_size * accumulate` samples, numbered through all ranks."""
        self.settings, self.prompts, self.seed, self.world = settings, prompts, seed, world or World()
        self.size = settings.batch_size * settings.accumulate * self.world.size

    def texts(self, step: int) -> list[str]:
        """Return the prompts of one iteration, of all ranks, in order."""
        return [self.prompts[i] for i in epoch_order(self.seed, len(self.prompts), step * self.size, self.size)]

    def visited(self, steps: range) -> list[str]:
        """Return every prompt that these iterations see, once."""
        # Two epochs' worth of draws holds a whole one, wherever it begins: whoever sees that many sees them all.
        enough = 2 * len(self.prompts) // self.size + 2
        return list(dict.fromkeys(text for step in steps[:enough] for text in self.texts(step)))

    def __call__(self, backbone: Backbone, encoded: EncodedPrompts, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of iteration `step`, their initial noise drawn."""
        texts, batch_size = self.texts(step), self.settings.batch_size
        batches = []
        for index in self.world.share(self.settings.accumulate):
            samples = tuple(range(index * batch_size, (index + 1) * batch_size))
            prompts = [texts[i] for i in samples]
            noise = NoiseSource(self.seed, step, samples)
            batches.append(MicroBatch(prompts, encoded(prompts), backbone.initial_latents(noise), noise, index))
        return batches
