"""Checks of what an optimizer must know of other workers, before their weights part."""

import warnings
from typing import Literal

import torch.distributed as dist

Replicas = dist.ProcessGroup | Literal[False] | None
"""Ranks that hold the same weights; False: there are none; None: nothing was said."""


def _count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def warn_if_several_workers(stacklevel: int) -> None:
    """Warn where other workers run and the optimizer was told of none."""
    if _count() > 1:
        warnings.warn(
            f"{_count()} workers, and the optimizer knows of none: a first pass that is non-finite on one would be "
            "skipped there alone. Pass replicas=torch.distributed.group.WORLD where workers hold the same weights "
            "(DDP), process_group where they hold shards, replicas=False where each trains its own",
            stacklevel=stacklevel + 1,
        )


def refuse_several_workers() -> None:
    """Refuse several workers, for what works on one only.

    Raises:
        RuntimeError: there are more.
    """
    if _count() > 1:
        raise RuntimeError(
            f"release_gradients with {_count()} workers: a gradient is applied before it could be averaged over them. "
            "Leave it out, or train on one"
        )
