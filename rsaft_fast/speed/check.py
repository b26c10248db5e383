"""Checks of a recipe's section `speed` before anything is loaded."""

from __future__ import annotations

import os
import shutil

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.speed.attention import PACKAGES, check_attention
from rsaft_fast.speed.settings import SpeedSettings


def check_agreement(settings: SpeedSettings, *, quantize: str | None, offload_blocks: int) -> None:
    """Refuse keys that contradict each other.

    Args:
        quantize, offload_blocks: `backbone`'s.

    Raises:
        UserError: the first that does not.
    """
    compiles, streams = settings.compile != "none", offload_blocks > 0
    obstacles = {
        f"speed.compile {settings.compile} with backbone.quantize {quantize}: what reads the codes cannot be traced": (
            compiles and quantize is not None
        ),
        f"speed.compile {settings.compile} with backbone.offload_blocks {offload_blocks}: compiled blocks cannot wait "
        "for weights that are on their way": compiles and streams,
        f"speed.compile {settings.compile} with speed.attention {settings.attention}: the package's kernels cannot be "
        "traced; take cudnn, or compile none": compiles and settings.attention in PACKAGES,
        f"speed.cuda_graph with backbone.offload_blocks {offload_blocks}: a captured call reads weights where they "
        "were, and these move": settings.cuda_graph and streams,
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise UserError(f"{obstacle}; leave one of the two out")


def check_device(settings: SpeedSettings, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what does not run on a device, by trying it on a few numbers where that is quick.

    Raises:
        UserError: the first that does not.
    """
    if settings.cuda_graph:
        require_cuda(device)
    if settings.compile != "none" and (obstacle := _cannot_compile(device)):
        raise UserError(f"speed.compile is {settings.compile}, but {obstacle}, or set speed.compile=none")
    if settings.attention not in ("auto", "sdpa"):
        check_attention(settings.attention, device, dtype)


def require_cuda(device: torch.device) -> None:
    """Raise `UserError` for a device without CUDA graphs."""
    if device.type != "cuda":
        raise UserError(f"speed.cuda_graph on {device}: CUDA graphs are for CUDA devices only; leave it out")


def _cannot_compile(device: torch.device) -> str | None:
    """Name what Inductor lacks for code on this device: on the CPU it writes C++, for CUDA Triton, started by C."""
    compilers = {"cpu": ("CXX", ("g++", "clang++")), "cuda": ("CC", ("cc", "gcc", "clang"))}
    variable, names = compilers.get(device.type, ("CC", ()))
    if not any(map(shutil.which, (os.environ.get(variable) or names[0], *names))):
        return f"there is no compiler for {device.type} ({' or '.join(names)}): install one, or name it in {variable}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs a GPU of compute capability 7.0 (Volta) or newer: compute elsewhere"
    return None
