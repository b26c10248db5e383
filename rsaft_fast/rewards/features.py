"""How different pictures are: DINOv2 (arXiv 2304.07193) and DINOv3 (arXiv 2508.10104) features, and distances in them.

GARDO (arXiv 2512.24138) scales the advantages of pictures that lie far from their prompt's others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Dinov2Model, DINOv3ViTModel

from rsaft_fast.errors import UserError
from rsaft_fast.files import sha256_of
from rsaft_fast.memory.checkpointing import checkpoint_calls
from rsaft_fast.rewards.base import RewardSpec, unit
from rsaft_fast.rewards.clip import image_processor_config, preprocess_from_config
from rsaft_fast.rewards.files import checkpoint_folder, read_json, weight_files
from rsaft_fast.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, Clamp, Preprocess, without_autocast
from rsaft_fast.rewards.weights import load_pretrained

# Model class, its published preprocessing, and the licence of the weights.
_IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
_MODELS: dict[str, tuple[type, dict[str, Any], str]] = {
    "dinov2": (
        Dinov2Model,
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3} | _IMAGENET,
        "Apache-2.0",
    ),
    "dinov3_vit": (
        DINOv3ViTModel,
        {"size": {"height": 224, "width": 224}, "resample": 2} | _IMAGENET,
        "DINOv3 License",
    ),
}


class DinoFeatures(nn.Module):
    """Unit features of pictures, differentiable in them.

    Attributes:
        model: frozen; computes in its own dtype, features are fp32 at least.
        prepare: images to its input.
        spec: what produced the features.
    """

    def __init__(
        self,
        model: Dinov2Model | DINOv3ViTModel,
        prepare: Preprocess,
        spec: RewardSpec,
        *,
        dtype: torch.dtype = torch.float32,
        checkpoint: bool = True,
    ):
        super().__init__()
        self.model = model.to(dtype).requires_grad_(False).eval()
        self.prepare, self.spec = prepare, spec
        if checkpoint:
            checkpoint_calls(_layers(model))

    def train(self, mode: bool = True) -> DinoFeatures:
        """Stays in `eval()`: stochastic depth would make features noise."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), nominally 0 to 1, to the class token's features (B, D), rows of length 1."""
        inputs = self.prepare(images.double() if self.model.dtype == torch.float64 else images)
        if len(inputs) == 0:
            return inputs.new_zeros(0, self.model.config.hidden_size)
        with without_autocast(images.device):
            return unit(self.model(pixel_values=inputs.to(self.model.dtype)).pooler_output)


def cosine_distances(features: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each pair among unit features (N, D): (N, N), 0 to 2, the diagonal 0."""
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    return (1 - features @ features.T).clamp(0, 2).masked_fill(own, 0)


def diversity(features: torch.Tensor) -> torch.Tensor:
    """Mean cosine distance over the pairs among unit features (N, D); a scalar.

    Raises:
        UserError: less than two.
    """
    _require_two(features)
    count = len(features)
    return cosine_distances(features).sum() / (count * (count - 1))


def nearest_distances(features: torch.Tensor) -> torch.Tensor:
    """Cosine distance (N,) of each to its nearest other among unit features (N, D): what GARDO weighs advantages with.

    Raises:
        UserError: less than two.
    """
    _require_two(features)
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    return cosine_distances(features).masked_fill(own, float("inf")).min(1).values


def _require_two(features: torch.Tensor) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"diversity is between pictures: give features of two at least, not {tuple(features.shape)}")


def load_features(
    path: str | Path,
    *,
    clamp: Clamp = "hard",
    dtype: torch.dtype = torch.float32,
    checkpoint: bool = True,
    device: torch.device | str = "cpu",
) -> DinoFeatures:
    """DINOv2 or DINOv3 (ViT) in transformers' format: folder or hub id (facebook/dinov2-large; dinov3's are gated).

    Args:
        path: folder or hub id.
        clamp: see `Preprocess`.
        dtype: of the model; features are in fp32 at least.
        checkpoint: recompute the layers in the backward pass instead of keeping their activations.
        device: where it lives.

    Raises:
        UserError: a missing file or weight, another model's checkpoint, or preprocessing that is not done here.
    """
    folder = checkpoint_folder(path)
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in _MODELS:
        raise UserError(f"{str(path)!r} is a {kind!r}; features are those of {' or '.join(_MODELS)}")
    model_class, preparation, licence = _MODELS[kind]
    files = weight_files(folder)
    model = load_pretrained(folder, model_class)
    # null in a processor's config stands for its default.
    given = {key: value for key, value in image_processor_config(folder).items() if value is not None}
    prepare = _preprocess(preparation | given, clamp)
    patch = model.config.patch_size
    if prepare.size[0] % patch:
        raise UserError(
            f"{str(path)!r}: pictures of {prepare.size} do not divide into patches of {patch}; mend its crop"
        )
    spec = RewardSpec(kind, str(path), sha256_of(files), prepare.describe(), licence)
    return DinoFeatures(model, prepare, spec, dtype=dtype, checkpoint=checkpoint).to(device)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The only list of modules in either model, wherever a version of transformers keeps it."""
    return list(next(module for module in model.modules() if isinstance(module, nn.ModuleList)))


def _preprocess(config: Mapping[str, Any], clamp: Clamp) -> Preprocess:
    """The crop's size is the network's: both models interpolate their positions to any."""
    crop = config.get("crop_size") if config.get("do_center_crop", "crop_size" in config) else config["size"]
    side = crop if isinstance(crop, int) else (crop or {}).get("height")
    if not isinstance(side, int):
        raise UserError(f"preprocessor_config.json crops to {crop}; give a square of pixels")
    return preprocess_from_config(config, side, clamp)
