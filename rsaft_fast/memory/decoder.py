"""Exact backward through a diffusers VAE decoder in a fraction of the memory: `backbone.checkpoint: decoder-strips`.

The decoder is walked by hand, picture by picture, as a chain of layers that work in row strips (`memory.strips`), so
that no layer needs a full-size tensor beside its input, its output and, in a resnet, the one between. Of a forward pass
only what each resolution starts from is kept, and of the last resolution each layer's input; backward, one resolution
after the other is recomputed from its start, every gradient is written over the activation that it belongs to, and
everything is dropped after its last use.

For the decoder that SD1.5, SDXL, SD3 and FLUX.1 share, at 1024x1024 in bf16: 1.4 GiB at the peak, whatever the batch,
where checkpointing per resnet takes 4.9 GiB a picture. Tiling takes less, but normalises each tile by itself, which is
another function with another gradient.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageDecoder3d
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from rsaft_fast.errors import UserError
from rsaft_fast.memory.causal_decoder import CausalStripForward
from rsaft_fast.memory.checkpointing import Checkpointing, ReplacedForward
from rsaft_fast.memory.strips import STRIP_ELEMENTS, NormSiluConv, Recomputed, Resnet, Tail, Upsample
from rsaft_fast.memory.walk import Layer, StripDecoder, decode, is_plain, modules_between, only_latents, segments


def _walk(decoder: Decoder, strip_elements: int) -> StripDecoder:
    layers = (_layer(module, strip_elements) for module in modules_between(decoder, UNetMidBlock2D, UpDecoderBlock2D))
    norms = [m.num_channels for m in decoder.up_blocks[-1].modules() if isinstance(m, nn.GroupNorm)]
    widest = max([decoder.conv_out.in_channels, *norms])
    return StripDecoder(segments(Recomputed(decoder.conv_in), layers, _tail(decoder, strip_elements)), widest)


def _layer(module: nn.Module, strip_elements: int) -> Layer:
    if is_plain(module, ResnetBlock2D):
        parts = _resnet_parts(module)
        if parts is not None:
            first, second, shortcut = parts
            return Resnet(NormSiluConv(*first, strip_elements), NormSiluConv(*second, strip_elements), shortcut)
    if is_plain(module, Upsample2D):
        as_known = (module.use_conv, module.use_conv_transpose, module.norm, module.interpolate, module.name)
        if as_known == (True, False, None, True, "conv") and _is_3x3(module.conv):
            return Upsample(module.conv, strip_elements)
    if isinstance(module, Attention | Upsample2D):
        return Recomputed(module)
    return Recomputed(partial(_with_no_embedding, module))


def _resnet_parts(resnet: ResnetBlock2D) -> tuple | None:
    """Give a resnet's two layers and its shortcut; None if it is of another kind."""
    known = (
        resnet.time_emb_proj is None
        and resnet.time_embedding_norm in ("default", "group")  # without an embedding the same
        and resnet.upsample is None
        and resnet.downsample is None
        and resnet.output_scale_factor == 1
        and not (resnet.training and resnet.dropout.p > 0)
        and is_plain(resnet.nonlinearity, nn.SiLU)
        and _is_norm(resnet.norm1)
        and _is_norm(resnet.norm2)
        and _is_3x3(resnet.conv1)
        and _is_3x3(resnet.conv2)
        and (resnet.conv_shortcut is None or _is_1x1(resnet.conv_shortcut))
    )
    return ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2), resnet.conv_shortcut) if known else None


def _tail(decoder: Decoder, strip_elements: int) -> Layer:
    norm, activation, conv = decoder.conv_norm_out, decoder.conv_act, decoder.conv_out
    if _is_norm(norm) and is_plain(activation, nn.SiLU) and _is_3x3(conv):
        return Tail(NormSiluConv(norm, conv, strip_elements))
    return Recomputed(nn.Sequential(norm, activation, conv))


def _with_no_embedding(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, None)


def _is_norm(module: nn.Module) -> bool:
    return is_plain(module, nn.GroupNorm) and module.affine


def _is_3x3(module: nn.Module) -> bool:
    return _is_conv(module, (3, 3), (1, 1))


def _is_1x1(module: nn.Module) -> bool:
    return _is_conv(module, (1, 1), (0, 0))


def _is_conv(module: nn.Module, kernel: tuple[int, int], padding: tuple[int, int]) -> bool:
    if not is_plain(module, nn.Conv2d):
        return False
    found = (module.kernel_size, module.padding, module.stride, module.dilation, module.groups, module.padding_mode)
    return found == (kernel, padding, (1, 1), (1, 1), 1, "zeros")


class StripForward(ReplacedForward):
    """Stand-in for the decoder's `forward`, in strips."""

    def __init__(self, module: nn.Module, strip_elements: int):
        super().__init__(module)
        self.strip_elements = strip_elements

    def __call__(self, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None) -> torch.Tensor:
        if latent_embeds is not None or not only_latents(self.module, sample.device):
            return self.run(sample, latent_embeds)
        return decode(_walk(self.module, self.strip_elements), sample)


KINDS = {Decoder: StripForward, QwenImageDecoder3d: CausalStripForward}
"""What takes the place of a decoder's forward, by the decoder's class."""


def decode_in_strips(vae: nn.Module, strip_elements: int = STRIP_ELEMENTS) -> Checkpointing:
    """Let a diffusers VAE decode in row strips, with a backward pass that recomputes all it can.

    Known are the decoder of `AutoencoderKL`, and that of `AutoencoderKLQwenImage` where it is called for one frame and
    without a cache of frames (`vae.decode` has one, for it may go on). Images and latent gradients are those of the
    plain decoder to rounding. A layer that is not as SD1.5, SDXL, SD3, FLUX.1 and Qwen-Image have it (another
    activation, a hook, an adapter) runs as it is and is recomputed as a whole. Where more than
    the latents' gradient may be wanted (trained decoder weights, dropout in training, autocast), the plain decoder
    runs. The backward pass cannot itself be differentiated.

    Args:
        strip_elements: of the widest strip.

    Returns:
        a handle whose `remove()` undoes it; also a context manager.

    Raises:
        UserError: the VAE has another decoder.
    """
    decoder = getattr(vae, "decoder", None)
    if type(decoder) not in KINDS:
        raise UserError(
            f"backbone.checkpoint decoder-strips: this VAE ({type(vae).__name__}) decodes by "
            f"{type(decoder).__name__}, and diffusers' AutoencoderKL and AutoencoderKLQwenImage decoders alone are "
            "known; use decoder instead"
        )
    return Checkpointing([decoder], partial(KINDS[type(decoder)], strip_elements=strip_elements))
