"""Which reward families there are, and the settings that name one."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, field_validator

from rsaft_fast.errors import UserError
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.clip import ClipReward, Scale
from rsaft_fast.rewards.preprocess import Clamp
from rsaft_fast.settings import Settings

_PLAYGROUND = "playground/"


class RewardSettings(Settings):
    """Which reward, and how it is computed.

    Attributes:
        name: the family. clip is any transformers CLIPModel with its tokenizer, PickScore among them.
        path: folder or hub id of the weights. playground/fair and playground/brittle ship with the package.
        scale: logit multiplies the cosine by exp(logit_scale), which is PickScore's scale (about 21); cosine does not.
        clamp: values outside [0, 1] before the reward: hard clips the value, which then has no gradient; ste clips
            the value and passes the gradient; none leaves both.
        dtype: what the towers compute in. Below float32 the effect of a small image perturbation is rounded away.
        checkpoint: recompute the image tower's layers in the backward pass instead of keeping their activations.
    """

    name: str = "clip"
    path: str = Field(min_length=1)
    scale: Scale = "logit"
    clamp: Clamp = "hard"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    checkpoint: bool = True

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(REWARDS)}"
            raise ValueError(f"reward {name!r} is unknown; {hint}")
        return name


def load_reward(settings: RewardSettings, device: torch.device | str = "cpu") -> Reward:
    """The frozen reward that `settings` names, on `device`.

    Raises:
        UserError: the weights cannot be found or are not what the family needs.
    """
    return REWARDS[settings.name](settings, device)


def resolve_path(path: str) -> str:
    """`path`, or the folder of a reward that ships with the package ("playground/<name>")."""
    if not path.startswith(_PLAYGROUND):
        return path
    from rsaft_fast.playground import reward_path

    try:
        return str(reward_path(path.removeprefix(_PLAYGROUND)))
    except (ValueError, OSError) as error:
        raise UserError(f"reward {path!r}: {error}") from error


def _load_clip(settings: RewardSettings, device: torch.device | str) -> Reward:
    reward = ClipReward.from_pretrained(
        resolve_path(settings.path),
        scale=settings.scale,
        clamp=settings.clamp,
        dtype=getattr(torch, settings.dtype),
        checkpoint=settings.checkpoint,
        device=device,
    )
    # The name that the user gave, not where this installation keeps it.
    reward.spec = replace(reward.spec, source=settings.path)
    return reward


REWARDS: dict[str, Callable[[RewardSettings, torch.device | str], Reward]] = {"clip": _load_clip}
