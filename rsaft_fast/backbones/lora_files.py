"""LoRA files of any program that diffusers reads, into a pipeline: all of what they hold, or an error.

diffusers and peft attach what finds its place, and pass over the rest with a word in the log: a LoRA of another family
would change nothing, and one that fits by half would be another LoRA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from rsaft_fast.backbones.pipeline import PipelineBackbone
from rsaft_fast.errors import UserError
from rsaft_fast.pretrained import Weights, check_weights, library_errors
from rsaft_fast.sampling.protocol import LORA_FILE, Backbone

ADAPTER = "file"


def load_lora(backbone: Backbone, path: str | Path) -> list[str]:
    """Attach the LoRA in a file, or in the folder that holds it; lines for the user to see.

    Raises:
        UserError: nothing there, no LoRA, not finite, or one of which a part has no place in this pipeline.
    """
    if not isinstance(backbone, PipelineBackbone):
        raise UserError(f"LoRA {str(path)!r}: its file is diffusers' to read, and {backbone.name} is no pipeline")
    file = find_lora(path)
    check_weights(file.parent, Weights((file.name,), None, "safetensors"))
    with library_errors(f"LoRA {str(file)!r} could not be read", "download it anew"):
        content = load_file(file)
    _check_content(file, content)
    pipeline = backbone.pipeline
    options = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
    with library_errors(
        f"LoRA {str(file)!r} could not be loaded into this {type(pipeline).__name__}",
        "it is of another model: give one that was trained for this family",
    ):
        found = pipeline.lora_state_dict(str(file.parent), **options, **backbone.lora_reading_options)
        wanted = found[0] if isinstance(found, tuple) else found
        if wanted:
            pipeline.load_lora_weights(str(file.parent), adapter_name=ADAPTER, **options)
    _check_attached(file, backbone, wanted)
    if not any(tensor.any() for name, tensor in content.items() if _is_output(name)):
        return [f"LoRA {file}: the output side of all its layers is zero; pictures are the untrained model's"]
    return []


def has_text_part(path: str | Path) -> bool:
    """Whether a LoRA has layers of text encoders beside the denoiser's.

    Raises:
        UserError: as `load_lora`, for what is no file of a LoRA.
    """
    file = find_lora(path)
    check_weights(file.parent, Weights((file.name,), None, "safetensors"))
    with safe_open(file, "pt") as opened:
        return any(name.startswith(("text_encoder", "lora_te")) or ".text_model." in name for name in opened.keys())


def find_lora(path: str | Path) -> Path:
    """The file that a user means by a file or a folder.

    Raises:
        UserError: nothing there, another format, or several files of which none has diffusers' name.
    """
    place = Path(path)
    if os.path.isdir(place):
        files = sorted(place.glob("*.safetensors"))
        if os.path.isfile(place / LORA_FILE):
            return place / LORA_FILE
        if len(files) == 1:
            return files[0]
        inside = f"; {place / 'lora'} is a folder: is it that?" if os.path.isdir(place / "lora") else ""
        held = f"{len(files)} .safetensors files ({', '.join(file.name for file in files[:4])})" if files else "no LoRA"
        raise UserError(f"LoRA {str(path)!r} is a folder with {held}; give the file, such as {LORA_FILE}{inside}")
    if not os.path.exists(place):
        raise UserError(f"LoRA {str(path)!r} does not exist; give the file or folder that a run left in lora/")
    if place.suffix != ".safetensors":
        raise UserError(
            f"LoRA {str(path)!r} is not a .safetensors file; other formats can run code when they are loaded"
        )
    return place


def _check_content(file: Path, content: Mapping[str, torch.Tensor]) -> None:
    if not content:
        raise UserError(f"LoRA {str(file)!r} holds no tensors; nothing was trained into it: give another")
    if odd := [name for name, tensor in content.items() if not torch.isfinite(tensor.float()).all()]:
        raise UserError(f"LoRA {str(file)!r}: {odd[0]} is not finite; its training went astray: give an earlier one")
    # diffusers leaves the magnitudes out, and what remains of the adapter is another one.
    if scaled := [name for name in content if "dora_scale" in name or "magnitude" in name]:
        raise UserError(f"LoRA {str(file)!r} is a DoRA (it has {scaled[0]}), which diffusers reads only in part")


def _check_attached(file: Path, backbone: PipelineBackbone, wanted: Mapping[str, torch.Tensor]) -> None:
    """Compare what the file held, under diffusers' names, with what the networks have now."""
    pipeline = backbone.pipeline
    attached = {
        name: get_peft_model_state_dict(network, adapter_name=ADAPTER)
        for name, network in pipeline.components.items()
        if ADAPTER in (getattr(network, "peft_config", None) or {})
    }
    families = f"{len(wanted)} tensors of LoRA {str(file)!r}"
    mend = f"it is of another model than this {type(pipeline).__name__}: give one that was trained for it"
    if not any(attached.values()):
        raise UserError(f"none of the {families} has a place here, {next(iter(wanted), 'nothing')!r} first; {mend}")
    # Kronecker factors (LoKr) are joined on the way in, so that they cannot be counted.
    if any(".lokr_" in name for name in wanted):
        return
    lost, drawn = [], []
    for name in {key.partition(".")[0] for key in wanted}:
        keys = [key for key in wanted if key.startswith(f"{name}.")]
        count = len(attached.get(name, {}))
        if name not in attached:
            lost += keys
        elif count < len(keys):
            present = {_layer(key) for key in attached[name]}
            gone = [key for key in keys if _layer(key.removeprefix(f"{name}.")) not in present]
            lost += gone or keys[count:]
        elif count > len(keys):
            present = {key.removeprefix(f"{name}.") for key in keys}
            drawn += [key for key in attached[name] if key not in present]
    if lost:
        raise UserError(f"{len(lost)} of the {families} have no place here, {sorted(lost)[0]!r} first; {mend}")
    if drawn:
        raise UserError(f"LoRA {str(file)!r} lacks {len(drawn)} tensors, {sorted(drawn)[0]!r} first; download it anew")


def _layer(key: str) -> str:
    """A key without the adapter's own part."""
    for part in (".lora_", ".lora.", ".processor."):
        key = key.partition(part)[0]
    return key


def _is_output(name: str) -> bool:
    """Whether a tensor is the second of an adapter's two, which starts at zero."""
    return not any(part in name for part in ("lora_A", "lora_down", "lora.down", "alpha", "lokr", "hada", "_lora.down"))
