"""The processes that make one update together.

Samples are numbered through all ranks, so that pictures, plans and noise do not depend on how many there are. Gradients
are summed once a pass, in one flat buffer a dtype: the backward walk calls autograd many times, and a hook on each
backward pass would communicate as often.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """A rank among those that train together; the default is one process alone.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes.
        group: whom sums run over; None is torch's default group.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank is {self.rank}; a world of {self.size} has 0 to {self.size - 1}")

    def share(self, count: int) -> range:
        """Return this rank's indices of `count` of each rank, numbered through all ranks."""
        return range(self.rank * count, (self.rank + 1) * count)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks, the same bits on each; `values` itself where there is one rank."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replace each parameter's `.grad` by its sum over ranks; a rank without one that others have adds zeros.

        Losses divide by the samples of all ranks, so that sums of gradients are those of the whole batch.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        present = self.sum(present.to(parameters[0].device)).bool().tolist()
        kinds: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter, anywhere in zip(parameters, present):
            if anywhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                kinds.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in kinds.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat, group=self.group)
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
                gradient.copy_(part.view_as(gradient))
