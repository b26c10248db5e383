"""Check that a low-precision reward is good enough for a radius.

The sharpness S1 is a small difference of two scores: at an L2 radius of 1e-2 a bf16 tower's is mostly rounding, and a
perturbation found through it points nowhere.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.phases import CHECKING, phase
from rsaft_fast.rewards.base import Reward, TowerReward
from rsaft_fast.smoothing.settings import ImageSmoothing
from rsaft_fast.smoothing.sharpness import Space, sharpness

# Relative error of S1 from which the reward has to compute in float32.
LIMIT = 0.1
# Pictures that a run is judged by at its start.
PICTURES = 4


@phase(CHECKING)
def s1_error(
    reward: TowerReward,
    images: torch.Tensor,
    prompts: Sequence[str],
    radius: float = 1e-2,
    norm: Literal["l2", "rms"] = "l2",
    space: Space = "pixel01",
) -> float:
    """Compute mean |S1 - S1 in fp32| over mean |S1 in fp32| at these pictures; 0 for a reward in fp32 or float64.

    The comparison runs a float32 copy of the reward, of the same (rounded) weights: 4 bytes a parameter more.

    Args:
        reward: differentiable; its `dtype` is what is judged.
        images: (B, 3, H, W), nominally 0 to 1; a handful is enough.
        prompts: one a picture.
        radius, norm, space: of the ball around each picture, see `smoothing.sharpness`.
    """
    if reward.dtype in (torch.float32, torch.float64):
        return 0.0
    with warnings.catch_warnings():
        # That S1 drowns in rounding is the question here.
        warnings.simplefilter("ignore")
        # One at a time: a check is not to be what the memory has to suffice for.
        own, exact = (
            sharpness(judged, images.float(), prompts, radius, norm, space, batch_size=1)
            for judged in (reward, copy.deepcopy(reward).float())
        )
    return ((own - exact).abs().mean() / exact.abs().mean()).item()


def require_s1_precision(
    reward: TowerReward,
    images: torch.Tensor,
    prompts: Sequence[str],
    radius: float = 1e-2,
    norm: Literal["l2", "rms"] = "l2",
    space: Space = "pixel01",
) -> None:
    """Refuse a reward whose S1 at this radius is off by more than `LIMIT`.

    Raises:
        UserError: it is, or it is not a number.
    """
    error = s1_error(reward, images, prompts, radius, norm, space)
    if not error <= LIMIT:
        raise UserError(
            f"in {str(reward.dtype).removeprefix('torch.')} the S1 of reward {reward.spec.name!r} at radius {radius:g} "
            f"({norm}) is off by {error:.0%}; the limit is {LIMIT:.0%}: set reward.dtype=fp32 or a larger radius"
        )


def low_precision(reward: Reward) -> list[TowerReward]:
    """List the towers, of the reward or of what it is made of, that a small radius may be too much for."""
    towers = [module for module in reward.modules() if isinstance(module, TowerReward)]
    return [tower for tower in towers if tower.differentiable and tower.dtype in (torch.bfloat16, torch.float16)]


def check_precision(
    reward: Reward,
    balls: Iterable[ImageSmoothing],
    prompts: Sequence[str],
    draw: Callable[[list[str]], torch.Tensor],
) -> None:
    """Apply `require_s1_precision` to each low-precision tower, at each ball around pictures or reward inputs.

    A ball in the latent space is left to the user: what it does to a picture is the decoder's.

    Args:
        prompts: some of these are drawn.
        draw: pictures (N, 3, H, W) of N prompts; not called where all towers compute in float32.

    Raises:
        UserError: one is too coarse.
    """
    wanted = {(ball.number, ball.norm, ball.space) for ball in balls if ball.space != "latent"}
    towers = low_precision(reward) if wanted else []
    if not towers:
        return
    some = list(prompts[:PICTURES])
    images = draw(some)
    for tower in towers:
        images = images.to(next(tower.parameters()).device)
        for radius, norm, space in sorted(wanted):
            require_s1_precision(tower, images, some, radius, norm, space)
