"""The image perturbation (one radius a sample): ours on each backend, and eager torch."""

from __future__ import annotations

from functools import partial

import torch

from rsaft_fast import ops
from rsaft_fast.benchmarks.peers import DTYPES
from rsaft_fast.benchmarks.providers import OURS, use_backend, why_missing
from rsaft_fast.benchmarks.timing import Part

WHAT = "perturb_images"
EAGER = "eager"
RADIUS = 0.01
SIZES = {"cuda": ((32, 1024), (4, 512)), "cpu": ((2, 128),)}
IMAGE_DTYPES = ("fp32", "bf16")


def case_name(batch: int, side: int) -> str:
    return f"{batch}x3x{side}x{side}"


def eager(images: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """What one writes without a kernel: per-sample norm, scale, subtract."""
    norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True, dtype=torch.float32)
    return images - (RADIUS / (norm + 1e-12)).to(images.dtype) * gradient


def image_parts(batch: int, side: int, dtype: str, device: torch.device) -> tuple[dict[str, Part], dict[str, str]]:
    """Calls of every provider that runs here, on one batch, and why the others do not."""
    images = torch.rand(batch, 3, side, side, device=device).to(DTYPES[dtype])
    gradient = torch.randn_like(images)
    ours = partial(ops.perturb_images, images, gradient, RADIUS)
    missing = {name: reason for name in OURS if (reason := why_missing(name, device, dtype))}
    here = [name for name in OURS if name not in missing]
    parts = {name: Part(ours, partial(use_backend, name.removeprefix("ours-"))) for name in here}
    return {EAGER: Part(partial(eager, images, gradient))} | parts, missing
