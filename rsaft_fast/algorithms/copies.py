"""Copies of the trained weights beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch

from rsaft_fast.phases import AVERAGING, phase

MEAN = "mean"
"""Name of the running mean among a checkpoint's copies."""


@contextmanager
@torch.no_grad()
def replaced(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have the parameters of these names at other values inside the block, and at their own, bit for bit, after it.

    By value: addresses stay, which a captured graph replays.
    """
    changed = {name: parameters[name] for name in values}
    own = {name: p.detach().clone() for name, p in changed.items()}
    try:
        for name, parameter in changed.items():
            parameter.copy_(values[name])
        yield
    finally:
        with torch.no_grad():
            for name, parameter in changed.items():
                parameter.copy_(own[name])


class EMA:
    """mean <- d mean + (1 - d) weight after every update, d = min(decay, (1 + n) / (10 + n)) at the n-th.

    The warm-up is Flow-GRPO's: with a constant d of 0.995 the initial weights would still count a fifth after 300
    updates. Means are fp32 whatever the weights are: in bf16 the small increments would round away.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float):
        self.parameters = dict(parameters)
        self.decay = decay
        self.means = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }

    @phase(AVERAGING)
    @torch.no_grad()
    def update(self, n: int) -> None:
        """Take in the weights after the n-th update (n >= 1)."""
        decay = min(self.decay, (1 + n) / (10 + n))
        means = list(self.means.values())
        weights = [p.to(mean.dtype) for p, mean in zip(self.parameters.values(), means)]
        torch._foreach_lerp_(means, weights, 1 - decay)

    def applied(self) -> AbstractContextManager[None]:
        """The model has the means as its weights inside the block, and its own, bit for bit, after it."""
        return replaced(self.parameters, self.means)

    @torch.no_grad()
    def load(self, means: Mapping[str, torch.Tensor]) -> None:
        """Take over saved means."""
        for name, mean in self.means.items():
            mean.copy_(means[name])
