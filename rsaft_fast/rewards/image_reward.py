"""ImageReward v1.0 (arXiv 2304.05977): BLIP-L, its text encoder attending to the image, and a score head."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import nn
from transformers import BlipTextModel, BlipVisionModel, PreTrainedTokenizerBase
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig

from rsaft_fast.errors import UserError
from rsaft_fast.rewards.base import RewardSpec, TowerOptions, TowerReward, check_prompts, score_dtype
from rsaft_fast.rewards.files import checkpoint_file, local_file, read_json
from rsaft_fast.rewards.heads import AffineHead
from rsaft_fast.rewards.preprocess import Preprocess, without_autocast
from rsaft_fast.rewards.settings import TowerSettings, register
from rsaft_fast.rewards.text import LengthTokenizer, bert_tokenizer, require_vocabulary
from rsaft_fast.rewards.weights import State, fill, read_state
from rsaft_fast.settings import UserPlace
from rsaft_fast.truncation import cut_prompts_note

FILE, CONFIG = "ImageReward.pt", "med_config.json"
# The published repository holds no tokenizer.
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
# Of both published BLIP vision transformers; the weights' shapes do not tell the heads.
_HEAD_WIDTH = 64

PUBLISHED_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
}
PUBLISHED_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30524,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
"""Keys of the published med_config.json."""

_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_VISION_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_VISION_LAYER = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
# Of BLIP's contrastive loss, and a constant: neither enters the score.
_DROPPED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class BlipScorer(nn.Module):
    """Pixels (B, 3, H, W) and tokens to the text's first feature after it has attended to the image, (B, width)."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig):
        super().__init__()
        self.visual_encoder = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Features of the [CLS] position."""
        image = self.visual_encoder(pixels).last_hidden_state
        return self.text_encoder(tokens, attention_mask=mask, encoder_hidden_states=image).last_hidden_state[:, 0]


class ImageReward(TowerReward):
    """(head(BLIP(image, prompt)) - mean) / std with the published mean and std: about -2 to 2, 0 on average.

    The text attends to the image, so only tokens can be kept for a prompt.

    Attributes:
        head: in fp32 at least, whatever BLIP computes in.
    """

    model: BlipScorer

    def __init__(
        self,
        model: BlipScorer,
        head: AffineHead,
        tokenizer: PreTrainedTokenizerBase,
        prepare: Preprocess,
        spec: RewardSpec,
        **tower: Unpack[TowerOptions],
    ):
        super().__init__(model, prepare, spec, head=head, **tower)
        self.tokenizer = tokenizer

    def tower_layers(self) -> list[nn.Module]:
        """Those of both encoders."""
        return [*self.model.visual_encoder.encoder.layers, *self.model.text_encoder.encoder.layer]

    def shared_blocks(self) -> list[nn.Module]:
        """Its layers and the vocabulary's embedding."""
        return [*self.tower_layers(), self.model.text_encoder.embeddings.word_embeddings]

    def prompt_notes(self, prompts: Sequence[str]) -> list[str]:
        """A line where some are cut at 35 tokens."""
        note = cut_prompts_note(self.tokenizer, prompts, MAX_TOKENS, f"reward {self.spec.name}")
        return [note] if note else []

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) in fp32 (float64 for a float64 model) of preprocessed images; prompts are cut at 35 tokens.

        Raises:
            UserError: prompts that are not one string an image.
        """
        check_prompts(prompts, len(inputs))
        if len(inputs) == 0:
            return self.no_scores(inputs)
        # Always padded to the same length: a score then never depends on the other prompts' lengths.
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(inputs.device)
        with without_autocast(inputs.device):
            features = self.model(inputs.to(self.dtype), tokens["input_ids"], tokens["attention_mask"])
            return (self.head(features.to(score_dtype(self.dtype))) - MEAN) / STD


@register
class ImageRewardSettings(TowerSettings):
    """ImageReward v1.0 (arXiv 2304.05977).

    Attributes:
        path: ImageReward.pt with med_config.json beside it: that file, its folder, or a hub id.
        tokenizer: bert-base-uncased's: folder, hub id or vocab.txt. null is a vocab.txt beside the weights, else the
            hub's.
    """

    name: Literal["imagereward"] = "imagereward"
    path: UserPlace = "THUDM/ImageReward"
    tokenizer: UserPlace | None = None

    def load(self, device: torch.device | str = "cpu") -> ImageReward:
        """Load both encoders and the head.

        Raises:
            UserError: a missing file or weight, another model's checkpoint, or a pickle with more than tensors in it.
        """
        file = checkpoint_file(self.place, FILE)
        local = os.path.exists(Path(self.place).expanduser())
        config = read_json(file.parent / CONFIG if local else checkpoint_file(self.place, CONFIG))
        model, head = _build(read_state(file), config, repr(str(file)))
        source = self.tokenizer or (file.parent if os.path.isfile(file.parent / "vocab.txt") else TOKENIZER)
        words = bert_tokenizer(source)
        require_vocabulary(words, model.text_encoder.config.vocab_size, repr(str(source)))
        return self._of(model, head, words, [file]).to(device)

    def shapes(self, log: Callable[[str], None]) -> ImageReward:
        """Build it from the checkpoint's header, or from what is published."""
        file = local_file(self.place, FILE)
        if file is None:
            log(f"{self.path} is not on this machine: shapes are those of the published ImageReward v1.0")
            model, head = _empty(BlipVisionConfig(**PUBLISHED_VISION), PUBLISHED_TEXT)
        else:
            model, head = _build(read_state(file, shapes_alone=True), read_json(file.parent / CONFIG), repr(str(file)))
        words = LengthTokenizer(model.text_encoder.config.max_position_embeddings)
        return self._of(model, head, words, []).to("meta")

    def _of(
        self, model: BlipScorer, head: AffineHead, words: PreTrainedTokenizerBase | LengthTokenizer, files: list[Path]
    ) -> ImageReward:
        size = model.visual_encoder.config.image_size
        # The original crops with torchvision.
        prepare = Preprocess((size, size), "shortest_crop", crop_offset="half_even", clamp=self.clamp)
        facts = {"mean_score": MEAN, "std_score": STD, "max_tokens": MAX_TOKENS}
        spec = self.spec(files, prepare.describe() | facts, "Apache-2.0")
        return ImageReward(model, head, words, prepare, spec, **self.tower)


