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
from rsaft_fast.backbones.published import published_pipeline
from rsaft_fast.backbones.registry import ADAPTERS
from rsaft_fast.backbones.specs import Spec, load_spec
from rsaft_fast.benchmarks.memory_runs import MODELS, REWARD
from rsaft_fast.dtypes import DTYPES
from rsaft_fast.estimate.skeleton import quiet
from rsaft_fast.recipe.check import check_settings
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards import RewardSettings
from rsaft_fast.rewards.base import RewardSpec
from rsaft_fast.rewards.clip import ClipReward, preprocess_from_config, published_clip
from rsaft_fast.rewards.text import LengthTokenizer
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
    return Architecture(load_spec(MODELS[model].spec), published_clip(REWARD), {}, MODELS[model].steps)


class RandomLoaders(FileLoaders):
    """Draws a recipe's models on its device, and the prompts' encodings, which have the right shapes.

    Raises:
        UserError: keys that do not go together.
    """

    def __init__(self, config: Config, architecture: Architecture):
        check_settings(config, ADAPTERS[architecture.spec.pipeline].family)
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
        backbone.recompute(settings.checkpoint, settings.keep_blocks)
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
        dtype=DTYPES[settings.dtype],
        checkpoint=settings.checkpoint,
    ).to(device)


def tiny_architecture(model: str, folder: Path) -> Architecture:
    """The published architecture with the keys of tiny.json. Its config files go to `folder`, where the estimate reads
    shapes."""
    small = json.loads(Path(__file__).with_name("tiny.json").read_text(encoding="utf-8"))
    clip = {"projection_dim": 16, "text_config": small["text"], "vision_config": small["vision"]}
    family, parts = published_pipeline(MODELS[model].path)
    pipeline, denoiser = family.pipeline_class.__name__, family.denoiser_name
    files = {"clip/config.json": clip | {"model_type": "clip"}}
    index, configs = {"_class_name": pipeline}, {}
    for name, (library, kind, config) in parts.items():
        key = model if name == denoiser else "text" if kind.startswith("CLIP") else kind
        configs[name] = {**config, **small.get(key, {})}
        file = next((kind for kind in ("scheduler", "tokenizer") if name.startswith(kind)), "")
        files[f"{model}/{name}/{file}_config.json" if file else f"{model}/{name}/config.json"] = configs[name]
        if file == "tokenizer":
            encoder = parts[name.replace("tokenizer", "text_encoder")][1]
            kind = ("CLIP" if encoder.startswith("CLIP") else "T5") + "Tokenizer"
            files[f"{model}/{name}/tokenizer.json"] = {}  # looked for, and on shapes alone not read
        index[name] = [library, kind]
    for file, content in (files | {f"{model}/model_index.json": index}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    size = {"backbone.path": str(folder / model), "backbone.height": 32, "backbone.width": 32}
    keys = size | {"reward.path": str(folder / "clip"), "parameters.lora.rank": 4}
    spec = Spec(pipeline, configs[denoiser], configs["vae"], configs["scheduler"])
    return Architecture(spec, clip, keys, steps=6)
