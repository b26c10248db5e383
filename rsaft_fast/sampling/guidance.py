"""Classifier-free guidance: how the predictions of two branches become one."""

from __future__ import annotations

from collections.abc import Callable

import torch

Combine = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Combine the two branches' predictions: f_u + w (f_c - f_u) (Ho and Salimans 2022)."""
    return negative + scale * (positive - negative)


def guide_at_length(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Combine predictions as `guide`, and bring each token to the length that it has in the conditional one.

    Lengths are those over the last side, a token's channels.
    """
    guided = guide(positive, negative, scale)
    return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def branch_cotangents(
    combine: Combine, positive: torch.Tensor, negative: torch.Tensor, scale: float, cotangent: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cotangents of both branches' predictions from that of the combined one, by autograd."""
    with torch.enable_grad():
        leaves = (positive.detach().requires_grad_(), negative.detach().requires_grad_())
        combined = combine(*leaves, scale)
    to_positive, to_negative = torch.autograd.grad(combined, leaves, cotangent)
    return to_positive, to_negative
