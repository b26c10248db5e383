"""Rewards that are a cosine in CLIP's space: PickScore, CLIPScore, HPSv2 (see `hps`), the playground's proxies."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from rsaft_fast.errors import UserError
from rsaft_fast.rewards.base import RewardSpec, TowerOptions, TowerReward, check_prompts, score_dtype, unit
from rsaft_fast.rewards.files import checkpoint_folder, local_folder, read_json, weight_files
from rsaft_fast.rewards.open_clip import VIT_H_14
from rsaft_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, Clamp, CropOffset, Preprocess, without_autocast
from rsaft_fast.rewards.settings import TowerSettings, register, shipped
from rsaft_fast.rewards.text import LengthTokenizer, clip_tokenizer, require_vocabulary
from rsaft_fast.rewards.weights import load_pretrained
from rsaft_fast.settings import UserPlace
from rsaft_fast.truncation import cut_prompts_note

Scale = Literal["logit", "cosine", "percent", "clipscore"]
# What the cosine is multiplied by; "logit" takes the checkpoint's own exp(logit_scale).
FACTORS: dict[str, float] = {"cosine": 1.0, "percent": 100.0, "clipscore": 2.5}
# Hessel et al. 2021 (arXiv 2104.08718) score a caption after these words.
CLIPSCORE_PREFIX = "A photo depicts "
# PIL's numbers, which preprocessor_config.json stores.
_FILTERS = {2: "bilinear", 3: "bicubic"}
_CACHED_PROMPTS = 8192

CLIP_VIT_L: dict[str, Any] = {
    "projection_dim": 768,
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    },
}
"""OpenAI's ViT-L/14: its public config.json, as far as shapes follow from it."""

# Words of a family or hub id, and the architecture that is published under it.
_PUBLISHED = {"pickscore": VIT_H_14, "hps": VIT_H_14, "vit-h-14": VIT_H_14, "clip-vit-large-patch14": CLIP_VIT_L}


class ClipReward(TowerReward):
    """Similarity of an image's and a prompt's CLIP embeddings.

    Text carries no gradient here: each prompt is encoded once, alone, so that its embedding never depends on which
    prompts came with it, and kept (the `_CACHED_PROMPTS` most recent).

    Attributes:
        scale: "logit" multiplies the cosine by exp(logit_scale) (PickScore, about 21), "percent" by 100 (how HPSv2 is
            reported), "clipscore" by 2.5 with negative cosines counted as 0; "cosine" leaves it.
        edit_prompt: what happens to a prompt before its tokens.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        prepare: Preprocess,
        spec: RewardSpec,
        *,
        scale: Scale = "logit",
        edit_prompt: Callable[[str], str] = str,
        **tower: Unpack[TowerOptions],
    ):
        if scale != "logit" and scale not in FACTORS:
            raise UserError(f"reward scale {scale!r} is unknown; choose logit, {', '.join(FACTORS)}")
        # Read before the cast: in bf16 PickScore's factor of 100 would become 98.9.
        factor = math.exp(float(model.logit_scale.detach())) if scale == "logit" else FACTORS[scale]
        super().__init__(model, prepare, spec, **tower)
        self.score_factor = factor
        self.tokenizer = tokenizer
        self.scale = scale
        self.edit_prompt = edit_prompt
        self.has_text_tower = True
        self._text_cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    def tower_layers(self) -> list[nn.Module]:
        """Those of the image tower; the text tower reads each prompt once, and leaves."""
        return list(self.model.vision_model.encoder.layers)

    @property
    def context_length(self) -> int:
        """Tokens that are read of a prompt, start and end included."""
        return self.model.config.text_config.max_position_embeddings

    def embed_images(self, inputs: torch.Tensor) -> torch.Tensor:
        """Unit features (B, D), fp32 at least, of preprocessed images."""
        with without_autocast(inputs.device):
            return unit(self.model.get_image_features(pixel_values=inputs.to(self.dtype)).pooler_output)

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) in fp32 (float64 for a float64 model) of preprocessed images.

        Raises:
            UserError: prompts that are not one string an image.
        """
        check_prompts(prompts, len(inputs))
        if len(inputs) == 0:
            return self.no_scores(inputs)
        with without_autocast(inputs.device):
            text = self.encode_text(prompts)
            cosine = (self.embed_images(inputs) * text).sum(1)
            return (cosine.clamp(min=0) if self.scale == "clipscore" else cosine) * self.score_factor

    def prompt_notes(self, prompts: Sequence[str]) -> list[str]:
        """A line where some are cut at the context length."""
        edited = [self.edit_prompt(prompt) for prompt in prompts]
        note = cut_prompts_note(self.tokenizer, edited, self.context_length, f"reward {self.spec.name}")
        return [note] if note else []

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Encode the prompts, keep them all, and drop the text tower; other prompts are refused from then on."""
        kept = {prompt: self._encode_one(prompt) for prompt in prompts}
        self._text_cache = OrderedDict(kept)
        del self.model.text_model, self.model.text_projection
        self.has_text_tower = False

    def encode_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Encode prompts as unit embeddings (B, D), without gradient.

        In fp32 (float64 for a float64 model); cut at the context length, the end token kept.
        """
        # A prompt pushed out of the cache by a later one of the same batch is still needed here.
        embeddings = {prompt: self._encode_one(prompt) for prompt in dict.fromkeys(prompts)}
        if not prompts:
            return self.model.logit_scale.new_zeros(0, self.model.config.projection_dim, dtype=score_dtype(self.dtype))
        return torch.stack([embeddings[prompt] for prompt in prompts])

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> torch.Tensor:
        if prompt in self._text_cache:
            self._text_cache.move_to_end(prompt)
            return self._text_cache[prompt]
        if not self.has_text_tower:
            raise UserError(
                f"prompt {prompt!r} is not among the {len(self._text_cache)} that were encoded before the text tower "
                "was dropped; name it in keep_prompts, or keep the tower"
            )
        tokens = self.tokenizer(
            [self.edit_prompt(prompt)],
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        ).to(self.model.device)
        features = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        self._text_cache[prompt] = unit(features.pooler_output)[0]
        if len(self._text_cache) > _CACHED_PROMPTS:
            self._text_cache.popitem(last=False)
        return self._text_cache[prompt]

    def _apply(self, fn: Callable, *args, **kwargs) -> ClipReward:
        applied = super()._apply(fn, *args, **kwargs)
        if self.has_text_tower:
            # Embeddings of the old device or dtype are stale.
            self._text_cache.clear()
        else:
            device, dtype = self.model.logit_scale.device, score_dtype(self.dtype)
            self._text_cache = OrderedDict((k, v.to(device, dtype)) for k, v in self._text_cache.items())
        return applied


