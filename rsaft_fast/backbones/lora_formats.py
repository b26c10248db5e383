"""A LoRA as kohya's sd-scripts write it, which ComfyUI, AUTOMATIC1111 and Forge read.

A layer's three tensors are `<name>.lora_down.weight` (A), `<name>.lora_up.weight` (B) and `<name>.alpha`; the update is
alpha / rank * up @ down. Names: sd-scripts (networks/lora.py, library/sdxl_model_util.py) call the layers of Stable
Diffusion 1 and 2 as diffusers does, and those of XL, 3 and FLUX.1 as the models' own code does, with underscores for
the dots. In the latter two, query, key and value are one layer; the update of three is one of three times the rank,
whose up matrix is zero outside the three blocks: the same numbers, exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from rsaft_fast.backbones.lora import LoRASettings
from rsaft_fast.backbones.pipeline import PipelineBackbone

KOHYA_FILE = "kohya_lora_weights.safetensors"
_PREFIX = "lora_unet_"


@dataclass(frozen=True)
class Place:
    """Where a layer lies in the model's own code.

    Attributes:
        name: of the layer there.
        block: which of the blocks of rows of that layer it is.
        blocks: rows of each of its blocks; None where it is all of it.
    """

    name: str
    block: int = 0
    blocks: tuple[int, ...] | None = None


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
    config = backbone.denoiser.config
    return {
        "StableDiffusionPipeline": lambda layer: Place(layer),
        "StableDiffusionXLPipeline": lambda layer: _xl_place(layer, config),
        "StableDiffusion3Pipeline": lambda layer: _sd3_place(layer, config),
        "FluxPipeline": lambda layer: _flux_place(layer, config),
    }[backbone.pipeline_class.__name__]


# Within a resnet: diffusers' name, the original's.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_XL_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _xl_place(layer: str, config: Any) -> Place | None:
    """In the original UNet a resolution's resnets, attentions and its resampling are numbered through."""
    if layer in _XL_OUTER:
        return Place(_XL_OUTER[layer])
    found = re.fullmatch(r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+?)\.(\d+)\.(.+)", layer)
    if found is None or not isinstance(config.layers_per_block, int):
        return None
    side, number, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        first, dot, remainder = rest.partition(".")
        rest = _RESNET.get(first, first) + dot + remainder
    if side == "mid":
        return Place(f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}")
    each = config.layers_per_block + 1
    if kind == "downsamplers":
        return Place(f"input_blocks.{(number + 1) * each}.0.op")
    if kind == "upsamplers":
        # Behind the last resnet, and its attention where there is one.
        behind = 2 if "Attn" in config.up_block_types[number] else 1
        return Place(f"output_blocks.{number * each + each - 1}.{behind}.conv")
    within = {"resnets": 0, "attentions": 1}.get(kind)
    if within is None:
        return None
    start = f"input_blocks.{1 + number * each + index}" if side == "down" else f"output_blocks.{number * each + index}"
    return Place(f"{start}.{within}.{rest}")


_OF_PICTURE = {"to_q": 0, "to_k": 1, "to_v": 2}
_OF_TEXT = {"add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}


def _width(config: Any) -> int:
    return config.num_attention_heads * config.attention_head_dim


def _sd3_place(layer: str, config: Any) -> Place | None:
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(attn2?|ff|ff_context)\.(.+)", layer)
    if found is None:
        return None
    number, part, rest = found.groups()
    thirds = (_width(config),) * 3
    picture, text = f"joint_blocks.{number}.x_block", f"joint_blocks.{number}.context_block"
    if part in ("ff", "ff_context"):
        inner = {"net.0.proj": "fc1", "net.2": "fc2"}.get(rest)
        return inner and Place(f"{picture if part == 'ff' else text}.mlp.{inner}")
    if rest in _OF_PICTURE:
        return Place(f"{picture}.{part}.qkv", _OF_PICTURE[rest], thirds)
    if rest in _OF_TEXT:
        return Place(f"{text}.attn.qkv", _OF_TEXT[rest], thirds)
    outer = {"to_out.0": f"{picture}.{part}.proj", "to_add_out": f"{text}.attn.proj"}.get(rest)
    return outer and Place(outer)


def _flux_place(layer: str, config: Any) -> Place | None:
    found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", layer)
    if found is None:
        return None
    single, number, rest = found.groups()
    width = _width(config)
    if single:
        # One layer makes query, key, value and the MLP's input.
        block = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2, "proj_mlp": 3}.get(rest)
        if block is not None:
            return Place(f"single_blocks.{number}.linear1", block, (width, width, width, 4 * width))
        outer = {"proj_out": "linear2", "norm.linear": "modulation.lin"}.get(rest)
        return outer and Place(f"single_blocks.{number}.{outer}")
    start = f"double_blocks.{number}"
    kind, _, inner = rest.partition(".")
    if kind == "attn" and inner in _OF_PICTURE:
        return Place(f"{start}.img_attn.qkv", _OF_PICTURE[inner], (width,) * 3)
    if kind == "attn" and inner in _OF_TEXT:
        return Place(f"{start}.txt_attn.qkv", _OF_TEXT[inner], (width,) * 3)
    outer = {
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
    }.get(rest)
    return outer and Place(f"{start}.{outer}")


# What the programs tell a base model by: ss_base_model_version, modelspec.architecture, modelspec.implementation.
_STABILITY = "https://github.com/Stability-AI/generative-models"
_VERSIONS = {
    "StableDiffusionPipeline": ("sd_v1", "stable-diffusion-v1", "diffusers"),
    "StableDiffusionXLPipeline": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", _STABILITY),
    "StableDiffusion3Pipeline": ("sd3", "stable-diffusion-3", _STABILITY),
    "FluxPipeline": ("flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux"),
}
_SD2_TEXT_WIDTH = 1024


def _header(backbone: PipelineBackbone, settings: LoRASettings, alpha: float, base: str) -> dict[str, str]:
    """What the programs read of a file before its tensors: sd-scripts' ss_* and Stability's modelspec keys."""
    version, architecture, implementation = _VERSIONS[backbone.pipeline_class.__name__]
    second = version == "sd_v1" and backbone.denoiser.config.cross_attention_dim == _SD2_TEXT_WIDTH
    if second:
        version, architecture = "sd_v2", "stable-diffusion-v2-512"
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings.rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": version,
        "ss_v2": str(second),
        "ss_sd_model_name": base,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        "modelspec.title": f"RSA-FT LoRA of {base}",
        "modelspec.resolution": f"{backbone.width}x{backbone.height}",
    }
    if (kind := backbone.pipeline.scheduler.config.get("prediction_type")) is not None:
        header["modelspec.prediction_type"] = "v" if kind == "v_prediction" else kind
    return header
