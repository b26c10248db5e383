"""Reward gradients for diffusion models, with a fused sharpness-aware step (arXiv 2603.21175)."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version(__name__)
    except metadata.PackageNotFoundError:  # the sources alone, without an installation
        return "0+unknown"
