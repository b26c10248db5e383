"""Which reward families there are, and the settings that name one."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from rsaft_fast.errors import UserError
from rsaft_fast.rewards.aesthetic import IMAGE_TOWER, load_aesthetic
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.clip import CLIPSCORE_PREFIX, ClipReward, Scale
from rsaft_fast.rewards.hps import Resize, load_hps
from rsaft_fast.rewards.image_reward import load_image_reward
from rsaft_fast.rewards.preprocess import Clamp
from rsaft_fast.settings import Settings

_PLAYGROUND = "playground/"


class RewardSettings(Settings):
    """Which reward, and how it is computed.

    Attributes:
        name: the family. clip is any transformers CLIPModel with its tokenizer; pickscore and clipscore are such
            folders too. hpsv2 and hpsv2.1 read the published HPS_v2*_compressed.pt, imagereward ImageReward.pt with
            med_config.json beside it, aesthetic sac+logos+ava1-l14-linearMSE.pth.
        path: folder, file or hub id of the weights, such as yuvalkirstain/PickScore_v1, xswu/HPSv2,
            THUDM/ImageReward. playground/fair and playground/brittle ship with the package.
        scale: what the cosine is multiplied by. logit is exp(logit_scale), PickScore's scale (about 21); percent is
            100, as HPSv2 is reported; cosine leaves it; clipscore is 2.5, negative cosines counted as 0. null is the
            family's own (clip and pickscore logit, hpsv2 and hpsv2.1 cosine, clipscore its own).
        resize: of hpsv2 and hpsv2.1. aa is the original with torchvision 0.17 or later, legacy_noaa with an earlier
            one; published scores differ by up to two points between them.
        clamp: values outside [0, 1] before the reward: hard clips the value, which then has no gradient; ste clips
            the value and passes the gradient; none leaves both.
        dtype: what the towers compute in; features and scores are in float32 at least. Below float32 the effect of a
            small image perturbation is rounded away.
        checkpoint: recompute the layers in the backward pass instead of keeping their activations.
        tokenizer: of hpsv2, hpsv2.1 (CLIP's: folder, hub id or bpe_simple_vocab_16e6.txt.gz) and imagereward
            (bert-base-uncased's: folder, hub id or vocab.txt). null is the one beside the weights, else the hub's.
        image_tower: of aesthetic: folder or hub id of OpenAI's CLIP ViT-L/14. null is the hub's.
    """

    name: str = "clip"
    path: str = Field(min_length=1)
    scale: Scale | None = None
    resize: Resize = "aa"
    clamp: Clamp = "hard"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    checkpoint: bool = True
    tokenizer: str | None = None
    image_tower: str | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(REWARDS)}"
            raise ValueError(f"reward {name!r} is unknown; {hint}")
        return name

    @model_validator(mode="after")
    def _applies(self) -> RewardSettings:
        for key, families in _KEYS_OF.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.name not in families:
                raise ValueError(f"{key} is a key of {', '.join(families)}, not of {self.name}; leave it out")
        return self


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


def _common(settings: RewardSettings, device: torch.device | str) -> dict[str, Any]:
    return {
        "clamp": settings.clamp,
        "dtype": getattr(torch, settings.dtype),
        "checkpoint": settings.checkpoint,
        "device": device,
    }


def _with_prefix(prompt: str) -> str:
    return CLIPSCORE_PREFIX + prompt


def _load_clip(settings: RewardSettings, device: torch.device | str) -> Reward:
    family = _CLIP_FAMILIES[settings.name]
    scale = settings.scale or family["scale"]
    reward = ClipReward.from_pretrained(
        resolve_path(settings.path),
        name=settings.name,
        **family | {"scale": scale},
        **_common(settings, device),
    )
    # The name that the user gave, not where this installation keeps it.
    reward.spec = replace(reward.spec, source=settings.path)
    return reward


def _load_hps(settings: RewardSettings, device: torch.device | str) -> Reward:
    return load_hps(
        settings.path,
        settings.name,
        scale=settings.scale or "cosine",
        resize=settings.resize,
        tokenizer=settings.tokenizer,
        **_common(settings, device),
    )


def _load_image_reward(settings: RewardSettings, device: torch.device | str) -> Reward:
    return load_image_reward(settings.path, tokenizer=settings.tokenizer, **_common(settings, device))


def _load_aesthetic(settings: RewardSettings, device: torch.device | str) -> Reward:
    tower = settings.image_tower or IMAGE_TOWER
    return load_aesthetic(settings.path, image_tower=tower, **_common(settings, device))


# Scale, activation function (None: whatever the checkpoint says) and what is done to a prompt.
_CLIP_FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {"scale": "logit"},
    "pickscore": {"scale": "logit", "activation": "gelu"},
    "clipscore": {"scale": "clipscore", "edit_prompt": _with_prefix},
}
_HPS = ("hpsv2", "hpsv2.1")
_KEYS_OF = {
    "scale": (*_CLIP_FAMILIES, *_HPS),
    "resize": _HPS,
    "tokenizer": (*_HPS, "imagereward"),
    "image_tower": ("aesthetic",),
}
REWARDS: dict[str, Callable[[RewardSettings, torch.device | str], Reward]] = {
    **dict.fromkeys(_CLIP_FAMILIES, _load_clip),
    **dict.fromkeys(_HPS, _load_hps),
    "imagereward": _load_image_reward,
    "aesthetic": _load_aesthetic,
}
