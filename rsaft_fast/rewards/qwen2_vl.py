"""Qwen2-VL as HPSv3 computes with it: pictures and tokens to the feature of one token, differentiable in the pictures.

HPSv3 was trained and is scored with transformers 4.45 after a cast of the whole model to bf16, and three facts of that
computation, which transformers 5 no longer does by itself, enter every score:

* a picture's tokens have consecutive positions, as text has, not Qwen2-VL's rows and columns;
* the language model's rotary frequencies are rounded to bf16 (0.2 %, which is an angle of radians at position 900);
* so are the image encoder's, and their products with the position, and the cosines and sines.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLRotaryEmbedding,
    Qwen2VLTextModel,
)

from rsaft_fast.errors import UserError
from rsaft_fast.rewards.preprocess import Clamp, Preprocess, check_images
from rsaft_fast.rewards.weights import State

# The heads cannot be read off the weights' shapes. 8.29e9 parameters with its own vocabulary of 152,064.
QWEN2_VL_7B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584, "mlp_ratio": 4},
    "image_token_id": 151655,
}
# 256 tokens of 28 x 28 pixels: both the least and the most that a picture is resized to.
PIXELS = 256 * 28 * 28
_MAX_RATIO = 200
_IMAGE_THETA = 1e4
_NAMES = (
    (re.compile(r"(?:model\.)?visual\."), "visual."),
    (re.compile(r"model\.language_model\."), "language_model."),
    # Before transformers 4.52.
    (re.compile(r"model\.(?=embed_tokens\.|layers\.|norm\.)"), "language_model."),
)
# The head over the vocabulary, which no score looks at, and constants.
_DROPPED = re.compile(r"lm_head\.|.*\.inv_freq$")


@dataclass(frozen=True)
class SmartResize:
    """Resize of images (B, 3, H, W), nominally 0 to 1, to normalised (B, 3, h, w).

    Both sides multiples of `factor`, the number of pixels near `pixels`, the aspect ratio kept as nearly as that
    allows. Bicubic and antialiased.
    """

    pixels: int = PIXELS
    factor: int = 28
    clamp: Clamp = "hard"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that the image encoder sees.

        Raises:
            UserError: one side is more than 200 times the other.
        """
        if max(height, width) > _MAX_RATIO * min(height, width):
            raise UserError(f"a picture of {height}x{width} is too narrow for HPSv3; the limit is {_MAX_RATIO} to 1")
        sides = [max(self.factor, round(side / self.factor) * self.factor) for side in (height, width)]
        area = sides[0] * sides[1]
        if area > self.pixels:
            shrink = math.sqrt(height * width / self.pixels)
            sides = [max(1, math.floor(side / shrink / self.factor)) * self.factor for side in (height, width)]
        elif area < self.pixels:
            grow = math.sqrt(self.pixels / (height * width))
            sides = [math.ceil(side * grow / self.factor) * self.factor for side in (height, width)]
        return sides[0], sides[1]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocess in fp32, or float64 for float64 images; any autocast is switched off."""
        check_images(images)
        return self._of(*images.shape[-2:])(images)

    def axis_matrices(
        self, shape: tuple[int, int], dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Preprocess.axis_matrices`."""
        return self._of(*shape).axis_matrices(shape, dtype, device)

    def _of(self, height: int, width: int) -> Preprocess:
        return Preprocess(self.size(height, width), "stretch", clamp=self.clamp)

    def describe(self) -> dict[str, Any]:
        """Every choice, for the reward's spec."""
        fixed = Preprocess((self.factor, self.factor), "stretch", clamp=self.clamp).describe()
        del fixed["resize_to"]
        return fixed | {"size": f"multiples of {self.factor}, about {self.pixels} pixels"}


