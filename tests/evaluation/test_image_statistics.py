"""Statistics of pictures against numpy, and on pictures whose figures are known."""

from __future__ import annotations

import colorsys
import math
from collections import Counter

import numpy as np
import pytest
import torch

from rsaft_fast.evaluation.image_statistics import grid_share, image_statistics


def by_hand(picture: np.ndarray) -> dict[str, float]:
    """The same of one picture (H, W, 3), pixel by pixel."""
    height, width, _ = picture.shape
    luma = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in row] for row in picture]
    flat = [value for row in luma for value in row]
    hsv = [colorsys.rgb_to_hsv(*pixel) for row in picture for pixel in row]
    mean = sum(flat) / len(flat)
    slopes = [
        math.hypot(luma[y][x + 1] - luma[y][x], luma[y + 1][x] - luma[y][x])
        for y in range(height - 1)
        for x in range(width - 1)
    ]
    counts = Counter(round(value * 255) for value in flat)
    return {
        "dark": sum(value < 0.1 for value in flat) / len(flat),
        "saturated": sum(s > 0.9 and value >= 0.1 for (_, s, _), value in zip(hsv, flat)) / len(flat),
        "contrast": math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat)),
        "edges": sum(slope > 0.1 for slope in slopes) / len(slopes),
        "entropy": -sum(n / len(flat) * math.log2(n / len(flat)) for n in counts.values()),
    }


def test_statistics_are_those_of_a_loop_over_the_pixels():
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 5, 4, generator=generator), (23, 19), mode="bilinear")
    images = torch.cat([smooth**3, torch.rand(2, 3, 23, 19, generator=generator) * 1.4 - 0.2])  # outside [0, 1], too
    found = image_statistics(images)
    assert found["dark"].max() > 0 and found["edges"].min() < 0.9  # the bounds are met from both sides
    for index, image in enumerate(images.double().clamp(0, 1)):
        for name, value in by_hand(image.permute(1, 2, 0).numpy()).items():
            assert found[name][index].item() == pytest.approx(value, abs=1e-9), name


def test_the_grid_is_the_share_of_its_frequencies_in_the_spectrum_of_changes():
    luma = torch.rand(2, 37, 50, dtype=torch.float64)
    found = grid_share(luma)
    for index in range(2):
        shares = []
        for axis in (0, 1):
            profile = np.abs(np.diff(luma[index].numpy(), axis=axis)).mean(1 - axis)
            profile = profile[: len(profile) // 8 * 8]
            n = np.arange(len(profile))
            power = [
                abs(np.sum(profile * np.exp(-2j * np.pi * f * n / len(n)))) ** 2 for f in range(1, len(n) // 2 + 1)
            ]
            of_grid = [p for f, p in enumerate(power, 1) if (f * 8) % len(n) == 0]
            shares.append(sum(of_grid) / sum(power))
        assert found[index].item() == pytest.approx(np.mean(shares), rel=1e-9)


def test_blocks_of_eight_are_a_grid_and_noise_is_not():
    blocks = torch.rand(1, 3, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.rand(1, 3, 128, 128)
    assert image_statistics(blocks)["grid"].item() > 0.5
    assert image_statistics(noise)["grid"].item() < 0.15
    assert image_statistics(blocks * 0.0)["grid"].item() == 0  # nothing changes anywhere


def test_small_pictures_have_no_grid():
    assert "grid" not in image_statistics(torch.rand(1, 3, 16, 40))
    assert "grid" in image_statistics(torch.rand(1, 3, 17, 40))
