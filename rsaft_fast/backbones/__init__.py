"""Diffusion models behind one protocol; `load_backbone` picks the adapter from the pipeline's own class."""

from __future__ import annotations

from pathlib import Path

import torch

from rsaft_fast.backbones.flux import FLUX
from rsaft_fast.backbones.flux2 import FLUX2Dev, FLUX2Klein
from rsaft_fast.backbones.folder import find_folder, is_text_encoder, read_index, read_pipeline
from rsaft_fast.backbones.krea2 import Krea2
from rsaft_fast.backbones.lora import LoRASettings, add_lora, save_lora
from rsaft_fast.backbones.own import is_own, make_own
from rsaft_fast.backbones.pipeline import PipelineBackbone
from rsaft_fast.backbones.quantized import Quantization
from rsaft_fast.backbones.qwen_image import QwenImage
from rsaft_fast.backbones.random import random_backbone
from rsaft_fast.backbones.registry import ADAPTERS
from rsaft_fast.backbones.sd3 import SD3
from rsaft_fast.backbones.sd15 import SD15
from rsaft_fast.backbones.sdxl import SDXL
from rsaft_fast.backbones.zimage import ZImage
from rsaft_fast.errors import UserError
from rsaft_fast.paths import user_place
from rsaft_fast.pretrained import library_errors
from rsaft_fast.sampling.protocol import Backbone, Branch, Conditioning, Traits


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
    denoiser_on_host: bool = False,
) -> Backbone:
    """Load the pipeline at a folder or hub id, or the model that code of the user's own makes.

    Args:
        path: folder, hub id, "playground" for the pipeline that ships, or python:module:name (`backbones.own`).
        offload_blocks: blocks of the denoiser whose weights stay on the host (`memory.offload`).
        quantize: keep the denoiser's blocks in few bits (`backbones.quantized`), encoded a layer at a time.
        denoiser_on_host: a pipeline's denoiser is left on the host, for who parts it among devices.
        text, networks: which parts of a pipeline get their weights, see `PipelineBackbone.from_pretrained`.

    Raises:
        UserError: nothing there, a pipeline class without an adapter, a damaged file, or a size it cannot make.
    """
    if is_own(path):
        options = {"offload_blocks": offload_blocks, "quantize": quantize}
        return make_own(str(path), height=height, width=width, dtype=dtype, device=device, **options)
    path = local_path(user_place(str(path)))
    adapter = adapter_for(path, text)
    # Every number in a stranger's configs can break what is computed from it, in its own way.
    with library_errors(
        f"the pipeline at {path} could not be loaded",
        "its configs are damaged or do not belong together: download it anew",
    ):
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
            denoiser_on_host=denoiser_on_host,
        )


def adapter_for(path: str | Path, text: bool = True) -> type[PipelineBackbone]:
    """The adapter for the pipeline at a folder or hub id, all of whose small files are read and checked for it.

    Args:
        text: whether the text encoders must be there.

    Raises:
        UserError: nothing there, a pipeline class without an adapter, a component without which nothing runs, a damaged
            config, or a network that is stored quantised.
    """
    path = local_path(path)
    kind = read_index(path, find_folder(path)).get("_class_name")
    if not isinstance(kind, str) or kind not in ADAPTERS:
        supported = ", ".join(sorted(ADAPTERS))
        raise UserError(f"{path} is a {kind}; supported pipeline classes: {supported}")
    read_pipeline(path, ADAPTERS[kind].family, text)
    return ADAPTERS[kind]


def traits_of(path: str | Path) -> Traits:
    """What a recipe's keys are checked against, of the model at a folder, a hub id or python:module:name.

    Raises:
        UserError: as `adapter_for`, or as `make_own`.
    """
    return make_own(str(path), device="meta") if is_own(path) else adapter_for(path, text=False).family


def local_path(path: str | Path) -> str | Path:
    """The path, or that of the pipeline that ships with the package."""
    if str(path) == "playground":
        from rsaft_fast.playground import pipeline_path

        return pipeline_path()
    return path


__all__ = [
    "ADAPTERS",
    "FLUX",
    "SD3",
    "SD15",
    "SDXL",
    "Backbone",
    "Branch",
    "Conditioning",
    "FLUX2Dev",
    "FLUX2Klein",
    "Krea2",
    "LoRASettings",
    "PipelineBackbone",
    "Quantization",
    "QwenImage",
    "Traits",
    "ZImage",
    "adapter_for",
    "add_lora",
    "is_text_encoder",
    "load_backbone",
    "local_path",
    "random_backbone",
    "save_lora",
    "traits_of",
]
