"""Models with random weights for the trainer, of the shapes that a recipe's paths lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from rsaft_fast.backbones import PipelineBackbone, random_backbone
from rsaft_fast.backbones.specs import Spec
from rsaft_fast.dtypes import DTYPES
from rsaft_fast.estimate.skeleton import pipeline_parts, quiet
from rsaft_fast.recipe.check import check_settings
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards import Reward, RewardSettings
from rsaft_fast.rewards.features import Features, feature_shapes
from rsaft_fast.sampling.protocol import Branch
from rsaft_fast.train.inputs import Inputs
from rsaft_fast.train.loaders import FileLoaders
from rsaft_fast.train.trainer import Trainer

Network = TypeVar("Network", bound=torch.nn.Module)
PROMPTS = ("a red circle", "two blue squares", "a green triangle above a red square", "one")


class RandomLoaders(FileLoaders):
    """Draws a recipe's models on its device, and the prompts' encodings, which have the right shapes."""

    def __init__(self, config: Config):
        check_settings(config, pipeline_parts(config.backbone.path)[0])
        super().__init__(config)

    def shapes(self) -> PipelineBackbone:
        return random_pipeline(self.config, "meta")

    def encodings(self, shapes: PipelineBackbone, texts: Sequence[str]) -> dict[str, Branch]:
        generator, sizes = torch.Generator().manual_seed(0), shapes.embedding_shapes.items()
        return {
            text: {name: torch.randn(1, *size, generator=generator).to(shapes.compute_dtype) for name, size in sizes}
            for text in texts
        }

    def reward(self) -> Reward:
        return random_reward(self.config.reward, self.device)

    def judges(self) -> dict[str, Reward]:
        return {name: random_reward(judge, self.device) for name, judge in self.config.judges.items()}

    def features(self, path: str) -> Features:
        return _drawn(feature_shapes(path), self.device)

    def encode(self, encodings: Mapping[str, Branch]) -> None:
        """Do nothing: they are drawn."""

    def backbone(self) -> PipelineBackbone:
        settings = self.config.backbone
        loading = {"offload_blocks": settings.offload_blocks, "quantize": settings.quantize}
        backbone = random_pipeline(self.config, self.device, **loading)
        backbone.recompute(settings.checkpoint, settings.keep_blocks)
        return backbone


def random_pipeline(config: Config, device: torch.device | str, **loading: Any) -> PipelineBackbone:
    """A recipe's backbone, of the shapes that its path leads to, with drawn weights."""
    settings = config.backbone
    family, parts, *_ = pipeline_parts(settings.path)
    configs = (parts[name][2] for name in (family.denoiser_name, "vae", "scheduler"))
    spec = Spec(family.pipeline_class.__name__, *configs)
    size = {"height": settings.height, "width": settings.width}
    return random_backbone(spec, **size, dtype=DTYPES[settings.dtype], device=device, **loading)


def random_trainer(config: Config) -> Trainer:
    """A trainer whose models have drawn weights; whatever a recipe does to them, and the update, is its own code."""
    inputs = Inputs(prompts=list(PROMPTS), sample_prompts=[], images=[], checkpoint=None, notes=[])
    return Trainer(config, inputs, loaders=RandomLoaders(config))


def random_reward(settings: RewardSettings, device: torch.device | str) -> Reward:
    """A reward of the shapes that its settings lead to, whose weights are drawn where they lie."""
    with quiet():
        return _drawn(settings.shapes(lambda line: None), device)


@torch.no_grad()
def _drawn(network: Network, device: torch.device | str) -> Network:
    network.to_empty(device=device)
    for parameter in network.parameters():
        parameter.normal_(0.0, 0.02)
    for buffer in network.buffers():  # positions, or factors
        buffer.fill_(1) if buffer.is_floating_point() else buffer.copy_(torch.arange(buffer.shape[-1]))
    return network
