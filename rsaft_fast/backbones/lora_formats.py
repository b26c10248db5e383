"""A LoRA as kohya's sd-scripts write it, which ComfyUI, AUTOMATIC1111 and Forge read.

A layer's three tensors are `<name>.lora_down.weight` (A), `<name>.lora_up.weight` (B) and `<name>.alpha`; the update is
alpha / rank * up @ down. Names: sd-scripts (networks/lora.py, library/sdxl_model_util.py) call the layers of Stable
Diffusion 1 and 2 as diffusers does, and those of XL, 3 and FLUX.1 as the models' own code does, with underscores for
the dots. In the latter two, query, key and value are one layer; the update of three is one of three times the rank,
whose up matrix is zero outside the three blocks: the same numbers, exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from rsaft_fast.backbones.family import Place
from rsaft_fast.backbones.lora import LoRASettings
from rsaft_fast.backbones.pipeline import PipelineBackbone

KOHYA_FILE = "kohya_lora_weights.safetensors"
_PREFIX = "lora_unet_"


def save_kohya(backbone: PipelineBackbone, folder: Path, settings: LoRASettings, base: str) -> Path | None:
    """Write the adapters in kohya's format beside diffusers'; None if a layer has no name there.

    Args:
        base: what the file says it was trained on; a hub id or a name, no path.
    """
    alpha = settings.scale * settings.rank
    state = {name: t.detach().float().cpu() for name, t in get_peft_model_state_dict(backbone.denoiser).items()}
    tensors = kohya_state(state, alpha, kohya_places(backbone))
    if tensors is None:
        return None
    file = folder / KOHYA_FILE
    save_file(tensors, file, metadata=_header(backbone, settings, alpha, base))
    _sort_metadata(file)
    return file


def _sort_metadata(file: Path) -> None:
    """Put the header's texts in order: safetensors writes them in another one each time, and equal runs are to give
    equal files."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        stream.seek(8)
        stream.write(text.ljust(length))


def kohya_state(
    state: Mapping[str, torch.Tensor], alpha: float, place_of: Callable[[str], Place | None]
) -> dict[str, torch.Tensor] | None:
    """The tensors of a kohya file.

    Args:
        state: peft's, `<layer>.lora_A.weight` (rank, in) and `<layer>.lora_B.weight` (out, rank), alpha not folded in.
        place_of: a layer's place in the model's own code.
    """
    joined: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
    blocks: dict[str, tuple[int, ...] | None] = {}
    for name, down in state.items():
        layer, a, _ = name.partition(".lora_A.weight")
        if not a:
            continue
        place = place_of(layer)
        if place is None:
            return None
        joined.setdefault(place.name, {})[place.block] = (down, state[f"{layer}.lora_B.weight"])
        blocks[place.name] = place.blocks
    tensors = {}
    for name, parts in joined.items():
        down, up = _joined(parts, blocks[name])
        key = _PREFIX + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = down.contiguous()
        tensors[f"{key}.lora_up.weight"] = up.contiguous()
        # alpha / rank stays, whatever the rank has become.
        tensors[f"{key}.alpha"] = torch.tensor(alpha * len(parts))
    return tensors


def _joined(
    parts: Mapping[int, tuple[torch.Tensor, torch.Tensor]], blocks: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adapters of blocks of rows of one layer as one adapter of it."""
    if blocks is None:
        return parts[0]
    ranks = [parts[i][0].shape[0] for i in sorted(parts)]
    up = torch.zeros(sum(blocks), sum(ranks))
    column = 0
    for i, rank in zip(sorted(parts), ranks):
        row = sum(blocks[:i])
        up[row : row + blocks[i], column : column + rank] = parts[i][1]
        column += rank
    return torch.cat([parts[i][0] for i in sorted(parts)]), up


def kohya_places(backbone: PipelineBackbone) -> Callable[[str], Place | None]:
    """For a backbone's layers, by diffusers' name, their places in kohya's naming."""
    return partial(backbone.family.kohya_place, config=backbone.denoiser.config)


def _header(backbone: PipelineBackbone, settings: LoRASettings, alpha: float, base: str) -> dict[str, str]:
    """What the programs read of a file before its tensors: sd-scripts' ss_* and Stability's modelspec keys."""
    base_model = backbone.family.kohya_header(backbone.denoiser.config)
    header = {
        "format": "pt",
        "ss_network_module": base_model.module,
        "ss_network_dim": str(settings.rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": base_model.version,
        "ss_v2": str(base_model.is_v2),
        "ss_sd_model_name": base,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{base_model.architecture}/lora",
        "modelspec.implementation": base_model.implementation,
        "modelspec.title": f"RSA-FT LoRA of {base}",
        "modelspec.resolution": f"{backbone.width}x{backbone.height}",
    }
    if (kind := backbone.pipeline.scheduler.config.get("prediction_type")) is not None:
        header["modelspec.prediction_type"] = "v" if kind == "v_prediction" else kind
    return header