@register
class ClipSettings(TowerSettings):
    """Any transformers CLIPModel with its tokenizer.

    Attributes:
        scale: what the cosine is multiplied by. logit is exp(logit_scale), PickScore's scale (about 21); percent is
            100, as HPSv2 is reported; cosine leaves it; clipscore is 2.5, negative cosines counted as 0. null is the
            family's own (clip and pickscore logit, hpsv2 and hpsv2.1 cosine, clipscore its own).
        own_scale: what null stands for.
        activation: what the published model was trained with; a config with another one is refused. None takes any.
        crop_offset: see `Preprocess`; of originals that prepare pictures with torchvision, "half_even".
    """

    name: Literal["clip"] = "clip"
    scale: Scale | None = None

    own_scale: ClassVar[Scale] = "logit"
    activation: ClassVar[str | None] = None
    crop_offset: ClassVar[CropOffset] = "down"

    def edit_prompt(self, prompt: str) -> str:
        """Change a prompt before its tokens."""
        return prompt

    def load(self, device: torch.device | str = "cpu") -> ClipReward:
        """Load a folder saved by `CLIPModel.save_pretrained` with its tokenizer, or a hub id of that layout.

        Raises:
            UserError: a missing folder, file or weight, another model's checkpoint, or preprocessing that this
                module does not do.
        """
        folder = checkpoint_folder(self.place)
        model = load_clip_model(folder, self.path, self.activation)
        size = model.config.vision_config.image_size
        prepare = preprocess_from_config(image_processor_config(folder), size, self.clamp, self.crop_offset)
        tokenizer = clip_tokenizer(folder)
        require_vocabulary(tokenizer, model.config.text_config.vocab_size, repr(self.path))
        scale = self.scale or self.own_scale
        spec = self.spec(weight_files(folder), prepare.describe() | {"scale": scale})
        options = {"scale": scale, "edit_prompt": self.edit_prompt, **self.tower}
        return ClipReward(model, tokenizer, prepare, spec, **options).to(device)

    def shapes(self, log: Callable[[str], None]) -> ClipReward:
        """Build it from the config.json there, or from what is published."""
        model, prepare = clip_shapes(self, self.path, log)
        tokenizer = LengthTokenizer(model.config.text_config.max_position_embeddings)
        # The scale that reads the weight logit_scale takes the same bytes.
        return ClipReward(model, tokenizer, prepare, self.spec([], {}), scale="cosine", **self.tower)


@register
class PickScoreSettings(ClipSettings):
    """PickScore v1 (arXiv 2305.01569).

    Attributes:
        path: folder or hub id of its CLIPModel.
    """

    name: Literal["pickscore"] = "pickscore"
    path: UserPlace = "yuvalkirstain/PickScore_v1"

    activation: ClassVar[str | None] = "gelu"


@register
class ClipScoreSettings(ClipSettings):
    """CLIPScore (arXiv 2104.08718) of any transformers CLIPModel: 2.5 times the cosine, negative ones counted as 0."""

    name: Literal["clipscore"] = "clipscore"

    own_scale: ClassVar[Scale] = "clipscore"
    # Its authors prepare pictures with torchvision.
    crop_offset: ClassVar[CropOffset] = "half_even"

    def edit_prompt(self, prompt: str) -> str:
        """The caption as CLIPScore reads it."""
        return CLIPSCORE_PREFIX + prompt


