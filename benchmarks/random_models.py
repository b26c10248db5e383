"""The trainer's objects over models with random weights: published architectures at their size, or tiny ones.

Only the trainer's two loaders are replaced. What a recipe does to the models after that, and the update itself, is the
trainer's own code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from rsaft_fast.backbones import PipelineBackbone, random_backbone
from rsaft_fast.backbones.family import Parts
from rsaft_fast.backbones.registry import ADAPTERS
from rsaft_fast.backbones.specs import Spec, load_spec
from rsaft_fast.benchmarks.memory_runs import MODELS, REWARD
from rsaft_fast.estimate.published import published_reward
from rsaft_fast.estimate.skeleton import LengthTokenizer, quiet
from rsaft_fast.recipe.check import check_settings, pick_device
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards import RewardSettings
from rsaft_fast.rewards.base import RewardSpec
from rsaft_fast.rewards.clip import ClipReward, preprocess_from_config
from rsaft_fast.train import trainer as trainer_module
from rsaft_fast.train.inputs import Inputs
from rsaft_fast.train.trainer import DTYPES, Trainer

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


class RandomTrainer(Trainer):
    """A trainer whose models have drawn weights and whose prompts have drawn encodings."""

    def __init__(self, config: Config, architecture: Architecture):
        """
        Raises:
            UserError: keys that do not go together.
        """
        check_settings(config, ADAPTERS[architecture.spec.pipeline].family)
        self.architecture = architecture
        inputs = Inputs(prompts=list(PROMPTS), sample_prompts=[], images=[], checkpoint=None, notes=[])
        with _random_loaders(architecture, pick_device(config.backbone.device)):
            super().__init__(config, inputs)

    def _find_encodings(self, inputs: Inputs, say: Callable[[str], None]) -> DrawnEncodings:
        settings = self.config.backbone
        shapes = random_backbone(
            self.architecture.spec,
            height=settings.height,
            width=settings.width,
            dtype=DTYPES[settings.dtype],
            device="meta",
        )
        return DrawnEncodings(shapes, ["", *inputs.prompts])


class DrawnEncodings(dict[str, Mapping[str, torch.Tensor]]):
    """An encoding of the right shapes for each text, in place of what text encoders would make."""

    def __init__(self, shapes: PipelineBackbone, texts: Iterable[str]):
        self.shapes = shapes
        generator = torch.Generator().manual_seed(0)
        for text in texts:
            self[text] = {
                name: torch.randn(1, *shape, generator=generator).to(shapes.compute_dtype)
                for name, shape in shapes.embedding_shapes.items()
            }

    def complete(self, stage: Callable[[str], None]) -> None:
        """They are."""


@contextmanager
def _random_loaders(architecture: Architecture, device: torch.device) -> Iterator[None]:
    def load_backbone(path: str, text: bool = True, **options: Any) -> PipelineBackbone:
        return random_backbone(architecture.spec, **options)

    def load_reward(settings: RewardSettings, *_: Any) -> ClipReward:
        return random_reward(settings, architecture.clip, device)

    before = trainer_module.load_backbone, trainer_module.load_reward
    trainer_module.load_backbone, trainer_module.load_reward = load_backbone, load_reward
    try:
        yield
    finally:
        trainer_module.load_backbone, trainer_module.load_reward = before


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


def tiny(model: str, folder: Path) -> Architecture:
    """The same classes at the size of a test. Config files go to `folder`, where the estimate reads shapes."""
    parts, pipeline = _TINY[model], load_spec(MODELS[model].spec).pipeline
    path, clip = folder / model, folder / "clip"
    _write_configs(path, pipeline, parts)
    clip.mkdir(exist_ok=True)
    (clip / "config.json").write_text(json.dumps(_TINY_CLIP | {"model_type": "clip"}))
    denoiser = parts[ADAPTERS[pipeline].family.denoiser_name][2]
    size = {"backbone.path": str(path), "backbone.height": 32, "backbone.width": 32}
    keys = size | {"reward.path": str(clip), "parameters.lora.rank": 4}
    return Architecture(Spec(pipeline, denoiser, parts["vae"][2], parts["scheduler"][2]), _TINY_CLIP, keys, _TINY_STEPS)


def _write_configs(folder: Path, pipeline: str, parts: Parts) -> None:
    index = {"_class_name": pipeline} | {name: [library, kind] for name, (library, kind, _) in parts.items()}
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, (_, _, config) in parts.items():
        file = {"scheduler": "scheduler_config.json"}.get(name, "config.json")
        file = "tokenizer_config.json" if name.startswith("tokenizer") else file
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_text(json.dumps(config))
        if name.startswith("tokenizer"):
            (folder / name / "tokenizer.json").write_text("{}")  # looked for, and on shapes alone not read


_TINY_STEPS = 6
_TINY_TEXT = {
    "vocab_size": 514,
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
}
_TINY_CLIP = {
    "projection_dim": 16,
    "text_config": _TINY_TEXT,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
}
_TINY_T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "is_encoder_decoder": False,
}


def _tiny_vae(model: str) -> tuple[str, str, dict[str, Any]]:
    around = {**load_spec(MODELS[model].spec).vae, "latent_channels": 4, "sample_size": 32}
    sizes = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return "diffusers", "AutoencoderKL", around | sizes | blocks


def _tiny_scheduler(model: str) -> tuple[str, str, Mapping[str, Any]]:
    config = load_spec(MODELS[model].spec).scheduler
    return "diffusers", config["_class_name"], config


def _text(kind: str = "CLIPTextModel") -> tuple[str, str, dict[str, Any]]:
    return "transformers", kind, _TINY_T5 if kind.startswith("T5") else _TINY_TEXT


def _tokenizer(kind: str = "CLIPTokenizer", length: int = 77) -> tuple[str, str, dict[str, Any]]:
    return "transformers", kind, {"model_max_length": length}


_TINY_UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
}
_TINY_DENOISERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd15": (
        "diffusers",
        "UNet2DConditionModel",
        _TINY_UNET
        | {
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
        },
    ),
    "sdxl": (
        "diffusers",
        "UNet2DConditionModel",
        _TINY_UNET
        | {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2],
            "attention_head_dim": [1, 2],
            "use_linear_projection": True,
            "cross_attention_dim": 32,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
    ),
    "sd35m": (
        "diffusers",
        "SD3Transformer2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
    ),
    "flux": (
        "diffusers",
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": [2, 4, 2],
        },
    ),
}
_TINY_TEXTS: dict[str, Parts] = {
    "sd15": {"text_encoder": _text(), "tokenizer": _tokenizer()},
    "sdxl": {
        "text_encoder": _text(),
        "tokenizer": _tokenizer(),
        "text_encoder_2": _text("CLIPTextModelWithProjection"),
        "tokenizer_2": _tokenizer(),
    },
    "sd35m": {
        "text_encoder": _text("CLIPTextModelWithProjection"),
        "tokenizer": _tokenizer(),
        "text_encoder_2": _text("CLIPTextModelWithProjection"),
        "tokenizer_2": _tokenizer(),
        "text_encoder_3": _text("T5EncoderModel"),
        "tokenizer_3": _tokenizer("T5Tokenizer", 512),
    },
    "flux": {
        "text_encoder": _text(),
        "tokenizer": _tokenizer(),
        "text_encoder_2": _text("T5EncoderModel"),
        "tokenizer_2": _tokenizer("T5Tokenizer", 512),
    },
}
_TINY: dict[str, Parts] = {
    model: _TINY_TEXTS[model]
    | {
        "transformer" if model in ("sd35m", "flux") else "unet": _TINY_DENOISERS[model],
        "vae": _tiny_vae(model),
        "scheduler": _tiny_scheduler(model),
    }
    for model in MODELS
}
