"""Batches of prompts: which, in which order, with which draws; all of it follows from (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import overload

import torch

from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.distributed import World
from rsaft_fast.errors import UserError
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


class Batches(Sequence[MicroBatch]):
    """One rank's micro-batches of one iteration, each made when it is asked for: its conditioning needs memory.

    Samples are counted from 0 on each rank here, and through all ranks in their random draws.
    """

    def __init__(
        self,
        source: PromptBatches,
        backbone: Backbone,
        encoded: EncodedPrompts,
        step: int,
        samples: range,
        batch_size: int,
    ):
        """`samples`: this rank's, numbered through all ranks."""
        self.source, self.backbone, self.encoded = source, backbone, encoded
        self.step, self.samples, self.batch_size = step, samples, batch_size
        texts = source.texts(step)
        self.prompts = [texts[i] for i in samples]

    @property
    def group_size(self) -> int:
        return self.source.settings.group_size

    @property
    def same_noise(self) -> bool:
        """Whether the samples of a group start from the same noise."""
        return self.source.settings.group_noise == "same" and self.group_size > 1

    def of(self, batch_size: int, count: int | None = None) -> Batches:
        """Give micro-batches of another size, of the first `count` samples or all; the last may be smaller."""
        samples = self.samples if count is None else self.samples[:count]
        return Batches(self.source, self.backbone, self.encoded, self.step, samples, batch_size)

    def conditioning(self, places: Sequence[int]) -> Conditioning:
        """Give the conditioning of these samples, on the backbone's device."""
        return self.encoded([self.prompts[place] for place in places])

    def noise(self, places: Sequence[int]) -> NoiseSource:
        """Give the source of these samples' random draws."""
        return NoiseSource(self.source.seed, self.step, tuple(self.samples[place] for place in places))

    def initial_latents(self, places: Sequence[int]) -> torch.Tensor:
        """Draw x_T of these samples."""
        noise = self.noise(places)
        if self.same_noise:
            noise = NoiseSource(noise.seed, noise.step, tuple(i // self.group_size for i in noise.samples))
        return self.backbone.initial_latents(noise)

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        places = range(index * self.batch_size, min((index + 1) * self.batch_size, len(self.samples)))
        number = self.samples[places[0]] // self.batch_size
        prompts = self.prompts[places.start : places.stop]
        return MicroBatch(prompts, self.conditioning(places), self.initial_latents(places), self.noise(places), number)


class PromptBatches:
    """Micro-batches of every iteration."""

    def __init__(self, settings: DataSettings, prompts: Sequence[str], seed: int, world: World | None = None):
        """
        Args:
            world: each rank takes as many samples as the others, numbered through all ranks; groups stay whole.

        Raises:
            UserError: the iteration's prompts do not go evenly among the ranks.
        """
        self.settings, self.prompts, self.seed, self.world = settings, prompts, seed, world or World()
        self.groups = settings.groups(self.world.size)
        self.size = self.groups * settings.group_size
        if self.groups % self.world.size or self.size % (self.world.size * settings.batch_size):
            raise UserError(
                f"data.prompts_per_iteration {self.groups} times data.group_size {settings.group_size} does not go "
                f"evenly among {self.world.size} processes of data.batch_size {settings.batch_size}; change one of them"
            )

    def texts(self, step: int) -> list[str]:
        """Return the prompts of one iteration, of all ranks, in order: each of a group's samples has its own entry."""
        order = epoch_order(self.seed, len(self.prompts), step * self.groups, self.groups)
        return [self.prompts[i] for i in order for _ in range(self.settings.group_size)]

    def visited(self, steps: range) -> list[str]:
        """Return every prompt that these iterations see, once."""
        # Two epochs' worth of draws holds a whole one, wherever it begins: whoever sees that many sees them all.
        enough = 2 * len(self.prompts) // self.groups + 2
        return list(dict.fromkeys(text for step in steps[:enough] for text in self.texts(step)))

    def __call__(self, backbone: Backbone, encoded: EncodedPrompts, step: int) -> Batches:
        """Return this rank's micro-batches of iteration `step`."""
        samples = self.world.share(self.size // self.world.size)
        return Batches(self, backbone, encoded, step, samples, self.settings.batch_size)
