"""The decoder of Qwen-Image's 3-D causal VAE for one frame, in row strips: a chain of 2-D layers, exactly.

Before its first frame a causal convolution sees zeros. Of one frame it is therefore the 2-D convolution by the last
slice in time of its kernel, and what the decoder does in time alone, doubling frames, it does from the second frame on.
Norms are RMS over a pixel's channels, so that a strip needs nothing of the others. Of one 1024x1024 picture in bf16
diffusers keeps 14.3 GiB for the backward pass, and cannot recompute any of this decoder; in strips 0.7 GiB are kept,
and 1.1 GiB alive at the peak.

In float64 the strips stay in float64, where diffusers' upsampling rounds to fp32 on its way.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageCausalConv3d,
    QwenImageDecoder3d,
    QwenImageMidBlock,
    QwenImageResample,
    QwenImageResidualBlock,
    QwenImageRMS_norm,
    QwenImageUpBlock,
)
from torch import nn
from torch.nn import functional

from rsaft_fast.memory.checkpointing import ReplacedForward
from rsaft_fast.memory.strips import (
    OfRows,
    Recomputed,
    Resnet,
    Rows,
    Tail,
    Upsample,
    at_least_fp32,
    channels_last,
    convolution_gradient,
    convolve,
    empty_picture,
    pad_rows,
    row_strips,
    take,
    with_halo,
)
from rsaft_fast.memory.walk import Layer, StripDecoder, decode, is_plain, modules_between, only_latents, segments

LEAST_LENGTH = 1e-12
"""What a pixel's length is at the least when it is divided by: `normalize` of torch."""


class OneFrame:
    """A causal 3-D convolution as the 2-D one that it is of one frame."""

    def __init__(self, conv: QwenImageCausalConv3d):
        self.conv = conv
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels

    @property
    def weight(self) -> torch.Tensor:
        return self.conv.weight[:, :, -1]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.conv.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.weight, self.bias, padding=self.conv.kernel_size[-1] // 2)


class PixelNormSiluConv:
    """RMS norm of each pixel's channels, SiLU and a 3x3 convolution."""

    def __init__(self, norm: QwenImageRMS_norm, conv: OneFrame, strip_elements: int):
        self.norm, self.conv, self.strip_elements = norm, conv, strip_elements

    def _strips(self, x: torch.Tensor) -> Iterator[Rows]:
        wider = max(self.conv.in_channels, self.conv.out_channels)
        return row_strips(x.shape[2], wider * x.shape[3], self.strip_elements)

    def normalization(self, x: torch.Tensor) -> None:
        """Nothing is to be known of the picture before."""

    def _normalized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise rows, in fp32 at least: the directions of pixels, their lengths, and the norm's output."""
        x = x.to(at_least_fp32(x.dtype))
        lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        directions = x / lengths.clamp_min(LEAST_LENGTH)
        out = directions * self._gain()
        if isinstance(self.norm.bias, torch.Tensor):
            out += self.norm.bias.view(1, -1, 1, 1)
        return directions, lengths, out

    def _gain(self) -> torch.Tensor:
        return self.norm.scale * self.norm.gamma.view(1, -1, 1, 1)

    def forward(self, x: torch.Tensor, normalization: None, add: OfRows | None = None) -> torch.Tensor:
        """Compute conv(SiLU(norm(x))), plus `add`."""
        weight, bias = channels_last(self.conv.weight), self.conv.bias
        out = empty_picture(x, self.conv.out_channels, *x.shape[2:])
        for rows in self._strips(x):
            seen, missing = with_halo(rows, x.shape[2])
            activated = functional.silu(self._normalized(take(x, seen))[2], inplace=True).to(x.dtype)
            strip = convolve(pad_rows(activated, missing), weight, bias)
            if add is not None:
                strip += add(rows)
            take(out, rows).copy_(strip)
        return out

    def backward_(
        self, x: torch.Tensor, gradient: torch.Tensor, normalization: None, *, keep: bool, add: OfRows | None = None
    ) -> torch.Tensor:
        """Compute the gradient at x from that at the output, plus `add`; written over x, and returned.

        With x = |x| u and the norm's output gain u + bias, dx = (d - u <u, d>) / |x|, d the gradient at u.
        """
        before = convolution_gradient(channels_last(self.conv.weight), gradient)
        gain = self._gain()
        for rows in self._strips(x):
            directions, lengths, out = self._normalized(take(x, rows))
            strip = torch.ops.aten.silu_backward(before(rows).to(out.dtype), out).mul_(gain)
            along = (strip * directions).sum(1, keepdim=True).masked_fill_(lengths < LEAST_LENGTH, 0)
            strip.addcmul_(directions, along, value=-1).div_(lengths.clamp_(min=LEAST_LENGTH))
            if add is not None:
                strip += add(rows)
            take(x, rows).copy_(strip)
        return x


