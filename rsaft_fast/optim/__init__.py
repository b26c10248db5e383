"""Sharpness-aware optimizers: ``SAM`` around any torch optimizer, and the fused ``SAMAdamW``."""

from .sam import SAM
from .sam_adamw import SAMAdamW

__all__ = ["SAM", "SAMAdamW"]
