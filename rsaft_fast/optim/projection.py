"""Gradients without the part that opposes another direction (PCGrad, arXiv 2001.06782, for one pair)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Gradients = Sequence[torch.Tensor | None]


@torch.no_grad()
def project_out_(gradients: Gradients, direction: Gradients, scales: Gradients | None = None) -> torch.Tensor:
    """Take out of the gradients, in place, their component along a direction that they oppose: g - <g, d> / <d, d> d.

    Nothing happens where <g, d> >= 0. The inner product is sum_i s_i g_i d_i; an optimizer that steps by s_i g_i then
    moves neither along nor against d.

    Args:
        gradients: of all parameters in order; None counts as zeros, and takes nothing up.
        direction: like them.
        scales: s, positive; None is 1.

    Returns:
        the cosine between gradients and direction before, in that inner product; a scalar on their device, 0 where one
        of them is zero.
    """
    ones: Gradients = [None] * len(gradients)
    triples = [
        (g, d, s)
        for g, d, s in zip(gradients, direction, ones if scales is None else scales)
        if g is not None and d is not None
    ]
    if not triples:
        return torch.zeros(())
    gg, gd, dd = (
        _total(
            (a[i].double() * a[j].double() * (1.0 if a[2] is None else a[2].double())).sum()  # pyrefly: ignore
            for a in triples
        )
        for i, j in ((0, 0), (0, 1), (1, 1))
    )
    step = torch.where(dd > 0, gd.clamp(max=0) / dd.clamp_min(torch.finfo(dd.dtype).tiny), 0.0)
    for g, d, _ in triples:
        g.sub_((step * d).to(g.dtype))
    length = (gg * dd).sqrt()
    return torch.where(length > 0, gd / length.clamp_min(torch.finfo(dd.dtype).tiny), 0.0)


def _total(parts: Any) -> torch.Tensor:
    return torch.stack(list(parts)).sum()


@torch.no_grad()
def adam_scales(optimizer: torch.optim.Optimizer) -> list[torch.Tensor] | None:
    """Return what AdamW multiplies each element's running gradient by, 1 / (sqrt(v / (1 - beta2^t)) + eps).

    None before its first step. In the order of the param groups; moments in fp32.
    """
    scales = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state or not float(state["step"]):
                return None
            correction = 1 - group["betas"][1] ** float(state["step"])
            scales.append(1 / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"]))
    return scales
