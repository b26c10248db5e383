"""Compilation by region: the blocks that a denoiser repeats, compiled once for all of them.

The blocks' parameters are inputs of the compiled code, not constants in it, so weights that change in place (the
optimizer, a SAM perturbation) need no new compilation. With and without gradient are two entries of the same cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import nn

# diffusers names those of the UNets and of FLUX.1 (`_repeated_blocks`), and none for SD3.
_REPEATED = ("JointTransformerBlock",)
# Entries of one block class: SD1.5 has four shapes, each for two batch sizes, with and without gradient.
_MOST_ENTRIES = 64


class _CompiledForward:
    """Stand-in for a block's `forward`, compiled; without gradient alone, or always."""

    def __init__(self, forward: Callable, with_gradient: bool, **options):
        self.eager, self.with_gradient = forward, with_gradient
        self.compiled = torch.compile(forward, **options)

    def __call__(self, *args, **kwargs):
        run = self.compiled if self.with_gradient or not torch.is_grad_enabled() else self.eager
        return run(*args, **kwargs)


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """List the transformer blocks of a diffusers denoiser.

    Raises:
        ValueError: none is known by name.
    """
    names = getattr(denoiser, "_repeated_blocks", None) or _REPEATED
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(denoiser).__name__} has no block named {' or '.join(names)} to compile")
    return blocks


def compile_blocks(blocks: Iterable[nn.Module], with_gradient: bool, backend: str = "inductor") -> None:
    """Compile each block at its first call, as one graph each and for fixed shapes.

    Adapters and checkpointing belong inside: attach them before.

    Args:
        with_gradient: also where autograd records; else those calls stay as they are.
        backend: of torch.compile.
    """
    options = {"fullgraph": True, "dynamic": False, "backend": backend}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _MOST_ENTRIES
    for block in blocks:
        block.forward = _CompiledForward(block.forward, with_gradient, **options)
