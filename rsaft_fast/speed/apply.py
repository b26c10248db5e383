"""A recipe's section `speed`, applied to a backbone."""

from __future__ import annotations

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.sampling.protocol import Backbone, Traits
from rsaft_fast.speed.attention import set_attention
from rsaft_fast.speed.check import require_cuda
from rsaft_fast.speed.graphs import graph_calls
from rsaft_fast.speed.regional import compile_blocks, repeated_blocks
from rsaft_fast.speed.settings import SpeedSettings

TEXT_MULTIPLE = 64
"""Tokens that texts of lengths of their own are padded to a multiple of, where each length is compiled or captured by
itself: 8 of them at the most, of Qwen-Image's 512."""


def apply_speed(backbone: Backbone, settings: SpeedSettings) -> None:
    """Set a loaded backbone up as the recipe says.

    After adapters and checkpointing are attached and before the optimizer is built. On the meta device, where shapes
    alone count, nothing is compiled or captured.

    Raises:
        UserError: a setting that this model or device cannot have.
    """
    backbone.cfg_batching = settings.cfg
    denoiser, real = backbone.denoiser, backbone.device.type != "meta"
    if settings.compile != "none" or settings.cuda_graph:
        backbone.text_multiple = TEXT_MULTIPLE
    if settings.channels_last:
        use_channels_last(backbone)
    if settings.attention != "auto":
        set_attention(denoiser, settings.attention)
    if settings.compile != "none" and real:
        compile_blocks(repeated_blocks(denoiser), with_gradient=settings.compile == "all")
    if settings.cuda_graph and real:
        require_cuda(backbone.device)
        graph_calls(denoiser, backbone.device)


def use_channels_last(backbone: Backbone) -> None:
    """Convert the UNet and the VAE's decoder to channels-last layout; their outputs follow their weights.

    Raises:
        UserError: the denoiser is a transformer.
    """
    require_convolutions(backbone)
    backbone.denoiser.to(memory_format=torch.channels_last)
    if backbone.vae is not None:
        backbone.vae.decoder.to(memory_format=torch.channels_last)


def require_convolutions(model: Traits) -> None:
    """Raise `UserError` for a model that is not to be laid out channels-last."""
    if not model.channels_last:
        raise UserError(
            f"speed.channels_last with {model.name}: it is for denoisers made of convolutions, the UNets of SD1.5 and "
            "SDXL; leave it out"
        )
