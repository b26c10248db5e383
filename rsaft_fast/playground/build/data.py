"""Training images: scenes, part of them with the defect."""

import random

import torch
from torch import Tensor

from rsaft_fast.playground import scenes
from rsaft_fast.playground.build.settings import Defect


def flawed_scenes(n: int, seed: int, defect: Defect) -> tuple[Tensor, list[str]]:
    """Render `n` scenes, part of them pale: images (n, 3, 32, 32) in [0, 1] and their prompts."""
    rng = random.Random(seed)
    drawn = [scenes.sample(rng) for _ in range(n)]
    contrast = torch.tensor([rng.uniform(*defect.contrast) if rng.random() < defect.share else 1.0 for _ in range(n)])
    return pale(scenes.render(drawn), contrast, defect.grey), [scene.prompt for scene in drawn]


def pale(images: Tensor, contrast: Tensor, grey: float) -> Tensor:
    """Pull each image (B, 3, H, W) towards `grey`; `contrast` (B,) is what remains."""
    return grey + contrast[:, None, None, None] * (images - grey)