def patchify(pixels: torch.Tensor, patch: int, merge: int, frames: int) -> torch.Tensor:
    """Images (B, 3, h, w) to Qwen2-VL's flat patches (B * h/patch * w/patch, 3 * frames * patch * patch).

    Patches that the encoder merges into one token (merge x merge) are neighbours; a picture stands for `frames` equal
    frames of a film.
    """
    batch, channels, height, width = pixels.shape
    blocks = pixels.unflatten(3, (width // patch // merge, merge, patch))
    blocks = blocks.unflatten(2, (height // patch // merge, merge, patch))
    # Axes now: batch, channel, block row, row in block, y, block column, column in block, x.
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    return blocks.expand(*[-1] * 6, frames, -1, -1).reshape(-1, channels * frames * patch * patch)


def image_rotary(rows: int, columns: int, merge: int, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Compute cosines and sines (rows * columns, width) of a picture's patches as `patchify` orders them.

    In fp32, computed in bf16.
    """
    half = width // 2
    exponents = torch.arange(0, half, 2, device=device, dtype=torch.float) / half
    frequencies = (1.0 / _IMAGE_THETA**exponents).bfloat16()
    places = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in (rows, columns)), indexing="ij"))
    places = places.unflatten(2, (columns // merge, merge)).unflatten(1, (rows // merge, merge))
    places = places.permute(1, 3, 2, 4, 0).flatten(0, 3).bfloat16()
    angles = (places[..., None] * frequencies).flatten(1).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


class Qwen2VLFeatures(nn.Module):
    """Pixels and tokens to the feature of one token a sequence, from the last layer.

    Attributes:
        image_token: the id that stands for one token of a picture.
    """

    def __init__(self, config: Qwen2VLConfig):
        super().__init__()
        self.image_token = config.image_token_id
        self.visual = Qwen2VisionTransformerPretrainedModel(config.vision_config)
        self.language_model = Qwen2VLTextModel(config.text_config)
        # Constants, which no checkpoint holds: real also where the weights are still on the meta device.
        del self.visual.rotary_pos_emb
        with torch.device("cpu"):
            self.language_model.rotary_emb = Qwen2VLRotaryEmbedding(config.text_config)
        for name, constant in list(self.language_model.rotary_emb.named_buffers()):
            setattr(self.language_model.rotary_emb, name, constant.bfloat16().float())

    @property
    def layers(self) -> list[nn.Module]:
        """Of both parts, in the order in which they run."""
        return [*self.visual.blocks, *self.language_model.layers]

    def image_tokens(self, height: int, width: int) -> int:
        """How many tokens a preprocessed picture of that size becomes."""
        side = self.visual.config.patch_size * self.visual.config.spatial_merge_size
        return (height // side) * (width // side)

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (B * image_tokens, width of the language model) of preprocessed pixels (B, 3, h, w)."""
        vision = self.visual.config
        patch, merge = vision.patch_size, vision.spatial_merge_size
        rows, columns = (side // patch for side in pixels.shape[-2:])
        tables = image_rotary(rows, columns, merge, vision.embed_dim // vision.num_heads, pixels.device)
        tables = tuple(table.repeat(len(pixels), 1) for table in tables)
        # Where each picture's patches begin and end: they do not look at another's. On the CPU, where it is read.
        bounds = torch.arange(len(pixels) + 1, device="cpu", dtype=torch.int32) * rows * columns
        hidden = self.visual.patch_embed(patchify(pixels, patch, merge, vision.temporal_patch_size))
        for block in self.visual.blocks:
            hidden = block(hidden, cu_seqlens=bounds, position_embeddings=tables)
        return self.visual.merger(hidden)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Features (B, width).

        Args:
            pixels: (B, 3, h, w), preprocessed.
            tokens: (B, L), padded on the right; `image_token` as often in each row as `image_tokens` says.
            places: (B,) of the token whose feature is returned. Attention is causal: what stands behind it, the
                padding included, does not enter.
        """
        image = self.image_features(pixels)
        words = self.language_model.embed_tokens(tokens)
        inputs = words.masked_scatter((tokens == self.image_token)[..., None], image.to(words.dtype))
        features = self.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return features[torch.arange(len(features), device=features.device), places]


def to_transformers(state: State) -> State:
    """A Qwen2-VL's weights, in the names of any version of transformers, under those of `Qwen2VLFeatures`.

    Raises:
        UserError: a name that Qwen2-VL does not have.
    """
    renamed: State = {}
    for name, value in state.items():
        if _DROPPED.match(name):
            continue
        for pattern, prefix in _NAMES:
            new, found = pattern.subn(prefix, name, count=1) if pattern.match(name) else (name, 0)
            if found:
                renamed[new] = value
                break
        else:
            raise UserError(f"{name!r} is not a weight of Qwen2-VL; it is another model's checkpoint")
    return renamed