def _build(state: State, config: dict[str, Any], source: str) -> tuple[BlipScorer, AffineHead]:
    model, head = _empty(vision_config(state, source), config)
    renamed = to_transformers(state)
    scores = {name.removeprefix("mlp."): v for name, v in renamed.items() if name.startswith("mlp.")}
    fill(model, {name: v for name, v in renamed.items() if not name.startswith("mlp.")}, source)
    fill(head, scores, source)
    return model, head


def _empty(vision: BlipVisionConfig, text: dict[str, Any]) -> tuple[BlipScorer, AffineHead]:
    """The modules on the meta device; `text` is med_config.json."""
    with torch.device("meta"):
        model = BlipScorer(vision, text_config(text, vision.hidden_size))
        return model, AffineHead(model.text_encoder.config.hidden_size)


def vision_config(state: State, source: str) -> BlipVisionConfig:
    """The image encoder's architecture, read off its weights' shapes.

    Raises:
        UserError: the weights that tell it are missing, or of a shape that no square picture has.
    """
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    weights = [state.get(f"blip.visual_encoder.{name}") for name in names]
    if any(weight is None for weight in weights):
        raise UserError(f"{source} lacks the weights of BLIP's image encoder; it is another model's checkpoint")
    patch, positions, hidden = weights
    side = math.isqrt(max(positions.shape[1] - 1, 0)) if positions.ndim == 3 else 0
    if patch.ndim != 4 or side < 1 or side**2 + 1 != positions.shape[1] or len(patch) % _HEAD_WIDTH:
        raise UserError(
            f"{source}: patches {tuple(patch.shape)} and positions {tuple(positions.shape)} are not those of a BLIP "
            "image encoder; it is another model's checkpoint"
        )
    layers = {match[1] for name in state if (match := re.search(r"visual_encoder\.blocks\.(\d+)\.", name))}
    return BlipVisionConfig(
        hidden_size=len(patch),
        intermediate_size=len(hidden),
        num_hidden_layers=len(layers),
        num_attention_heads=len(patch) // _HEAD_WIDTH,
        image_size=side * patch.shape[-1],
        patch_size=patch.shape[-1],
        hidden_act="gelu",
        # Not transformers' default: 1e-5 shifts the score.
        layer_norm_eps=1e-6,
    )


def text_config(config: dict[str, Any], vision_width: int) -> BlipTextConfig:
    """The text encoder's architecture from med_config.json; its cross-attention reads `vision_width` features.

    Raises:
        UserError: a key is missing, or the activation function is another.
    """
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    keys += ("max_position_embeddings", "layer_norm_eps", "hidden_act", "pad_token_id")
    if missing := [key for key in keys if key not in config]:
        raise UserError(f"{CONFIG} lacks {missing[0]!r}; download the published one")
    if config["hidden_act"] != "gelu":
        raise UserError(f"{CONFIG} has hidden_act {config['hidden_act']!r}; the published model computes with gelu")
    # is_decoder only adds the cross-attention's weights here: the attention itself is not causal in this reward.
    return BlipTextConfig(
        **{key: config[key] for key in keys},
        encoder_hidden_size=vision_width,
        is_decoder=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def to_transformers(state: State) -> State:
    """ImageReward's state dict under the names of `BlipScorer`; the score head's stay "mlp.*".

    Raises:
        UserError: a name that ImageReward does not have.
    """
    renamed: State = {}
    for name, value in state.items():
        if name.startswith(_DROPPED):
            continue
        if name.startswith(("blip.text_encoder.", "mlp.")):
            renamed[name.removeprefix("blip.")] = value
        elif name.startswith("blip.visual_encoder."):
            renamed[f"visual_encoder.{_vision_name(name.removeprefix('blip.visual_encoder.'))}"] = value
        else:
            raise UserError(f"{name!r} is not a weight of ImageReward; it is another model's checkpoint")
    return renamed


def _vision_name(name: str) -> str:
    if name in _VISION_NAMES:
        return _VISION_NAMES[name]
    match = _VISION_LAYER.fullmatch(name)
    if match and match[2] in _VISION_PARTS:
        return f"encoder.layers.{match[1]}.{_VISION_PARTS[match[2]]}.{match[3]}"
    raise UserError(f"'blip.visual_encoder.{name}' is not a weight of ImageReward; it is another model's checkpoint")
