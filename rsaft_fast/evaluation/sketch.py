"""Gradients folded to a fixed length that keeps their inner products: a count sketch (Charikar et al. 2002).

Comparing K groups of pictures under V rewards takes all inner products of K * V gradients. Kept as they are, they need
that many copies of the trained weights; folded, they need K * V * LENGTH numbers, whatever is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LENGTH = 2**18
"""Numbers of a sketch. The inner product of two unit vectors has a standard error of 1 / sqrt(LENGTH) = 0.002."""


def fold(gradients: Sequence[torch.Tensor | None], sizes: Sequence[int], length: int = LENGTH) -> torch.Tensor:
    """Fold gradients into (min(length, sum of sizes),) on the host, by signs that depend on the place alone.

    Linear: the fold of a sum is the sum of the folds. Where all numbers fit in, they are only put side by side, so
    that inner products are exact.

    Args:
        gradients: of the parameters in order; None counts as zeros.
        sizes: elements of each parameter.
        length: of the result.
    """
    total = sum(sizes)
    length = min(length, total)
    known = [g for g in gradients if g is not None]
    if not known:
        return torch.zeros(length)
    out = torch.zeros(length, dtype=torch.float64, device=known[0].device)
    place = 0
    for index, (gradient, size) in enumerate(zip(gradients, sizes)):
        if gradient is not None:
            start = place % length
            rows = -(-(start + size) // length)
            laid = torch.zeros(
                rows * length, dtype=torch.promote_types(gradient.dtype, torch.float32), device=out.device
            )
            laid[start : start + size] = gradient.reshape(-1)
            if total > length:
                laid[start : start + size] *= _signs(size, index, out.device)
            out += laid.view(rows, length).sum(0, dtype=torch.float64)
        place += size
    return out.to(torch.promote_types(known[0].dtype, torch.float32)).cpu()


def _signs(size: int, index: int, device: torch.device) -> torch.Tensor:
    """Draw 1 and -1 for each element of parameter `index`; the same at every call."""
    generator = torch.Generator(device).manual_seed(index) if device.type != "meta" else None
    drawn = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8, device=device)
    return drawn.mul_(2).sub_(1)
