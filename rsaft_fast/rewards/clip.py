"""Rewards that are a `transformers.CLIPModel`: PickScore, CLIP score, the playground's proxies."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from rsaft_fast.errors import UserError
from rsaft_fast.memory.checkpointing import checkpoint_clip_vision
from rsaft_fast.rewards.base import Reward, RewardSpec, check_prompts
from rsaft_fast.rewards.files import checkpoint_folder, first_line, read_json, sha256_of, weight_files
from rsaft_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, Clamp, Preprocess, without_autocast

Scale = Literal["logit", "cosine"]
# PIL's numbers, which preprocessor_config.json stores.
_FILTERS = {2: "bilinear", 3: "bicubic"}
_CACHED_PROMPTS = 8192


class ClipReward(Reward):
    """Similarity of an image's and a prompt's CLIP embeddings.

    Text carries no gradient here: each prompt is encoded once, alone, so that its embedding never depends on which
    prompts came with it, and kept (the `_CACHED_PROMPTS` most recent).

    Attributes:
        model: the frozen CLIPModel.
        prepare: images to the image tower's input.
        scale: "logit" multiplies the cosine by exp(logit_scale) (PickScore, about 21); "cosine" does not.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        prepare: Preprocess,
        spec: RewardSpec,
        *,
        scale: Scale = "logit",
        dtype: torch.dtype = torch.float32,
        checkpoint: bool = True,
    ):
        super().__init__()
        if scale not in ("logit", "cosine"):
            raise UserError(f"reward scale {scale!r} is unknown; choose logit or cosine")
        # Read before the cast: in bf16 PickScore's factor of 100 would become 98.9.
        self.score_factor = math.exp(float(model.logit_scale.detach())) if scale == "logit" else 1.0
        self.model = model.to(dtype).requires_grad_(False)
        self.tokenizer = tokenizer
        self.prepare = prepare
        self.spec = spec
        self.scale = scale
        self._text_cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        if checkpoint:
            checkpoint_clip_vision(self.model)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        scale: Scale = "logit",
        clamp: Clamp = "hard",
        dtype: torch.dtype = torch.float32,
        checkpoint: bool = True,
        device: torch.device | str = "cpu",
        name: str = "clip",
    ) -> ClipReward:
        """Load a folder saved by `CLIPModel.save_pretrained` with its tokenizer, or a hub id of that layout.

        Args:
            path: folder or hub id.
            scale: see the class.
            clamp: see `Preprocess`.
            dtype: of both towers; normalising and the dot product are in fp32 at least.
            checkpoint: recompute the image tower's layers in the backward pass instead of keeping their activations.
            device: where it lives.
            name: the family name in the spec.

        Raises:
            UserError: a missing folder, file or weight, another model's checkpoint, or preprocessing that this
                module does not do.
        """
        folder = checkpoint_folder(path)
        config = read_json(folder / "config.json")
        if config.get("model_type") != "clip" or "CLIPModel" not in (config.get("architectures") or ["CLIPModel"]):
            raise UserError(
                f"{str(path)!r} is not a CLIPModel (model_type {config.get('model_type')!r}, architectures "
                f"{config.get('architectures')}); this reward needs both CLIP towers and their projections"
            )
        files = weight_files(folder)
        model = _load_model(folder)
        prepare = preprocess_from_config(image_processor_config(folder), model.config.vision_config.image_size, clamp)
        spec = RewardSpec(
            name=name, source=str(path), sha256=sha256_of(files), preprocessing=prepare.describe() | {"scale": scale}
        )
        tokenizer = _load_tokenizer(folder)
        vocabulary = model.config.text_config.vocab_size
        if len(tokenizer) > vocabulary:
            raise UserError(
                f"{str(path)!r}: the tokenizer has {len(tokenizer)} tokens and the text tower {vocabulary}; "
                "save the tokenizer that belongs to the model"
            )
        return cls(model, tokenizer, prepare, spec, scale=scale, dtype=dtype, checkpoint=checkpoint).to(device)

    @property
    def dtype(self) -> torch.dtype:
        """What the towers compute in."""
        return self.model.dtype

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) of any size, nominally 0 to 1, to (B, 3, size, size) in fp32 (float64 where either the
        images or the model are float64)."""
        if self.dtype == torch.float64 and images.is_floating_point():
            images = images.double()
        return self.prepare(images)

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) in fp32 (float64 for a float64 model) of preprocessed images.

        Raises:
            UserError: prompts that are not one string an image.
        """
        check_prompts(prompts, len(inputs))
        with without_autocast(inputs.device):
            text = self.encode_text(prompts)
            if len(inputs) == 0:
                return text.sum(1) + inputs.to(text.dtype).sum((1, 2, 3))
            image = _unit(self.model.get_image_features(pixel_values=inputs.to(self.dtype)).pooler_output)
            return (image * text).sum(1) * self.score_factor

    def encode_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit text embeddings (B, D) in fp32 (float64 for a float64 model), without gradient; cut at the context
        length, the end token kept."""
        # A prompt pushed out of the cache by a later one of the same batch is still needed here.
        embeddings = {prompt: self._encode_one(prompt) for prompt in dict.fromkeys(prompts)}
        if not prompts:
            return self.model.logit_scale.new_zeros(0, self.model.config.projection_dim, dtype=_score_dtype(self.dtype))
        return torch.stack([embeddings[prompt] for prompt in prompts])

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> torch.Tensor:
        if prompt in self._text_cache:
            self._text_cache.move_to_end(prompt)
            return self._text_cache[prompt]
        tokens = self.tokenizer(
            [prompt],
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        features = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        self._text_cache[prompt] = _unit(features.pooler_output)[0]
        if len(self._text_cache) > _CACHED_PROMPTS:
            self._text_cache.popitem(last=False)
        return self._text_cache[prompt]

    def _apply(self, fn: Callable, *args, **kwargs) -> ClipReward:
        # Embeddings of the old device or dtype are stale.
        self._text_cache.clear()
        return super()._apply(fn, *args, **kwargs)


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, in fp32 at least: a cosine near 0.25 moves in steps of 0.002 in bf16."""
    return nn.functional.normalize(features.to(_score_dtype(features.dtype)), dim=-1)


