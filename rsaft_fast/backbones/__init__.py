"""Diffusion models behind one protocol; `load_backbone` picks the adapter from the pipeline's own class."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from rsaft_fast.backbones.base import Backbone, Branch, Conditioning
from rsaft_fast.backbones.lora import LoRASettings, add_lora, save_lora
from rsaft_fast.backbones.pipeline import PipelineBackbone
from rsaft_fast.backbones.sd3 import SD3
from rsaft_fast.backbones.sd15 import SD15
from rsaft_fast.errors import UserError

ADAPTERS: dict[str, type[PipelineBackbone]] = {adapter.pipeline_class.__name__: adapter for adapter in (SD15, SD3)}


def load_backbone(
    path: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PipelineBackbone:
    """Load the pipeline at a folder or hub id with the adapter for its class; "playground" is the one shipped.

    Raises:
        UserError: nothing there, a pipeline class without an adapter, a damaged file, or a size it cannot make.
    """
    if str(path) == "playground":
        from rsaft_fast.playground import pipeline_path

        path = pipeline_path()
    adapter = _adapter_for(path)
    try:
        return adapter.from_pretrained(path, height=height, width=width, dtype=dtype, device=device)
    except (OSError, ValueError) as error:
        raise UserError(f"the pipeline at {path} could not be loaded: {_first_line(error)}") from error


def _adapter_for(path: str | Path) -> type[PipelineBackbone]:
    folder = Path(path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"{path} has no model_index.json; give the folder of a diffusers pipeline, or its hub id")
    try:
        name = DiffusionPipeline.load_config(str(path))["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no diffusers pipeline at {path}: {_first_line(error)}") from error
    if name not in ADAPTERS:
        raise UserError(f"{path} is a {name}; supported pipeline classes: {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[name]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


__all__ = [
    "SD3",
    "SD15",
    "Backbone",
    "Branch",
    "Conditioning",
    "LoRASettings",
    "PipelineBackbone",
    "add_lora",
    "load_backbone",
    "save_lora",
]
