"""Sharpness-aware optimizers: ``SAM`` around any torch optimizer, and the fused ``SAMAdamW``."""

from .batch_norm import frozen_batch_norm_statistics
from .sam import SAM
from .sam_adamw import SAMAdamW

__all__ = ["SAM", "SAMAdamW", "frozen_batch_norm_statistics"]
