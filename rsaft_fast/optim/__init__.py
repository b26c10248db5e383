"""Sharpness-aware optimizers: `SAM` around any torch optimizer, and the fused `SAMAdamW`."""

from rsaft_fast.optim.batch_norm import frozen_batch_norm_statistics
from rsaft_fast.optim.sam import SAM
from rsaft_fast.optim.sam_adamw import SAMAdamW

__all__ = ["SAM", "SAMAdamW", "frozen_batch_norm_statistics"]