def _load_model(folder: Path) -> CLIPModel:
    try:
        model, info = CLIPModel.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True, weights_only=True
        )
    except Exception as error:
        # safetensors, pickle, config validation and shape checks each raise their own kinds.
        raise UserError(
            f"{str(folder)!r} does not load as a CLIPModel ({type(error).__name__}: {first_line(error)}); "
            "save or download the checkpoint anew"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{str(folder)!r} lacks {len(missing)} weights of its CLIPModel, first {missing[0]!r}; "
            "it would score at random: save or download the checkpoint anew"
        )
    return model


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    # Without them transformers makes up a tokenizer of three tokens, to which every prompt is the same.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"{str(folder)!r} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); "
            "save it beside the model with tokenizer.save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(
            f"{str(folder)!r} has no usable tokenizer ({type(error).__name__}: {first_line(error)}); "
            "save it beside the model with tokenizer.save_pretrained"
        ) from error


def image_processor_config(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json, or the image part of processor_config.json; empty where there is neither."""
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return read_json(folder / "processor_config.json").get("image_processor", {})
    return {}


def preprocess_from_config(config: Mapping[str, Any], image_size: int, clamp: Clamp = "hard") -> Preprocess:
    """What a CLIP image processor's config does to an image, for a tower of `image_size` pixels a side.

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
        filter=_FILTERS[resample],
        clamp=clamp,
        mean=tuple(config.get("image_mean", CLIP_MEAN)) if normalised else (0.0, 0.0, 0.0),
        std=tuple(config.get("image_std", CLIP_STD)) if normalised else (1.0, 1.0, 1.0),
    )
