"""Memory: activation checkpointing and the accounting of what autograd keeps."""

from rsaft_fast.memory.accounting import SavedTensorBytes, saved_tensor_bytes
from rsaft_fast.memory.checkpointing import (
    Checkpointing,
    checkpoint_calls,
    checkpoint_clip_vision,
    checkpoint_denoiser,
    checkpoint_vae_decoder,
)

__all__ = [
    "Checkpointing",
    "SavedTensorBytes",
    "checkpoint_calls",
    "checkpoint_clip_vision",
    "checkpoint_denoiser",
    "checkpoint_vae_decoder",
    "saved_tensor_bytes",
]
