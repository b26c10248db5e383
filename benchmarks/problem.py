"""The parameters that providers work on: each has weights of its own, all share the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

RHO, CLIP, LR = 0.05, 1.0, 1e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """Shapes, and gradients that every provider reads (clipping scales them in place, to norm 1, once).

    Weights are each provider's own: optimizers notice when others write to theirs, and some rebind them.
    """

    shapes: Sequence[tuple[int, ...]]
    layout: str
    device: torch.device
    gradients: list[torch.Tensor]

    @classmethod
    def build(cls, shapes: Sequence[tuple[int, ...]], layout: str, device: torch.device) -> Problem:
        return cls(shapes, layout, device, [cls._normal(s, DTYPES[layout], device, 1e-3) for s in shapes])

    def parameters(self) -> list[torch.nn.Parameter]:
        """Weights with the gradients attached."""
        dtype = DTYPES[self.layout]
        parameters = [torch.nn.Parameter(self._normal(s, dtype, self.device, 0.02)) for s in self.shapes]
        for p, gradient in zip(parameters, self.gradients):
            p.grad = gradient
        return parameters

    @staticmethod
    def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std)
