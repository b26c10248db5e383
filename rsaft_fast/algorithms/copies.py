"""Copies of the trained weights beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from rsaft_fast.distributed.lockstep import in_place_of, know_copy
from rsaft_fast.distributed.shards import as_parts, local, local_parts, part_of
from rsaft_fast.dtypes import wide
from rsaft_fast.phases import AVERAGING, phase

MEAN = "mean"
"""Name of the running mean among a checkpoint's copies."""
REFERENCE = "reference"
"""Name of the copy that a penalty holds the weights to."""

Tensors = dict[str, torch.Tensor]


class Copies:
    """Copies of the trained weights under names, put in the weights' place by value.

    Storage is never rebound, and no adapter is switched: a captured CUDA graph replays addresses. Of sharded weights
    `tensors` are this rank's parts, and `whole` what stands for all of them.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter] | None = None, names: Sequence[str] = (), host: bool = False
    ):
        """
        Args:
            parameters: what is trained, by name; each copy begins as their value now.
            host: copies lie on the host, and so do the weights while a copy is in their place. They keep the weights'
                dtype.
        """
        self.parameters = dict(parameters or {})
        self.host = host
        self.tensors: dict[str, Tensors] = {}
        for name in names:
            self.tensors[name] = {key: self._aside(local(p)) for key, p in self.parameters.items()}
            know_copy(self.parameters, self.tensors[name])

    def _aside(self, parameter: torch.Tensor) -> torch.Tensor:
        away = self.host and not parameter.is_meta  # of shapes there is nothing to move
        return parameter.detach().to(device="cpu" if away else parameter.device, copy=True)

    def applied(self, name: str) -> AbstractContextManager[None]:
        """The model has that copy as its weights inside the block, and its own, bit for bit, after it."""
        return replaced(self.parameters, self.tensors[name], self._aside)

    def whole(self) -> dict[str, Tensors]:
        """Return the copies as tensors like the weights, sharded where those are: for a checkpoint."""
        return {name: as_parts(self.parameters, tensors) for name, tensors in self.tensors.items()}

    @torch.no_grad()
    def take(self, name: str) -> None:
        """Set a copy to the weights as they are now."""
        for key, tensor in self.tensors[name].items():
            tensor.copy_(local(self.parameters[key]))

    @torch.no_grad()
    def follow(self, name: str, decay: float) -> None:
        """Move a copy towards the weights as they are now: copy <- decay copy + (1 - decay) weights.

        In fp32 at least, rounded to the weights' dtype.
        """
        for key, tensor in self.tensors[name].items():
            weights = wide(local(self.parameters[key]).to(tensor.device))
            tensor.copy_(wide(tensor).lerp(weights, 1 - decay))

    @torch.no_grad()
    def load(self, saved: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take over saved copies, of the same names."""
        for name, tensors in self.tensors.items():
            load_parts(self.parameters, tensors, saved[name])


def load_parts(
    parameters: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]
) -> None:
    """Write saved tensors, whole or parted like the parameters of the same names, into this rank's parts."""
    for name, part in parts.items():
        part.copy_(part_of(parameters[name], saved[name]))


@contextmanager
@torch.no_grad()
def replaced(
    parameters: Mapping[str, torch.nn.Parameter],
    values: Mapping[str, torch.Tensor],
    aside: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> Iterator[None]:
    """Have the parameters of these names at other values inside the block, and at their own, bit for bit, after it.

    By value: addresses stay, which a captured graph replays.

    Args:
        values: this rank's parts, of sharded parameters; a mapping that `know_copy` was told of.
        aside: makes the copy of a parameter that waits for the end of the block.
    """
    changed = local_parts({name: parameters[name] for name in values})
    own = {name: aside(p.detach()) for name, p in changed.items()}
    try:
        for name, parameter in changed.items():
            parameter.copy_(values[name])
        with in_place_of(parameters, values, own):
            yield
    finally:
        with torch.no_grad():
            for name, parameter in changed.items():
                parameter.copy_(own[name])


class EMA:
    """mean <- d mean + (1 - d) weight after every update, d = min(decay, (1 + n) / (10 + n)) at the n-th.

    The warm-up is Flow-GRPO's: with a constant d of 0.995 the initial weights would still count a fifth after 300
    updates. Means are fp32 whatever the weights are: in bf16 the small increments would round away. Of sharded weights
    `means` are this rank's parts.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float):
        self.parameters = dict(parameters)
        self.decay = decay
        self.means = {
            name: local(p).detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }
        know_copy(self.parameters, self.means)

    @phase(AVERAGING)
    @torch.no_grad()
    def update(self, n: int) -> None:
        """Take in the weights after the n-th update (n >= 1)."""
        decay = min(self.decay, (1 + n) / (10 + n))
        means = list(self.means.values())
        weights = [local(p).to(mean.dtype) for p, mean in zip(self.parameters.values(), means)]
        torch._foreach_lerp_(means, weights, 1 - decay)

    def applied(self) -> AbstractContextManager[None]:
        """The model has the means as its weights inside the block, and its own, bit for bit, after it."""
        return replaced(self.parameters, self.means)

    def whole(self) -> Tensors:
        """Return the means as tensors like the weights, sharded where those are: for a checkpoint."""
        return as_parts(self.parameters, self.means)

    @torch.no_grad()
    def load(self, means: Mapping[str, torch.Tensor]) -> None:
        """Take over saved means."""
        load_parts(self.parameters, self.means, means)
