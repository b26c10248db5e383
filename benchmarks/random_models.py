"""Models with random weights for the trainer: published architectures at their size, or tiny ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from rsaft_fast.backbones import PipelineBackbone, random_backbone
from rsaft_fast.backbones.registry import ADAPTERS
from rsaft_fast.backbones.specs import Spec, load_spec
from rsaft_fast.benchmarks.memory_runs import MODELS, REWARD
from rsaft_fast.estimate.published import published_pipeline, published_reward
from rsaft_fast.estimate.skeleton import LengthTokenizer, quiet
from rsaft_fast.memory import checkpoint_networks
from rsaft_fast.recipe.check import DTYPES, check_settings
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards import RewardSettings
from rsaft_fast.rewards.base import RewardSpec
from rsaft_fast.rewards.clip import ClipReward, preprocess_from_config
from rsaft_fast.sampling.protocol import Branch
from rsaft_fast.train.assemble import FileLoaders
from rsaft_fast.train.inputs import Inputs
from rsaft_fast.train.trainer import Trainer

PROMPTS = ("a red circle", "two blue squares", "a green triangle above a red square", "one")


@dataclass(frozen=True)
class Architecture:
    """Shapes of a pipeline and of the reward.

    Attributes:
        spec, clip: their configs.
        keys: of the recipe, that lead the estimate to the same shapes.
        steps: sampler steps of a whole picture.
    """

    spec: Spec
    clip: Mapping[str, Any]
    keys: Mapping[str, Any]
    steps: int


def published(model: str) -> Architecture:
    return Architecture(load_spec(MODELS[model].spec), published_reward(REWARD), {}, MODELS[model].steps)


class RandomLoaders(FileLoaders):
    """Draws a recipe's models on its device, and the prompts' encodings, which have the right shapes.

    Raises:
        UserError: keys that do not go together.
    """

    def __init__(self, config: Config, architecture: Architecture):
        check_settings(config, ADAPTERS[architecture.spec.pipeline])
        super().__init__(config)
        self.architecture = architecture

    def shapes(self) -> PipelineBackbone:
        return self._random("meta")

    def encodings(self, shapes: PipelineBackbone, texts: Sequence[str]) -> dict[str, Branch]:
        generator, sizes = torch.Generator().manual_seed(0), shapes.embedding_shapes.items()
        return {
            text: {name: torch.randn(1, *size, generator=generator).to(shapes.compute_dtype) for name, size in sizes}
            for text in texts
        }

    def reward(self) -> ClipReward:
        return random_reward(self.config.reward, self.architecture.clip, self.device)

    def encode(self, encodings: Mapping[str, Branch]) -> None:
        """Do nothing: they are drawn."""

    def backbone(self) -> PipelineBackbone:
        settings = self.config.backbone
        loading = {"offload_blocks": settings.offload_blocks, "quantize": settings.quantize}
        backbone = self._random(self.device, **loading)
        checkpoint_networks(backbone.denoiser, backbone.pipeline.vae, settings.checkpoint, settings.keep_blocks)
        return backbone

    def _random(self, device: torch.device | str, **loading: Any) -> PipelineBackbone:
        settings = self.config.backbone
        size = {"height": settings.height, "width": settings.width}
        return random_backbone(self.architecture.spec, **size, dtype=DTYPES[settings.dtype], device=device, **loading)


def random_trainer(config: Config, architecture: Architecture) -> Trainer:
    """A trainer whose models have drawn weights; whatever a recipe does to them, and the update, is its own code.

    Raises:
        UserError: keys that do not go together.
    """
    inputs = Inputs(prompts=list(PROMPTS), sample_prompts=[], images=[], checkpoint=None, notes=[])
    return Trainer(config, inputs, loaders=RandomLoaders(config, architecture))


def random_reward(settings: RewardSettings, config: Mapping[str, Any], device: torch.device | str) -> ClipReward:
    """A `ClipReward` of that architecture whose weights are drawn where they lie."""
    with quiet(), torch.random.fork_rng([torch.device(device)] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(0)
        with torch.device(device):
            model = CLIPModel(CLIPConfig.from_dict(dict(config)))
    return ClipReward(
        model.eval(),
        LengthTokenizer(model.config.text_config.max_position_embeddings),
        preprocess_from_config({}, model.config.vision_config.image_size, settings.clamp),
        RewardSpec(name=settings.name, source=f"random weights, shapes of {settings.path}"),
        scale="cosine",
        dtype=getattr(torch, settings.dtype),
        checkpoint=settings.checkpoint,
    ).to(device)


def tiny_architecture(model: str, folder: Path) -> Architecture:
    """The same classes at the size of a test. Config files go to `folder`, where the estimate reads shapes."""
    pipeline, parts = published_pipeline(MODELS[model].path)
    parts = {name: (library, kind, {**config, **_tiny(model, kind)}) for name, (library, kind, config) in parts.items()}
    path, clip = folder / model, folder / "clip"
    files = {clip / "config.json": _TINY_CLIP | {"model_type": "clip"}}
    files[path / "model_index.json"] = {"_class_name": pipeline} | {name: part[:2] for name, part in parts.items()}
    index = files[path / "model_index.json"]
    for name, (_, _, config) in parts.items():
        kind = next((kind for kind in ("scheduler", "tokenizer") if name.startswith(kind)), "")
        files[path / name / (f"{kind}_config.json" if kind else "config.json")] = config
        if kind == "tokenizer":
            encoder = parts[name.replace("tokenizer", "text_encoder")][1]
            index[name] = ["transformers", ("CLIP" if encoder.startswith("CLIP") else "T5") + "Tokenizer"]
            files[path / name / "tokenizer.json"] = {}  # looked for, and on shapes alone not read
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    size = {"backbone.path": str(path), "backbone.height": 32, "backbone.width": 32}
    keys = size | {"reward.path": str(clip), "parameters.lora.rank": 4}
    denoiser, vae, scheduler = (parts[name][2] for name in (ADAPTERS[pipeline].denoiser_name, "vae", "scheduler"))
    return Architecture(Spec(pipeline, denoiser, vae, scheduler), _TINY_CLIP, keys, steps=6)


def _tiny(model: str, kind: str) -> Mapping[str, Any]:
    """Keys of a component's config that make it small."""
    return _TINY_UNETS[model] if kind == "UNet2DConditionModel" else _TINY.get(kind, {})


_LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_TEXT = _LAYERS | {"vocab_size": 514, "projection_dim": 16, "max_position_embeddings": 77}
_TINY_CLIP = {
    "projection_dim": 16,
    "text_config": _TINY_TEXT,
    "vision_config": _LAYERS | {"image_size": 16, "patch_size": 8},
}
_MMDIT = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32}
_TINY: Mapping[str, Mapping[str, Any]] = {
    "CLIPTextModel": _TINY_TEXT,
    "CLIPTextModelWithProjection": _TINY_TEXT,
    "T5EncoderModel": {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "AutoencoderKL": {
        "latent_channels": 4,
        "sample_size": 32,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "SD3Transformer2DModel": {
        **_MMDIT,
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
        "dual_attention_layers": [],
        "qk_norm": None,
    },
    "FluxTransformer2DModel": {
        **_MMDIT,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "pooled_projection_dim": 16,
        "axes_dims_rope": [2, 4, 2],
    },
}
_UNET = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": [8, 16], "norm_num_groups": 4}
_TINY_UNETS: Mapping[str, Mapping[str, Any]] = {
    "sd15": _UNET
    | {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    },
    "sdxl": _UNET
    | {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
}
