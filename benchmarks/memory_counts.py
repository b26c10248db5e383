"""What of a run follows from shapes alone: the estimate of its peak, and its FLOPs."""

from __future__ import annotations

from typing import Any

import torch

from rsaft_fast import phases
from rsaft_fast.backbones import LoRASettings, add_lora, random_backbone
from rsaft_fast.benchmarks import flops
from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.memory_runs import Run
from rsaft_fast.benchmarks.random_models import PROMPTS, Architecture, random_reward
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.estimate.live import shapes_alone
from rsaft_fast.recipe.config import Config

Row = dict[str, Any]


def count_part(run: Run, part: str, device: str, architecture: Architecture) -> Row:
    """A row of what a device is not needed for.

    Raises:
        UserError: the recipe has a key or a value that this version does not have.
    """
    # A recipe for a GPU is estimated where there is none, too.
    config = runs.config_of(runs.recipe_keys(run, device, architecture.keys, part))
    if part == runs.FLOPS:
        return count_flops(config, architecture).as_dict()
    found = estimate(config, cuda=device == "cuda")
    peaks = {phase.name: phase.total for phase in found.phases}
    # Text encoders are not there to be measured.
    of_update = max(size for name, size in peaks.items() if name != phases.ENCODING)
    return {"peak": of_update, "peak_with_encoding": found.peak, "peaks": peaks, "standing": dict(found.standing)}


def count_flops(config: Config, architecture: Architecture) -> flops.Flops:
    """Of the backbone under LoRA, on the meta device."""
    size = {"height": config.backbone.height, "width": config.backbone.width}
    # In fp32 every product is one product: beside bf16, the adapters' are computed in parts, which are no model FLOPs.
    backbone = random_backbone(architecture.spec, **size, dtype=torch.float32, device="meta")
    with torch.device("meta"):
        add_lora(backbone, LoRASettings(rank=config.parameters.lora.rank))
    unchecked = config.reward.model_copy(update={"checkpoint": False})
    reward = random_reward(unchecked, architecture.clip, "meta")
    with shapes_alone():
        reward.keep_prompts(PROMPTS[:1])
    return flops.count(backbone, reward, PROMPTS[0])
