"""Diffusion models behind one protocol; `load_backbone` picks the adapter from the pipeline's own class."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from rsaft_fast.backbones.base import Backbone, Branch, Conditioning
from rsaft_fast.backbones.flux import FLUX
from rsaft_fast.backbones.lora import LoRASettings, add_lora, save_lora
from rsaft_fast.backbones.pipeline import PipelineBackbone, is_text_encoder
from rsaft_fast.backbones.quantized import Quantization
from rsaft_fast.backbones.random import random_backbone
from rsaft_fast.backbones.registry import ADAPTERS
from rsaft_fast.backbones.sd3 import SD3
from rsaft_fast.backbones.sd15 import SD15
from rsaft_fast.backbones.sdxl import SDXL
from rsaft_fast.errors import UserError


def load_backbone(
    path: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    offload_blocks: int = 0,
    quantize: Quantization | None = None,
    text: bool = True,
    networks: bool = True,
) -> PipelineBackbone:
    """Load the pipeline at a folder or hub id with the adapter for its class; "playground" is the one shipped.

    Args:
        offload_blocks: blocks of the denoiser whose weights stay on the host (`memory.offload`).
        quantize: keep the denoiser's blocks in few bits (`backbones.quantized`), encoded a layer at a time.
        text, networks: which parts get their weights, see `PipelineBackbone.from_pretrained`.

    Raises:
        UserError: nothing there, a pipeline class without an adapter, a damaged file, or a size it cannot make.
    """
    path = local_path(path)
    adapter = adapter_for(path, text)
    try:
        return adapter.from_pretrained(
            path,
            height=height,
            width=width,
            dtype=dtype,
            device=device,
            offload_blocks=offload_blocks,
            quantize=quantize,
            text=text,
            networks=networks,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"the pipeline at {path} could not be loaded: {_first_line(error)}") from error


def adapter_for(path: str | Path, text: bool = True) -> type[PipelineBackbone]:
    """The adapter for the pipeline at a folder or hub id; reads model_index.json and the denoiser's config.json alone.

    Args:
        text: whether the text encoders must be there.

    Raises:
        UserError: nothing there, a pipeline class without an adapter, a component without which nothing runs, or a
            denoiser that is stored quantised.
    """
    folder = Path(path := local_path(path))
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"{path} has no model_index.json; give the folder of a diffusers pipeline, or its hub id")
    try:
        index = DiffusionPipeline.load_config(str(path))
        adapter = ADAPTERS.get(index["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no diffusers pipeline at {path}: {_first_line(error)}") from error
    if adapter is None:
        supported = ", ".join(sorted(ADAPTERS))
        raise UserError(f"{path} is a {index['_class_name']}; supported pipeline classes: {supported}")
    # diffusers finds these out one at a time, after it has read the parts before.
    for name in adapter.text_encoders if text else ():
        if not any(index.get(name) or ()):
            raise UserError(f"{path} names no {name} in its model_index.json; prompts cannot be encoded without")
    if folder.is_dir():
        for name, entry in index.items():
            wanted = isinstance(entry, list) and any(entry) and (text or not is_text_encoder(name))
            if wanted and not (folder / name).is_dir():
                raise UserError(f"{path} is incomplete: its model_index.json names {name}, and there is no such folder")
    _refuse_quantized(path, adapter)
    return adapter


def _refuse_quantized(path: str | Path, adapter: type[PipelineBackbone]) -> None:
    """A denoiser that another program has stored in few bits cannot be read; ours are made from whole weights."""
    config = {}
    with suppress(OSError, ValueError):  # a config that is missing or broken is loading's to explain
        config = adapter.denoiser_class.load_config(str(path), subfolder=adapter.denoiser_name)
    if method := config.get("quantization_config"):
        raise UserError(
            f"{path}: {adapter.denoiser_name} is stored quantised (quant_method {method.get('quant_method')}); give "
            "the pipeline with whole weights, and set backbone.quantize to nf4, int8 or fp8"
        )


def local_path(path: str | Path) -> str | Path:
    """The path, or that of the pipeline that ships with the package."""
    if str(path) == "playground":
        from rsaft_fast.playground import pipeline_path

        return pipeline_path()
    return path


def _first_line(error: Exception) -> str:
    """The first sentence: diffusers adds advice about its own options."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". If you want")[0]


__all__ = [
    "ADAPTERS",
    "FLUX",
    "SD3",
    "SD15",
    "SDXL",
    "Backbone",
    "Branch",
    "Conditioning",
    "LoRASettings",
    "PipelineBackbone",
    "Quantization",
    "adapter_for",
    "add_lora",
    "is_text_encoder",
    "load_backbone",
    "local_path",
    "random_backbone",
    "save_lora",
]
