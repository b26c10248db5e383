"""Noise from (seed, step, sample index), never from global state, so a resumed run repeats bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

Purpose = Literal[
    "initial", "ancestral", "renoise", "denoising", "plan", "prompts", "smoothing", "restart", "shuffle", "auxiliary"
]
_PURPOSE_ID = {
    **{"initial": 0, "ancestral": 1, "renoise": 2, "denoising": 3, "plan": 4, "prompts": 5},
    **{"smoothing": 6, "restart": 7, "shuffle": 8, "auxiliary": 9},
}


def derive_rng(seed: int, step: int, purpose: Purpose, index: int = 0) -> np.random.Generator:
    """A NumPy generator for host-side draws (plans, prompt order), keyed and stateless."""
    return np.random.default_rng(np.random.SeedSequence([seed, step, _PURPOSE_ID[purpose], index]))


@dataclass(frozen=True)
class NoiseSource:
    """Standard normal noise for the samples of one (micro-)batch.

    A sample's noise depends on (seed, step, its own index) alone: the same whatever micro-batch it falls into.
    Drawn on the CPU in fp32, so that every device sees the same numbers.

    Attributes:
        seed: the run's seed.
        step: the training step.
        samples: index of each sample within the whole step's batch.
    """

    seed: int
    step: int
    samples: tuple[int, ...]

    def draw(
        self,
        purpose: Purpose,
        shape: Sequence[int],
        key: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Noise of shape (len(samples), *shape); `key` separates draws of one purpose (the call's index, say)."""
        rows = []
        for sample in self.samples:
            words = np.random.SeedSequence([self.seed, self.step, _PURPOSE_ID[purpose], key, sample]).generate_state(2)
            generator = torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))
            rows.append(torch.randn(tuple(shape), generator=generator))
        return (
            torch.stack(rows).to(device=device, dtype=dtype)
            if rows
            else torch.empty(0, *shape, dtype=dtype, device=device)
        )
