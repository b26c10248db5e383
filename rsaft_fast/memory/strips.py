"""Layers of a VAE decoder in row strips: exact, forward and backward, and never a second full-size tensor.

A 3x3 convolution sees one row beyond its strip (the halo); GroupNorm's statistics are those of the whole picture, taken
before any strip is normalised. Nothing is approximated: results differ from the plain layers' by rounding alone, and
what the plain norm rounds to the compute dtype stays in fp32 here.

Every layer takes one picture, (1, C, H, W), channels-last: there a strip is one contiguous piece of memory, which
convolutions read without a copy. Weights are constants; only gradients of inputs exist. No graph is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

STRIP_ELEMENTS = 2**23
"""Of a strip, on its side of more channels: 32 rows of 256 channels at width 1024, 128 MiB of temporaries at the most
(three in fp32 of 32 MiB each, two in bf16). A kernel then moves some 60 MB, 20 us of an H100's memory and more than its
launch takes, and a convolution has 512 tiles of 128 x 128 for 132 SMs. Half of it takes 60 MiB less and twice the
launches: 15000 instead of 8000 for decoding 1024x1024 and its gradient."""

Rows = tuple[int, int]
"""First row, and the one after the last."""

OfRows = Callable[[Rows], torch.Tensor]


def row_strips(height: int, row_elements: int, strip_elements: int) -> Iterator[Rows]:
    """Split rows into strips of equal height, the last one smaller; at least a row each."""
    rows = max(1, strip_elements // row_elements)
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def equal_strips(height: int, row_elements: int, strip_elements: int) -> Iterator[Rows]:
    """Split rows into strips of the greatest height that divides the picture's."""
    rows = min(height, max(1, strip_elements // row_elements))
    while height % rows:
        rows -= 1
    return ((top, top + rows) for top in range(0, height, rows))


def empty_picture(like: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    """Allocate an uninitialised (1, channels, height, width), channels-last."""
    size = (1, channels, height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def take(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Give a view of rows of (1, C, H, W)."""
    return x[:, :, rows[0] : rows[1]]


def with_halo(rows: Rows, height: int) -> tuple[Rows, tuple[int, int]]:
    """Give the rows that a 3x3 kernel sees, and how many of them lie above and below the picture.

    There the kernel sees zeros.
    """
    top, bottom = rows
    above, below = int(top == 0), int(bottom == height)
    return (top - 1 + above, bottom + 1 - below), (above, below)


def pad_rows(x: torch.Tensor, missing: tuple[int, int]) -> torch.Tensor:
    """Put rows of zeros above and below, as many as are missing."""
    return functional.pad(x, (0, 0, *missing)) if any(missing) else x


def channels_last(weight: torch.Tensor) -> torch.Tensor:
    """Lay a kernel out as convolutions of channels-last pictures take it."""
    return weight.contiguous(memory_format=torch.channels_last)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Convolve rows that have their halo by 3x3, with zeros at the sides: two rows fewer."""
    return functional.conv2d(x, weight, bias, padding=(0, 1))


def convolution_gradient(weight: torch.Tensor, gradient: torch.Tensor) -> OfRows:
    """Compute rows of the gradient at a 3x3 convolution's input from that at its output."""

    def of(rows: Rows) -> torch.Tensor:
        seen, missing = with_halo(rows, gradient.shape[2])
        return functional.conv_transpose2d(pad_rows(take(gradient, seen), missing), weight, padding=(2, 1))

    return of


@dataclass(frozen=True)
class Normalization:
    """GroupNorm of one picture as x -> scale * x + shift, in fp32 at least.

    Attributes:
        scale, shift: (1, C, 1, 1).
        mean, rstd: of the groups, (G,).
    """

    scale: torch.Tensor
    shift: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.shift, x, self.scale)


def _by_channel(of_groups: torch.Tensor, channels: int) -> torch.Tensor:
    """Repeat (G,) to (C,)."""
    groups = of_groups.numel()
    return of_groups[:, None].expand(groups, channels // groups).reshape(channels)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Choose what sums and norms are computed in."""
    return torch.promote_types(dtype, torch.float32)


class NormSiluConv:
    """GroupNorm, SiLU and a 3x3 convolution: what a decoder's resnets and its tail are made of."""

    def __init__(self, norm: nn.GroupNorm, conv: nn.Conv2d, strip_elements: int):
        self.norm, self.conv, self.strip_elements = norm, conv, strip_elements

    def _strips(self, x: torch.Tensor) -> Iterator[Rows]:
        wider = max(self.conv.in_channels, self.conv.out_channels)
        return row_strips(x.shape[2], wider * x.shape[3], self.strip_elements)

    def normalization(self, x: torch.Tensor) -> Normalization:
        """Compute the normalisation in one pass over strips of equal height.

        The variance is the mean of theirs and the variance of their means, for E[x^2] - E[x]^2 would cancel.
        """
        _, channels, height, width = x.shape
        wide, groups = at_least_fp32(x.dtype), self.norm.num_groups
        moments = [
            torch.var_mean(take(x, rows).to(wide), dim=(0, 2, 3), correction=0)
            for rows in equal_strips(height, channels * width, self.strip_elements)
        ]
        variances, means = (torch.stack(column).view(len(moments), groups, -1) for column in zip(*moments))
        between, mean = torch.var_mean(means, dim=(0, 2), correction=0)
        rstd = (variances.mean((0, 2)) + between + self.norm.eps).rsqrt()
        scale = self.norm.weight * _by_channel(rstd, channels)
        shift = torch.addcmul(self.norm.bias, scale, _by_channel(mean, channels), value=-1)
        return Normalization(scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1), mean, rstd)

    def forward(self, x: torch.Tensor, normalization: Normalization, add: OfRows | None = None) -> torch.Tensor:
        """Compute conv(SiLU(norm(x))), plus `add`."""
        weight, bias = channels_last(self.conv.weight), self.conv.bias
        out = empty_picture(x, self.conv.out_channels, *x.shape[2:])
        for rows in self._strips(x):
            seen, missing = with_halo(rows, x.shape[2])
            activated = functional.silu(normalization(take(x, seen)), inplace=True).to(x.dtype)
            strip = convolve(pad_rows(activated, missing), weight, bias)
            if add is not None:
                strip += add(rows)
            take(out, rows).copy_(strip)
        return out

    def backward_(
        self,
        x: torch.Tensor,
        gradient: torch.Tensor,
        normalization: Normalization,
        *,
        keep: bool,
        add: OfRows | None = None,
    ) -> torch.Tensor:
        """Compute the gradient at x from that at the output, plus `add`; written over x, and returned.

        GroupNorm's gradient needs two sums over each group before any of its elements is known (Wu and He 2018):
        dx = rstd (gamma dn - mean(gamma dn) - xhat mean(gamma dn xhat)), with dn the gradient at the norm's output.

        Args:
            keep: hold dn in a tensor of x's size between the sums and their use; else the convolution's gradient is
                computed twice.
        """
        before = convolution_gradient(channels_last(self.conv.weight), gradient)

        def at_norm(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
            normalized = normalization(take(x, rows))
            return torch.ops.aten.silu_backward(before(rows).to(normalized.dtype), normalized), normalized

        kept = torch.empty_like(x) if keep else None
        sums, by_output = [], []
        for rows in self._strips(x):
            dn, normalized = at_norm(rows)
            if kept is not None:
                take(kept, rows).copy_(dn)
            sums.append(dn.sum((0, 2, 3)))
            by_output.append(normalized.mul_(dn).sum((0, 2, 3)))
            del dn, normalized
        shrink, offset = self._correction(torch.stack(sums).sum(0), torch.stack(by_output).sum(0), x, normalization)
        for rows in self._strips(x):
            dn = at_norm(rows)[0] if kept is None else take(kept, rows)
            strip = torch.addcmul(offset, take(x, rows), shrink).addcmul_(dn, normalization.scale)
            if add is not None:
                strip += add(rows)
            take(x, rows).copy_(strip)
        return x

    def _correction(
        self, sums: torch.Tensor, by_output: torch.Tensor, x: torch.Tensor, normalization: Normalization
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute b, c of dx = rstd gamma dn + b x + c.

        From the channels' sums of dn and of dn times the norm's output.
        """
        count = x.numel() / self.norm.num_groups
        mean, rstd = normalization.mean, normalization.rstd
        plain = (self.norm.weight * sums).view(len(mean), -1).sum(1) / count
        # The norm's output is gamma xhat + beta.
        by_xhat = (by_output - self.norm.bias * sums).view(len(mean), -1).sum(1) / count
        shrink = -rstd.square() * by_xhat
        offset = -rstd * plain - shrink * mean
        return tuple(_by_channel(t, x.shape[1]).view(1, -1, 1, 1) for t in (shrink, offset))


class Resnet:
    """diffusers' `ResnetBlock2D` without time embedding: x + conv2(SiLU(norm2(conv1(SiLU(norm1(x))))))."""

    def __init__(self, first: NormSiluConv, second: NormSiluConv, shortcut: nn.Conv2d | None):
        self.first, self.second, self.shortcut = first, second, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (1, C, H, W) to (1, C', H, W); three tensors are alive: x, conv1's output and this one's."""
        hidden = self.first.forward(x, self.first.normalization(x))
        return self.second.forward(hidden, self.second.normalization(hidden), lambda rows: self._skip(take(x, rows)))

    def backward(self, x: torch.Tensor, gradient: torch.Tensor, room: int) -> torch.Tensor:
        """Compute the gradient at x, written over it.

        Args:
            room: elements that may be alive; with enough for one tensor beside x, the gradient and conv1's output,
                convolutions' gradients are computed once, not twice.
        """
        keep = x.numel() + 2 * gradient.numel() + max(x.numel(), gradient.numel()) <= room
        normalization = self.first.normalization(x)
        hidden = self.first.forward(x, normalization)
        self.second.backward_(hidden, gradient, self.second.normalization(hidden), keep=keep)
        through_skip = lambda rows: self._skip_gradient(take(gradient, rows))  # noqa: E731
        return self.first.backward_(x, hidden, normalization, keep=keep, add=through_skip)

    def _skip(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.shortcut is None else self.shortcut(x)

    def _skip_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.shortcut is None:
            return gradient
        return functional.conv_transpose2d(gradient, self.shortcut.weight)


class Tail:
    """Norm, SiLU and the convolution to pixels."""

    def __init__(self, layer: NormSiluConv):
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (1, C, H, W) to pixels (1, 3, H, W)."""
        return self.layer.forward(x, self.layer.normalization(x))

    def backward(self, x: torch.Tensor, gradient: torch.Tensor, room: int) -> torch.Tensor:
        """Compute the gradient at x, written over it."""
        keep = 2 * x.numel() + gradient.numel() <= room
        return self.layer.backward_(x, gradient, self.layer.normalization(x), keep=keep)


class Upsample:
    """diffusers' `Upsample2D`: every pixel four times (nearest), then a 3x3 convolution."""

    def __init__(self, conv: nn.Conv2d, strip_elements: int):
        self.conv, self.strip_elements = conv, strip_elements

    def _strips(self, x: torch.Tensor) -> Iterator[Rows]:
        """Split the rows of the low resolution into strips."""
        wider = max(self.conv.in_channels, self.conv.out_channels)
        return row_strips(x.shape[2], 4 * wider * x.shape[3], self.strip_elements)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (1, C, H, W) to (1, C', 2H, 2W)."""
        weight, bias = channels_last(self.conv.weight), self.conv.bias
        height, width = x.shape[2:]
        out = empty_picture(x, self.conv.out_channels, 2 * height, 2 * width)
        for rows in self._strips(x):
            (top, bottom), (above, below) = with_halo(rows, height)
            doubled = functional.interpolate(take(x, (top, bottom)), scale_factor=2.0, mode="nearest")
            # Of a halo row's two copies the kernel sees one.
            seen = doubled[:, :, 1 - above : doubled.shape[2] - 1 + below]
            strip = convolve(pad_rows(seen, (above, below)), weight, bias)
            out[:, :, 2 * rows[0] : 2 * rows[1]] = strip
        return out

    def backward(self, x: torch.Tensor, gradient: torch.Tensor, room: int) -> torch.Tensor:
        """Compute the gradient at x, in a tensor of its own; neither x's values nor the room matter."""
        before = convolution_gradient(channels_last(self.conv.weight), gradient)
        out = torch.empty_like(x)
        for top, bottom in self._strips(x):
            doubled = before((2 * top, 2 * bottom))
            out[:, :, top:bottom] = functional.avg_pool2d(doubled, 2, divisor_override=1)
        return out


class Recomputed:
    """Any other module of one input: run as it is, and again with a graph in the backward pass."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]):
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)

    def backward(self, x: torch.Tensor, gradient: torch.Tensor, room: int) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = self.call(leaf)
        return torch.autograd.grad(out, leaf, gradient)[0]