class CausalStripForward(ReplacedForward):
    """Stand-in for the decoder's `forward`, in strips, where it is given one frame and no cache of earlier ones."""

    def __init__(self, module: nn.Module, strip_elements: int):
        super().__init__(module)
        self.strip_elements = strip_elements

    def __call__(self, x: torch.Tensor, feat_cache: list | None = None, **others) -> torch.Tensor:
        if feat_cache is not None or x.shape[2] != 1 or not only_latents(self.module, x.device):
            return self.run(x, feat_cache, **others)
        return decode(_walk(self.module, self.strip_elements), x[:, :, 0]).unsqueeze(2)


def _walk(decoder: QwenImageDecoder3d, strip_elements: int) -> StripDecoder:
    layers = (
        _layer(module, strip_elements) for module in modules_between(decoder, QwenImageMidBlock, QwenImageUpBlock)
    )
    first = Recomputed(OneFrame(decoder.conv_in) if _is_causal(decoder.conv_in, 3) else _of_frame(decoder.conv_in))
    norms = [m.gamma.numel() for m in decoder.up_blocks[-1].modules() if isinstance(m, QwenImageRMS_norm)]
    widest = max([decoder.conv_out.in_channels, *norms])
    return StripDecoder(segments(first, layers, _tail(decoder, strip_elements)), widest)


def _layer(module: nn.Module, strip_elements: int) -> Layer:
    if is_plain(module, QwenImageResidualBlock) and _is_known(module):
        first = PixelNormSiluConv(module.norm1, OneFrame(module.conv1), strip_elements)
        second = PixelNormSiluConv(module.norm2, OneFrame(module.conv2), strip_elements)
        skip = module.conv_shortcut
        return Resnet(first, second, None if isinstance(skip, nn.Identity) else OneFrame(skip))
    if is_plain(module, QwenImageResample) and module.mode in ("upsample2d", "upsample3d"):
        conv = module.resample[1]
        if is_plain(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1):
            return Upsample(conv, strip_elements)
    return Recomputed(_of_frame(module))


def _of_frame(module: nn.Module) -> partial:
    return partial(_on_one_frame, module)


def _on_one_frame(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x.unsqueeze(2)).squeeze(2)


def _is_known(resnet: QwenImageResidualBlock) -> bool:
    """Tell whether a resnet's layers are of the kinds that the strips know."""
    skip = resnet.conv_shortcut
    return (
        is_plain(resnet.nonlinearity, nn.SiLU)
        and not (resnet.training and resnet.dropout.p > 0)
        and all(is_plain(norm, QwenImageRMS_norm) for norm in (resnet.norm1, resnet.norm2))
        and _is_causal(resnet.conv1, 3)
        and _is_causal(resnet.conv2, 3)
        and (is_plain(skip, nn.Identity) or _is_causal(skip, 1))
    )


def _is_causal(conv: nn.Module, side: int) -> bool:
    """Tell whether it is a causal convolution of that side, which gives as many rows, columns and frames as it gets."""
    if not is_plain(conv, QwenImageCausalConv3d):
        return False
    around = side // 2
    found = (conv.kernel_size, conv._padding, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    expected = ((side,) * 3, (around,) * 4 + (2 * around, 0), (1,) * 3, (1,) * 3, 1, "zeros")
    return found == expected


def _tail(decoder: QwenImageDecoder3d, strip_elements: int) -> Layer:
    norm, activation, conv = decoder.norm_out, decoder.nonlinearity, decoder.conv_out
    if is_plain(norm, QwenImageRMS_norm) and is_plain(activation, nn.SiLU) and _is_causal(conv, 3):
        return Tail(PixelNormSiluConv(norm, OneFrame(conv), strip_elements))
    return Recomputed(_of_frame(nn.Sequential(norm, activation, conv)))
