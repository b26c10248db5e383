"""Memory: activation checkpointing, offload, decoding in strips, and the bytes that autograd keeps."""

from rsaft_fast.memory.accounting import SavedTensorBytes, saved_tensor_bytes
from rsaft_fast.memory.checkpointing import (
    Checkpointing,
    checkpoint_calls,
    checkpoint_vae_decoder,
)
from rsaft_fast.memory.decoder import decode_in_strips
from rsaft_fast.memory.networks import checkpoint_denoiser, checkpoint_networks, denoiser_blocks

__all__ = [
    "Checkpointing",
    "SavedTensorBytes",
    "checkpoint_calls",
    "checkpoint_denoiser",
    "checkpoint_networks",
    "checkpoint_vae_decoder",
    "decode_in_strips",
    "denoiser_blocks",
    "saved_tensor_bytes",
]
