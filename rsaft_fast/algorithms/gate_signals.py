"""What tells that a sample is over-scored, and what to do with it beyond the gate.

GARDO's win rates (arXiv 2512.24138) are in `rewards.ensemble`. The proxy's sharpness S1 (arXiv 2603.21175) and the
agreement of gradients are tried here and in neither paper. The penalty on long predictions follows NormGuard (arXiv
2606.27771).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rsaft_fast.dtypes import wide
from rsaft_fast.errors import UserError
from rsaft_fast.rewards.ensemble import win_rates


def centred_ranks(signal: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """Bring a signal of any scale onto that of win rates: (N,) float64, -1/2 for the smallest, 1/2 for the largest.

    Args:
        groups: (N,); given, samples are compared within their group.
    """
    return win_rates(signal, None if groups is None else groups.tolist()) - 0.5


def gradient_disagreement(proxy: torch.Tensor, auxiliaries: Iterable[torch.Tensor]) -> torch.Tensor:
    """Compute minus the mean cosine between each sample's proxy gradient and its auxiliary rewards': (B,) float64.

    1 where every auxiliary reward falls along the proxy's gradient, -1 where all rise. A gradient of 0 agrees with
    nothing: its cosine is 0.

    Args:
        proxy: (B, ...) gradient of the proxy with respect to each picture.
        auxiliaries: of each auxiliary reward, the same shape.

    Raises:
        UserError: no auxiliary gradient.
    """
    own = _directions(proxy)
    cosines = [(own * _directions(other)).sum(1) for other in auxiliaries]
    if not cosines:
        raise UserError(
            "agreement is with gradients of auxiliary rewards, and none was given; name a differentiable one"
        )
    return -torch.stack(cosines).mean(0)


def _directions(gradient: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, or 0 where there is no gradient."""
    rows = gradient.detach().double().flatten(1)
    lengths = rows.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, rows / lengths, 0.0)


def lengthening(prediction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Compute by which share each prediction is longer than the reference's: (B,) |f| / |f_ref| - 1.

    Below 0 where it is shorter. In float32 at least. It is what NormGuard's authors see rise by 5 to 15 % while a model
    learns to please its reward.

    Args:
        prediction, reference: (B, ...) of the network at the same input.
    """
    return _lengths(prediction) / _floored(_lengths(reference)) - 1


def lengthening_penalty(prediction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Compute the hinge (B,) on `lengthening`: 0 for predictions that are no longer than the reference's.

    The hinge is NormGuard's idea; that it is linear in the relative length, so that a weight means the same for every
    model, is chosen here.
    """
    return lengthening(prediction, reference).clamp(min=0)


def lengthening_cotangent(prediction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Compute the derivative of each sample's `lengthening_penalty` with respect to its prediction, (B, ...).

    f / (|f| |f_ref|) where the prediction is longer, 0 elsewhere. In float32 at least.
    """
    length, of_reference = _lengths(prediction), _floored(_lengths(reference))
    slope = torch.where(length > of_reference, 1 / (_floored(length) * of_reference), 0.0)
    return slope.view(-1, *[1] * (prediction.ndim - 1)) * wide(prediction)


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    return wide(rows).flatten(1).norm(dim=1)


def _floored(lengths: torch.Tensor) -> torch.Tensor:
    return lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