class OpenAIClipSettings(ClipSettings):
    """OpenAI's CLIP as its own package computes it: what other rewards see pictures with."""

    activation: ClassVar[str | None] = "quick_gelu"
    crop_offset: ClassVar[CropOffset] = "half_even"


def load_clip_model(folder: Path, source: str, activation: str | None = None) -> CLIPModel:
    """The CLIPModel saved in a folder.

    Raises:
        UserError: another model's folder, a missing file or weight, or towers with another activation function.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip" or "CLIPModel" not in (config.get("architectures") or ["CLIPModel"]):
        raise UserError(
            f"{source!r} is not a CLIPModel (model_type {config.get('model_type')!r}, architectures "
            f"{config.get('architectures')}); this reward needs both CLIP towers and their projections"
        )
    weight_files(folder)
    model = load_pretrained(folder, CLIPModel)
    for tower in (model.config.vision_config, model.config.text_config):
        if activation is not None and tower.hidden_act != activation:
            raise UserError(
                f"{source!r} computes with {tower.hidden_act}, the published reward with {activation}: its scores "
                "would be shifted; mend hidden_act in config.json, or give the published checkpoint"
            )
    return model


def image_processor_config(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json, or the image part of processor_config.json; empty where there is neither."""
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return read_json(folder / "processor_config.json").get("image_processor", {})
    return {}


def preprocess_from_config(
    config: Mapping[str, Any], image_size: int, clamp: Clamp = "hard", crop_offset: CropOffset = "down"
) -> Preprocess:
    """What a CLIP image processor's config does to an image, for a tower of `image_size` pixels a side.

    Args:
        config: of the processor.
        image_size: of the tower.
        clamp, crop_offset: see `Preprocess`; no config says them.

    Raises:
        UserError: a choice that is not done here, or one whose result does not fit the tower.
    """
    for key in ("do_resize", "do_rescale"):
        if not config.get(key, True):
            raise UserError(f"preprocessor_config.json has {key}=false; this reward resizes and takes images 0 to 1")
    if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise UserError(f"preprocessor_config.json has rescale_factor={config['rescale_factor']}; expected 1/255")
    resample = config.get("resample", 3)
    if resample not in _FILTERS:
        raise UserError(f"preprocessor_config.json has resample={resample}; supported: 2 (bilinear), 3 (bicubic)")
    size = config.get("size", image_size)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = config.get("crop_size", image_size)
    crop = (crop, crop) if isinstance(crop, int) else (crop.get("height"), crop.get("width"))
    square = (image_size, image_size)
    if "shortest_edge" in size and config.get("do_center_crop", True) and crop == square:
        geometry, resize_to = "shortest_crop", size["shortest_edge"]
    elif (size.get("height"), size.get("width")) == square:
        geometry, resize_to = "stretch", None
    else:
        raise UserError(
            f"preprocessor_config.json resizes to {size} and crops to {crop}; the image tower takes "
            f"{image_size}x{image_size}: set shortest_edge and a crop of {image_size}, or that height and width"
        )
    normalised = config.get("do_normalize", True)
    return Preprocess(
        size=square,
        geometry=geometry,
        resize_to=resize_to,
        crop_offset=crop_offset,
        filter=_FILTERS[resample],
        clamp=clamp,
        mean=tuple(config.get("image_mean", CLIP_MEAN)) if normalised else (0.0, 0.0, 0.0),
        std=tuple(config.get("image_std", CLIP_STD)) if normalised else (1.0, 1.0, 1.0),
    )


def clip_shapes(settings: TowerSettings, source: str, log: Callable[[str], None]) -> tuple[CLIPModel, Preprocess]:
    """Make the CLIPModel at `source` on the meta device, and its preprocessing.

    Config files are taken from there or the hub's cache, else from what is published under that name.

    Raises:
        UserError: neither is known.
    """
    path, prepare = shipped(source), {}
    folder = local_folder(path, "config.json")
    if folder is not None:
        config, prepare = read_json(folder / "config.json"), image_processor_config(folder)
    else:
        config = published_clip(f"{settings.name} {path}")
        if config is None:
            raise UserError(
                f"reward.path {source!r} is neither a folder with a config.json nor in the hub's cache here, "
                "and no published architecture is known by that name; give a folder, or download the reward first"
            )
        log(f"{path} has no config.json on this machine: shapes are those of the published CLIPModel of that name")
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig.from_dict(config))
    return model, preprocess_from_config(prepare, model.config.vision_config.image_size, settings.clamp)


def published_clip(hub_id: str) -> dict[str, Any] | None:
    """The CLIPConfig of the published reward of that id, or None."""
    return next((config for word, config in _PUBLISHED.items() if word in hub_id.lower()), None)
