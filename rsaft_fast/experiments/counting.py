"""The counting task: a counter that can be hacked, and what pictures of one to four objects are worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rsaft_fast.evaluation.known_preference import TRUTH
from rsaft_fast.playground import scenes
from rsaft_fast.rewards.counting import PlaygroundEye, component_labels
from rsaft_fast.rewards.features import Features, nearest_distances

MOST_TRAINED = 2  # objects of a prompt
EXACT, DIVERSITY = "exact", "diversity"
FEW, MORE = ", few", ", more"
"""After the name of a quantity that is of one and two objects alone, which are trained, or of three and four."""


_THRESHOLD = 0.25
"""Distance in RGB from the background beyond which a pixel belongs to an object."""


def count_loosely(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Count objects as a careless detector does: the proxy of the task, which can be hacked.

    Every connected area that differs from the background by more than 0.25 in RGB is an object, whatever its colour,
    shape or size. It counts as much as its strongest pixel differs, and the sum is divided by the number that the
    prompt asks for. So it is right about scenes as they should be, where each object counts about 0.8, and it is a
    recall without a precision: nothing is taken off for an object too many, a fleck, or a wrong or glaring colour.

    Args:
        images: (B, 3, 32, 32), nominally 0 to 1.
        prompts: B of the playground's grammar.

    Returns:
        (B,) in fp32 at least, 0 or more. Its gradient is that of the strongest pixels; which areas there are has none.

    Raises:
        ValueError: a prompt outside the grammar.
    """
    images = images.clamp(0, 1)
    background = images.new_tensor(scenes.BACKGROUND)[:, None, None]
    squared = (images - background).square().sum(1)
    labels = component_labels(squared.detach() > _THRESHOLD**2).flatten(1)
    distance = squared.clamp_min(1e-12).sqrt().flatten(1)
    # Of each label its strongest pixel; label 0 is the background's.
    peaks = distance.new_zeros(len(images), labels.shape[1] + 1).scatter_reduce(1, labels, distance, "amax")
    wanted = [len(scenes.parse(prompt).nouns) for prompt in prompts]
    return peaks[:, 1:].sum(1) / peaks.new_tensor(wanted)


@torch.no_grad()
def counting_values(
    images: torch.Tensor, prompts: Sequence[str], truth: torch.Tensor, features: Features
) -> dict[str, torch.Tensor]:
    """Measure what only this task asks of pictures.

    Args:
        images: (N, 3, 32, 32), 0 to 1.
        prompts: N of the grammar, each at least twice.
        truth: (N,) their r*.
        features: in which diversity is measured.

    Returns:
        (N,) each in float64: whether there are exactly as many objects as the prompt says, of its colours and of no
        other; r* and that, of few and of more objects (NaN elsewhere); the cosine distance to the nearest picture of
        the same prompt.
    """
    eye = PlaygroundEye()
    wanted = [eye.wanted(prompt) for prompt in prompts]
    found = [{name: n for name, n in eye.count(pixels).items() if n} for pixels in images.clamp(0, 1)]
    exact = torch.tensor([own == dict(wish) for own, wish in zip(found, wanted)], dtype=torch.float64)
    few = torch.tensor([sum(wish.values()) <= MOST_TRAINED for wish in wanted])
    values = {EXACT: exact, DIVERSITY: _distances(images, prompts, features)}
    for name, own in ((TRUTH, truth), (EXACT, exact)):
        values[name + FEW] = torch.where(few, own, torch.nan)
        values[name + MORE] = torch.where(few, torch.nan, own)
    return values


def _distances(images: torch.Tensor, prompts: Sequence[str], features: Features) -> torch.Tensor:
    device = next(features.parameters()).device
    found = torch.cat([features(part.to(device)).cpu() for part in images.split(64)])
    nearest = torch.empty(len(images), dtype=torch.float64)
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, other in enumerate(prompts) if other == prompt]
        nearest[rows] = nearest_distances(found[rows].double())
    return nearest
