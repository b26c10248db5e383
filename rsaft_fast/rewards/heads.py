"""The score heads of LAION aesthetic v2 and ImageReward: five linear layers with dropout and no activation between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# Positions of the linear layers in the published nn.Sequential; dropout stands between.
_POSITIONS = (0, 2, 4, 6, 7)
_WIDTHS = (1024, 128, 64, 16, 1)


class AffineHead(nn.Module):
    """Features (B, width) to scores (B,); weights named layers.{0,2,4,6,7}, as published.

    It is one affine map in exact arithmetic; the layers are kept as they were trained, for the same rounding.
    """

    def __init__(self, width: int, widths: Sequence[int] = _WIDTHS):
        super().__init__()
        pairs = zip((width, *widths), widths)
        linears = {str(p): nn.Linear(*pair) for p, pair in zip(_POSITIONS, pairs)}
        self.layers = nn.ModuleDict(linears)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Scores (B,) in the head's dtype."""
        for layer in self.layers.values():
            features = layer(features)
        return features[:, 0]
