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

    Samples are counted from 0 on each rank here, and through all ranks in their random draws. A micro-batch is this
    rank's part of one that the samples of all are cut into: what is drawn for it does not depend on the ranks.

    Attributes:
        total: samples of all ranks.
    """

    def __init__(
        self,
        source: PromptBatches,
        backbone: Backbone,
        encoded: EncodedPrompts,
        step: int,
        samples: range,
        batch_size: int,
        total: int | None = None,
    ):
        """`samples`: this rank's, numbered through all ranks; `total`: of all ranks, None where these are all."""
        self.source, self.backbone, self.encoded = source, backbone, encoded
        self.step, self.samples, self.batch_size = step, samples, batch_size
        self.total = len(samples) if total is None else total
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
        total = self.total if count is None else None
        return Batches(self.source, self.backbone, self.encoded, self.step, samples, batch_size, total)

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
        return -(-self.samples.stop // self.batch_size) - self.samples.start // self.batch_size

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        first, number = self.samples.start, self.samples.start // self.batch_size + index
        bounds = (number * self.batch_size - first, (number + 1) * self.batch_size - first)
        places = range(max(bounds[0], 0), min(bounds[1], len(self.samples)))
        prompts = self.prompts[places.start : places.stop]
        return MicroBatch(prompts, self.conditioning(places), self.initial_latents(places), self.noise(places), number)


class PromptBatches:
    """Micro-batches of every iteration."""

    def __init__(self, settings: DataSettings, prompts: Sequence[str], seed: int, world: World | None = None):
        """
        Args:
            world: each rank takes its share of the samples, numbered through all ranks; groups stay whole, and shares
                differ by one of them at most.

        Raises:
            UserError: there are fewer prompts in an iteration than ranks.
        """
        self.settings, self.prompts, self.seed, self.world = settings, prompts, seed, world or World()
        self.groups = settings.groups()
        self.size = self.groups * settings.group_size
        if self.groups < self.world.size:
            keys = "data.batch_size times data.accumulate, over data.group_size"
            if settings.prompts_per_iteration is not None:
                keys = "data.prompts_per_iteration"
            raise UserError(
                f"an iteration has {self.groups} prompts ({keys}), too few for {self.world.size} processes; raise "
                "that, or start fewer"
            )

    @property
    def largest_share(self) -> int:
        """Pictures of an iteration that one rank takes at most."""
        return -(-self.groups // self.world.size) * self.settings.group_size

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
        groups, each = self.world.share(self.groups), self.settings.group_size
        samples = range(groups.start * each, groups.stop * each)
        return Batches(self, backbone, encoded, step, samples, self.settings.batch_size, self.size)
