"""Is a low-precision reward good enough for a radius? The sharpness S1 is a small difference of two scores: at an L2
radius of 1e-2 a bf16 tower's is mostly rounding, and a perturbation found through it points nowhere."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Literal

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.rewards.base import TowerReward

# Relative error of S1 from which the reward has to compute in float32.
LIMIT = 0.1


def s1_error(
    reward: TowerReward,
    images: torch.Tensor,
    prompts: Sequence[str],
    radius: float = 1e-2,
    norm: Literal["l2", "rms"] = "l2",
) -> float:
    """Mean |S1 - S1 in fp32| over mean |S1 in fp32| at these pictures; 0 for a reward in fp32 or float64.

    The comparison runs a float32 copy of the reward, of the same (rounded) weights: 4 bytes a parameter more.

    Args:
        reward: differentiable; its `dtype` is what is judged.
        images: (B, 3, H, W), nominally 0 to 1; a handful is enough.
        prompts: one a picture.
        radius, norm: of the ball around each picture in [0, 1], see `evaluation.sharpness`.
    """
    from rsaft_fast.evaluation.sharpness import sharpness

    if reward.dtype in (torch.float32, torch.float64):
        return 0.0
    with warnings.catch_warnings():
        # That S1 drowns in rounding is the question here.
        warnings.simplefilter("ignore")
        own = sharpness(reward, images.float(), prompts, radius, norm)
        exact = sharpness(copy.deepcopy(reward).float(), images.float(), prompts, radius, norm)
    return ((own - exact).abs().mean() / exact.abs().mean()).item()


def require_s1_precision(
    reward: TowerReward,
    images: torch.Tensor,
    prompts: Sequence[str],
    radius: float = 1e-2,
    norm: Literal["l2", "rms"] = "l2",
) -> None:
    """Refuse a reward whose S1 at this radius is off by more than `LIMIT`.

    Raises:
        UserError: it is, or it is not a number.
    """
    error = s1_error(reward, images, prompts, radius, norm)
    if not error <= LIMIT:
        raise UserError(
            f"in {str(reward.dtype).removeprefix('torch.')} the S1 of reward {reward.spec.name!r} at radius {radius:g} "
            f"({norm}) is off by {error:.0%}; the limit is {LIMIT:.0%}: set reward.dtype=float32 or a larger radius"
        )
