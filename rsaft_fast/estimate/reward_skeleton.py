"""Rewards on the meta device, from their config files: every shape, no weight."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from rsaft_fast.errors import UserError
from rsaft_fast.estimate.published import IMAGE_REWARD_TEXT, IMAGE_REWARD_VISION, published_reward
from rsaft_fast.estimate.skeleton import LengthTokenizer, quiet
from rsaft_fast.hub import cached_file
from rsaft_fast.pretrained import library_errors
from rsaft_fast.rewards.aesthetic import IMAGE_TOWER, AestheticReward
from rsaft_fast.rewards.base import Reward, RewardSpec
from rsaft_fast.rewards.clip import ClipReward, image_processor_config, preprocess_from_config
from rsaft_fast.rewards.combine import Combination, Part
from rsaft_fast.rewards.files import checkpoint_file, read_json
from rsaft_fast.rewards.heads import AffineHead
from rsaft_fast.rewards.image_reward import CONFIG, FILE, BlipScorer, ImageReward, text_config, vision_config
from rsaft_fast.rewards.preprocess import Preprocess
from rsaft_fast.rewards.registry import SingleReward, resolve_path

Found = tuple[Reward, list[str]]
"""A reward, and what there is to say about where it came from."""


def skeleton_reward(settings: SingleReward) -> Found:
    """The reward on the meta device.

    Raises:
        UserError: a family that cannot be walked on shapes alone; no checkpoint there, and no published one of that
            name is known here.
    """
    if settings.name not in SKELETONS:
        raise UserError(f"the memory of reward.name {settings.name} is not estimated; {', '.join(SKELETONS)} are")
    with quiet():
        return SKELETONS[settings.name](settings)


def _clip(settings: SingleReward) -> Found:
    model, prepare, notes = _clip_model(settings, settings.path)
    tokenizer = LengthTokenizer(model.config.text_config.max_position_embeddings)
    # The scale that reads the weight logit_scale takes the same bytes.
    return ClipReward(model, tokenizer, prepare, _spec(settings), scale="cosine", **_options(settings)), notes


def _aesthetic(settings: SingleReward) -> Found:
    model, prepare, notes = _clip_model(settings, settings.image_tower or IMAGE_TOWER)
    with torch.device("meta"):
        head = AffineHead(model.config.projection_dim)
    return AestheticReward(model, head, prepare, _spec(settings), **_options(settings)), notes


def _image_reward(settings: SingleReward) -> Found:
    file = _local_file(settings.path, FILE)
    notes = []
    if file is None:
        vision, text = transformers.BlipVisionConfig(**IMAGE_REWARD_VISION), IMAGE_REWARD_TEXT
        notes = [f"{settings.path} is not on this machine: shapes are those of the published ImageReward v1.0"]
    else:
        vision, text = vision_config(_shapes(file), repr(str(file))), read_json(file.parent / CONFIG)
    with torch.device("meta"):
        model = BlipScorer(vision, text_config(text, vision.hidden_size))
        head = AffineHead(model.text_encoder.config.hidden_size)
    prepare = Preprocess((vision.image_size, vision.image_size), "shortest_crop", clamp=settings.clamp)
    tokenizer = LengthTokenizer(text["max_position_embeddings"])
    return ImageReward(model, head, tokenizer, prepare, _spec(settings), **_options(settings)), notes


def _combination(settings: SingleReward) -> Found:
    found = [(part, *skeleton_reward(part)) for part in settings.parts]
    parts = [Part(part.shown, reward, part.weight) for part, reward, _ in found]
    return Combination(parts, settings.how, settings.penalty), [note for *_, notes in found for note in notes]


SKELETONS: dict[str, Callable[[Any], Found]] = {
    **dict.fromkeys(("clip", "pickscore", "clipscore", "hpsv2", "hpsv2.1"), _clip),
    "imagereward": _image_reward,
    "aesthetic": _aesthetic,
    "combination": _combination,
}


def _options(settings: SingleReward) -> dict[str, Any]:
    return {"dtype": getattr(torch, settings.dtype), "checkpoint": settings.checkpoint}


def _spec(settings: SingleReward) -> RewardSpec:
    return RewardSpec(name=settings.name, source=settings.path)


def _clip_model(settings: SingleReward, source: str) -> tuple[transformers.CLIPModel, Preprocess, list[str]]:
    path, notes, prepare = resolve_path(source), [], {}
    folder = Path(path)
    if not os.path.exists(folder):
        cached = cached_file(path, "config.json")
        folder = cached.parent if cached is not None else folder
    if os.path.isfile(folder / "config.json"):
        config, prepare = read_json(folder / "config.json"), image_processor_config(folder)
    else:
        config = published_reward(f"{settings.name} {path}")
        if config is None:
            raise UserError(
                f"reward.path {source!r} is neither a folder with a config.json nor in the hub's cache here, "
                "and no published architecture is known by that name; give a folder, or download the reward first"
            )
        notes = [f"{path} has no config.json on this machine: shapes are those of the published CLIPModel of that name"]
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config))
    return model, preprocess_from_config(prepare, model.config.vision_config.image_size, settings.clamp), notes


def _local_file(path: str, name: str) -> Path | None:
    """The file that a reward's path means, as far as it is on this machine."""
    place = Path(path)
    if os.path.exists(place):
        return checkpoint_file(path, name)
    return cached_file(path, name)


def _shapes(file: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors on the meta device; of the weights nothing is read."""
    with library_errors(f"{str(file)!r} cannot be read", "download it anew"):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as content:
                return {
                    name: torch.empty(content.get_slice(name).get_shape(), device="meta") for name in content.keys()
                }
        return torch.load(file, map_location="meta", weights_only=True, mmap=True)
