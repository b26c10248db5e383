"""How different pictures are: DINOv2 (arXiv 2304.07193) and DINOv3 (arXiv 2508.10104) features, and distances in them.

GARDO (arXiv 2512.24138) scales the advantages of pictures that lie far from their prompt's others. On the playground,
whose pictures are too small for DINO, the image encoder of a reward that ships with the package stands in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, Dinov2Model, DINOv3ViTModel

from rsaft_fast.errors import UserError
from rsaft_fast.files import sha256_of
from rsaft_fast.memory.checkpointing import checkpoint_calls
from rsaft_fast.rewards.base import RewardSpec, unit
from rsaft_fast.rewards.clip import image_processor_config, load_clip_model, preprocess_from_config
from rsaft_fast.rewards.files import checkpoint_folder, local_folder, read_json, weight_files
from rsaft_fast.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, Clamp, Preprocess, without_autocast
from rsaft_fast.rewards.settings import shipped
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


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
# Words of a hub id, and the shapes that are published under it.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "dinov2-large": {"model_type": "dinov2", "image_size": 518, "patch_size": 14} | _LARGE,
    "dinov3-vitl16": {"model_type": "dinov3_vit", "intermediate_size": 4096, "num_register_tokens": 4} | _LARGE,
}


class Features(nn.Module):
    """Unit features of pictures, differentiable in them.

    Attributes:
        model: frozen; computes in its own dtype, features are fp32 at least.
        prepare: images to its input.
        spec: what produced the features.
    """

    def __init__(
        self,
        model: nn.Module,
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
            self.checkpoint_layers()

    def shared_blocks(self) -> list[nn.Module]:
        """The model's layers, whose weights several GPUs may hold together: see `Reward.shared_blocks`."""
        raise NotImplementedError

    def checkpoint_layers(self) -> None:
        """Recompute the model's layers in the backward pass."""
        checkpoint_calls(self.shared_blocks())

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of preprocessed pictures, of any length."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Numbers of a feature."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Features:
        """Stays in `eval()`: stochastic depth would make features noise."""
        return super().train(False)

    def raw(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), nominally 0 to 1, to features (B, D) as the network gives them, of any length."""
        inputs = self.prepare(images.double() if self.model.dtype == torch.float64 else images)
        if len(inputs) == 0:
            return inputs.new_zeros(0, self.width)
        with without_autocast(images.device):
            return self.embed(inputs.to(self.model.dtype))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), nominally 0 to 1, to features (B, D), rows of length 1."""
        with without_autocast(images.device):
            return unit(self.raw(images))


class DinoFeatures(Features):
    """The class token's features of DINOv2 or DINOv3."""

    def shared_blocks(self) -> list[nn.Module]:
        """The only list of modules in either model, wherever a version of transformers keeps it."""
        return list(next(module for module in self.model.modules() if isinstance(module, nn.ModuleList)))

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=inputs).pooler_output

    @property
    def width(self) -> int:
        return self.model.config.hidden_size


class ClipFeatures(Features):
    """The image embedding of a CLIPModel, without its text tower."""

    def __init__(self, model: CLIPModel, *arguments: Any, **options: Any):
        del model.text_model, model.text_projection
        super().__init__(model, *arguments, **options)

    def shared_blocks(self) -> list[nn.Module]:
        """Those of the image tower."""
        return list(self.model.vision_model.encoder.layers)

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=inputs).pooler_output

    @property
    def width(self) -> int:
        return self.model.config.projection_dim


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
) -> Features:
    """DINOv2 or DINOv3 (ViT) in transformers' format: folder or hub id (facebook/dinov2-large; dinov3's are gated).

    Args:
        path: folder or hub id; playground/fair and playground/brittle are the image encoders of those rewards.
        clamp: see `Preprocess`.
        dtype: of the model; features are in fp32 at least.
        checkpoint: recompute the layers in the backward pass instead of keeping their activations.
        device: where it lives.

    Raises:
        UserError: a missing file or weight, another model's checkpoint, or preprocessing that is not done here.
    """
    if (place := shipped(str(path))) != str(path):
        return _of_shipped_reward(Path(place), str(path), clamp, dtype, checkpoint).to(device)
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


def feature_shapes(path: str | Path) -> Features:
    """Build the same features on the meta device: every shape, no weight.

    Raises:
        UserError: there is no config there, in the hub's cache, or published under that name.
    """
    if (place := shipped(str(path))) != str(path):
        with torch.device("meta"):
            model = CLIPModel(CLIPConfig.from_dict(read_json(Path(place) / "config.json")))
        size = model.config.vision_config.image_size
        prepare = preprocess_from_config(image_processor_config(Path(place)), size)
        return ClipFeatures(model, prepare, RewardSpec("clip", str(path)))
    folder = local_folder(str(path), "config.json")
    if folder is not None:
        config = read_json(folder / "config.json")
    else:
        config = next((known for name, known in _PUBLISHED.items() if name in str(path).lower()), {})
    kind = config.get("model_type")
    if kind not in _MODELS:
        raise UserError(
            f"{str(path)!r} is neither on this machine nor a published {' or '.join(_PUBLISHED)} by name, so that its "
            "memory cannot be estimated; download it first"
        )
    model_class, preparation, licence = _MODELS[kind]
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(config))
    given = {} if folder is None else {k: v for k, v in image_processor_config(folder).items() if v is not None}
    prepare = _preprocess(preparation | given, "hard")
    return DinoFeatures(model, prepare, RewardSpec(kind, str(path), licence=licence))


def _of_shipped_reward(folder: Path, name: str, clamp: Clamp, dtype: torch.dtype, checkpoint: bool) -> ClipFeatures:
    model = load_clip_model(folder, name)
    prepare = preprocess_from_config(image_processor_config(folder), model.config.vision_config.image_size, clamp)
    spec = RewardSpec("clip", name, sha256_of(weight_files(folder)), prepare.describe())
    return ClipFeatures(model, prepare, spec, dtype=dtype, checkpoint=checkpoint)


def _preprocess(config: Mapping[str, Any], clamp: Clamp) -> Preprocess:
    """The crop's size is the network's: both models interpolate their positions to any."""
    crop = config.get("crop_size") if config.get("do_center_crop", "crop_size" in config) else config["size"]
    side = crop if isinstance(crop, int) else (crop or {}).get("height")
    if not isinstance(side, int):
        raise UserError(f"preprocessor_config.json crops to {crop}; give a square of pixels")
    return preprocess_from_config(config, side, clamp)
