"""Public architecture configurations of the denoisers at real size, for benchmarks and estimates without weights."""

from __future__ import annotations

import json
from importlib import resources

import diffusers
import torch

NAMES = ("sd15", "sdxl", "sd35-medium", "flux1")


def build_denoiser(name: str, device: torch.device | str = "meta") -> torch.nn.Module:
    """The denoiser of that name with unset weights, on `device` ("meta": shapes alone, no memory)."""
    config = json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    network = getattr(diffusers, config.pop("_class_name"))
    with torch.device(device):
        return network(**config)
