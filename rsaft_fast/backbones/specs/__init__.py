"""Public architecture configurations at real size, for benchmarks and estimates without weights.

`<name>.json` has a pipeline's class, its denoiser's config, its scheduler's, and where its VAE differs from the one
architecture that most share; one of another class says its class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import diffusers
import torch

from rsaft_fast.errors import UserError

NAMES = tuple(
    sorted(file.name.removesuffix(".json") for file in resources.files(__name__).iterdir() if ".json" in file.name)
)
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


@dataclass(frozen=True)
class Spec:
    """The architecture of a pipeline as far as `predict` and `decode` go: no text encoders.

    Attributes:
        pipeline: name of the diffusers pipeline class.
        denoiser, vae: their configs. A `_class_name`, where there is one, must be the pipeline's own.
        scheduler: its config, with `_class_name`.
    """

    pipeline: str
    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]


def load_spec(name: str) -> Spec:
    """Read the published architecture of that name, one of `NAMES`."""
    if name not in NAMES:
        raise UserError(f"there is no spec {name!r}; there are {', '.join(NAMES)}")
    found = json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    shared = {} if "_class_name" in found["vae"] else _VAE
    return Spec(found["pipeline"], found["denoiser"], shared | found["vae"], found["scheduler"])


def build_denoiser(name: str, device: torch.device | str = "meta") -> torch.nn.Module:
    """Make the denoiser of that name with unset weights, on `device` ("meta": shapes alone, no memory)."""
    config = dict(load_spec(name).denoiser)
    network = getattr(diffusers, config.pop("_class_name"))
    with torch.device(device):
        return network(**config)
