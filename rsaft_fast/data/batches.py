"""Batches of prompts: which, in which order, with which draws. All of it follows from (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.methods import Method
from rsaft_fast.recipe.config import DataSettings
from rsaft_fast.sampling import GradientPlan, NoiseSource, derive_rng
from rsaft_fast.sampling.protocol import Backbone, Conditioning


def epoch_order(seed: int, size: int, first: int, count: int, stream: int = 0) -> list[int]:
    """Indices `first` to `first + count` of an endless sequence of permutations of range(size), one an epoch."""
    places = (divmod(n, size) for n in range(first, first + count))
    return [_permutation(seed, epoch, size, stream)[place] for epoch, place in places]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int, stream: int) -> list[int]:
    return derive_rng(seed, epoch, "prompts", stream).permutation(size).tolist()


@dataclass
class MicroBatch:
    """The samples that go through the network together, and every random choice made for them.

    Attributes:
        prompts: B prompts.
        conditioning: their encoding, B rows.
        latents: x_T, (B, *latent_shape).
        noise: source of all later draws of these samples.
        plan: which calls carry gradient.
    """

    prompts: Sequence[str]
    conditioning: Conditioning
    latents: torch.Tensor
    noise: NoiseSource
    plan: GradientPlan


class PromptBatches:
    """The micro-batches of every update."""

    def __init__(self, settings: DataSettings, prompts: Sequence[str], method: Method, num_steps: int, seed: int):
        self.settings, self.prompts, self.method = settings, prompts, method
        self.num_steps, self.seed = num_steps, seed
        self.size = settings.batch_size * settings.accumulate

    def texts(self, step: int) -> list[str]:
        """The prompts of one update, in order."""
        return [self.prompts[i] for i in epoch_order(self.seed, len(self.prompts), step * self.size, self.size)]

    def visited(self, steps: range) -> list[str]:
        """Every prompt that these updates see, once."""
        # Two epochs' worth of draws holds a whole one, wherever it begins: whoever sees that many sees them all.
        enough = 2 * len(self.prompts) // self.size + 2
        return list(dict.fromkeys(text for step in steps[:enough] for text in self.texts(step)))

    def __call__(self, backbone: Backbone, encoded: EncodedPrompts, step: int) -> list[MicroBatch]:
        """The micro-batches of update `step`, their noise and plans drawn."""
        texts, batch_size = self.texts(step), self.settings.batch_size
        batches = []
        for index in range(self.settings.accumulate):
            samples = tuple(range(index * batch_size, (index + 1) * batch_size))
            prompts = [texts[i] for i in samples]
            noise = NoiseSource(self.seed, step, samples)
            plan_index = index if self.settings.plan_scope == "micro-batch" else 0
            plan = self.method.draw(self.num_steps, derive_rng(self.seed, step, "plan", plan_index))
            batches.append(MicroBatch(prompts, encoded(prompts), backbone.initial_latents(noise), noise, plan))
        return batches
