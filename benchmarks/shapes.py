"""Parameter lists of real models, from their architecture alone."""

from __future__ import annotations

import math
from functools import cache

from rsaft_fast.backbones import SD3, SD15
from rsaft_fast.backbones.specs import NAMES, build_denoiser

RANK = 32
_TARGETS = {
    "sd15": SD15.lora_targets,
    "sdxl": SD15.lora_targets,
    "sd35-medium": SD3.lora_targets,
    "flux1": SD3.lora_targets,
}

CASES = ("tiny", *(f"{name}-{kind}" for name in NAMES for kind in ("lora32", "full")))


@cache
def shapes_of(case: str) -> tuple[tuple[int, ...], ...]:
    """Shapes of what is trained: "sdxl-full", "sd15-lora32", ...; "tiny" is for machines without a GPU."""
    if case == "tiny":
        return tuple((256, 257 + i) for i in range(40))
    name, _, kind = case.rpartition("-")
    network = build_denoiser(name)
    if kind == "full":
        return tuple(tuple(p.shape) for p in network.parameters())
    shapes = []
    for path, module in network.named_modules():
        if hasattr(module, "in_features") and path.endswith(_TARGETS[name]):
            shapes += [(RANK, module.in_features), (module.out_features, RANK)]
    return tuple(shapes)


def parameters_of(case: str) -> int:
    """Number of parameters."""
    return sum(math.prod(shape) for shape in shapes_of(case))
