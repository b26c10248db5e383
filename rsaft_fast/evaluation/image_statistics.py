"""Statistics of single pictures in which reward hacking shows: dark, gaudy, flat, noisy, or laid out in a grid."""

from __future__ import annotations

import torch

DARK = 0.1
"""Luma below which a pixel is dark."""

SATURATED = 0.9
"""Saturation (HSV) above which a pixel is saturated; of a dark one the saturation says nothing."""

EDGE = 0.1
"""Length of luma's gradient, per pixel, above which there is an edge."""

LEVELS = 256
PERIOD = 8
"""Pixels: the grid of a decoder that makes 8x8 of each latent, as that of every Stable Diffusion and FLUX.1."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def image_statistics(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute statistics of each picture: name to (N,), float64.

    dark, saturated: shares of the pixels. contrast: standard deviation of luma. edges: share of pixels at an edge.
    entropy: of luma's histogram at 256 levels, in bits. grid: see `grid_share`; left out of pictures that are too small
    for it.

    Args:
        images: (N, 3, H, W), nominally 0 to 1; clipped to that.
    """
    pixels = images.double().clamp(0, 1)
    luma = luma_of(pixels)
    most, least = pixels.amax(1), pixels.amin(1)
    # Forward differences, so that the last row and column have none.
    across, down = luma[:, :-1, 1:] - luma[:, :-1, :-1], luma[:, 1:, :-1] - luma[:, :-1, :-1]
    found = {
        "dark": (luma < DARK).double(),
        "saturated": ((most - least > SATURATED * most) & (luma >= DARK)).double(),
        "contrast": (luma - luma.mean((1, 2), keepdim=True)).square(),
        "edges": (torch.hypot(across, down) > EDGE).double(),
    }
    values = {name: own.mean((1, 2)) for name, own in found.items()}
    values["contrast"] = values["contrast"].sqrt()
    values["entropy"] = torch.stack([_entropy(own) for own in luma])
    if min(luma.shape[1:]) > 2 * PERIOD:
        values["grid"] = grid_share(luma)
    return values


def luma_of(pixels: torch.Tensor) -> torch.Tensor:
    """Compute luma (N, H, W) of pixels (N, 3, H, W)."""
    return torch.einsum("nchw,c->nhw", pixels, torch.tensor(_LUMA, dtype=pixels.dtype))


def _entropy(luma: torch.Tensor) -> torch.Tensor:
    counts = torch.bincount((luma * (LEVELS - 1)).round().long().flatten(), minlength=LEVELS).double()
    shares = counts[counts > 0] / counts.sum()
    return -(shares * shares.log2()).sum()


def grid_share(luma: torch.Tensor, period: int = PERIOD) -> torch.Tensor:
    """Compute how much of what changes along rows and columns repeats with a period: (N,), 0 to 1.

    Absolute differences of neighbouring pixels, averaged over all lines, are a profile of where pictures change; of its
    power spectrum without the mean this is the share at multiples of 1 / period (after Wang, Bovik and Evans 2000,
    "Blind measurement of blocking artifacts in images"), averaged over the two directions. Pictures without a grid have
    about period / length of it.

    Args:
        luma: (N, H, W), of more than 2 period pixels on each side.
    """
    shares = []
    for profile in (luma.diff(dim=2).abs().mean(1), luma.diff(dim=1).abs().mean(2)):
        length = profile.shape[1] // period * period  # whole periods, so that the multiples are bins of the spectrum
        power = torch.fft.rfft(profile[:, :length]).abs().square()[:, 1:]
        of_grid = power[:, length // period - 1 :: length // period].sum(1)
        total = power.sum(1)
        shares.append(torch.where(total > 0, of_grid / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0))
    return torch.stack(shares).mean(0)
