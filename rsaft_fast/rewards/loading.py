"""From the settings or the name of a reward to the reward."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from rsaft_fast.errors import UserError
from rsaft_fast.pretrained import library_errors
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.settings import REWARDS, RewardSettings


def load_reward(
    reward: str | RewardSettings,
    path: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    **keys: Any,
) -> Reward:
    """Load a frozen reward: `load_reward("pickscore")`, `load_reward("hpsv2.1", "folder", scale="percent")`.

    Args:
        reward: the family's name, or settings, which say all that `path` and `keys` would.
        path: folder, file or hub id of the weights; None takes the family's published ones.
        device: where it lives.
        keys: of the family, as in a recipe's `reward` section; dtype may be torch's.

    Returns:
        The reward in `eval()`; `score(images, prompts)` takes images (B, 3, H, W), 0 to 1, and gives (B,).

    Raises:
        UserError: no such family or key, or the weights cannot be found or are not what the family needs.
    """
    settings = reward if isinstance(reward, RewardSettings) else _settings(reward, path, keys)
    if settings is reward and (path is not None or keys):
        given = ["path"] * (path is not None) + list(keys)
        raise UserError(f"load_reward was given settings and {', '.join(given)} beside them; say it in the settings")
    with library_errors(
        f"reward {settings.name} at {settings.path!r} could not be loaded",
        "its files are damaged or another model's: download them anew",
    ):
        loaded = settings.load(device)
    # The name that the user gave, not where this installation keeps it.
    loaded.spec = replace(loaded.spec, source=settings.path)
    return loaded


def _settings(name: str, path: str | Path | None, keys: dict[str, Any]) -> RewardSettings:
    if name not in REWARDS:
        near = difflib.get_close_matches(str(name), REWARDS, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no reward {name!r}; {hint}it must be one of {', '.join(REWARDS)}")
    given = {"name": name, **({} if path is None else {"path": str(path)})}
    paths = {key: str(value) for key, value in keys.items() if isinstance(value, Path)}
    try:
        return RewardSettings.model_validate(given | keys | paths)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'][1:])) or 'it'}: {fault['msg']}" for fault in error.errors()]
        raise UserError(f"reward {name!r} cannot be loaded so; {'; '.join(faults)}") from None
