"""True preference r*: how well an image shows what its prompt says, known exactly and never learned.

The image is clamped to [0, 1], as a viewer sees it, and the renderer is fitted to it (`fit.best_fit`). Five terms
in [0, 1] follow, each smooth in the image while the fit stays the same:

* colour: each object's mean colour against the demanded one;
* shape: the demanded shape's fit against the other two shapes' best fits;
* relation: the objects are there and lie as the prompt says (only for prompts with a relation);
* count: as many objects as demanded, and nothing else;
* fidelity: pixels against the rendered fit, and edges as steep as the renderer's. Without the edges, as by
  −log10 MSE, a blurred exact scene would beat sharp ones with small errors.

r* is the mean of the terms that apply.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from rsaft_fast.playground.fit import (
    FOREGROUND_FLOOR,
    MARGIN,
    Fit,
    best_fit,
    core,
    foreground,
    grown,
    mean_colour,
    sum_by_image,
)
from rsaft_fast.playground.scenes import BACKGROUND, COLOURS, IMAGE_SIZE, parse

COLOUR_SCALE = 0.2  # distance in RGB at which the colour term halves
PIXEL_SCALE = 0.15  # distance in RGB at which a pixel counts half in fidelity
EDGE_SCALE = 0.25  # relative loss (or excess) of edge height at which the edge part halves
SHAPE_ENERGY = 0.5  # squared error, in pixels, that tells two shapes apart
STRAY_SCALE = 0.3  # distance in RGB from the background at which a pixel half counts as a stray object's
STRAY_AREA = 18.0  # pixels that make one stray object: the smallest object's area
RELATION_SLACK = 1.0  # pixels over which a relation turns from false to true


@dataclass(frozen=True)
class Terms:
    """Terms of r*, each (B,) in [0, 1]; `relation` means nothing where `related` is 0."""

    colour: Tensor
    shape: Tensor
    relation: Tensor
    count: Tensor
    fidelity: Tensor
    related: Tensor  # (B,) 1 where the prompt states a relation, else 0

    def only(self, valid: Tensor) -> "Terms":
        """Set every term to 0 where `valid` (B,) is false."""
        kept = {name: torch.where(valid, term, 0.0) for name, term in vars(self).items() if name != "related"}
        return Terms(**kept, related=self.related)

    def mean(self) -> Tensor:
        total = self.colour + self.shape + self.count + self.fidelity + self.related * self.relation
        return total / (4 + self.related)


def true_preference(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compute r* of images for prompts; differentiable in the images with the fit held constant.

    Args:
        images: (B, 3, 32, 32) floating point, nominally in [0, 1]; clamped here.
        prompts: B prompts of the grammar.
    Returns:
        (B,) in [0, 1], of the images' dtype (fp32 for half precision). An image with a non-finite value gets 0.
    Raises:
        ValueError: wrong shape, as many prompts as images are not given, or a prompt outside the grammar.
    """
    return true_terms(images, prompts).mean()


@torch.no_grad()
def evaluate_preference(images: Tensor, prompts: Sequence[str]) -> tuple[float, float]:
    """Compute the mean of r* over images and its standard error; arguments as for `true_preference`.

    Pictures of one prompt are no independent witnesses: the error is that of G prompts,
    √(G / (G − 1) · Σ s²) / B, where s is the sum of a prompt's deviations from the mean. With every prompt once it is
    the standard deviation over √B.

    Returns:
        Mean and standard error; NaN where there is no image, or but one prompt.
    """
    scores = true_preference(images, prompts).double()
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    rows = torch.tensor([place[prompt] for prompt in prompts], dtype=torch.int64)
    sums = scores.new_zeros(len(place)).index_add(0, rows, scores - scores.mean())
    groups = torch.tensor(len(place), dtype=torch.float64)
    error = (groups / (groups - 1).clamp_min(0) * sums.square().sum()).sqrt() / len(scores)
    return scores.mean().item(), error.item()


def true_terms(images: Tensor, prompts: Sequence[str]) -> Terms:
    """Compute the terms of r*; arguments as for `true_preference`."""
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images have shape {tuple(images.shape)}: the playground needs (B, 3, 32, 32)")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts: give one prompt an image")
    demands = [parse(prompt) for prompt in prompts]
    images = images.to(torch.promote_types(images.dtype, torch.float32)).cpu()
    finite = images.isfinite().flatten(1).all(1)
    images = images.nan_to_num(0.0).clamp(0, 1)
    terms = terms_at(images, best_fit(images.detach(), demands))
    return terms.only(finite)


def terms_at(images: Tensor, fit: Fit) -> Terms:
    """Compute the terms of r* for images (B, 3, 32, 32) in [0, 1] at a given fit, smooth in the images."""
    slots = fit.slots
    count = slots.count
    of_slots = images[slots.image]
    matte = foreground(of_slots, fit.cover, fit.window)
    error = ((fit.covers - matte[:, None]).square() * fit.window[:, None]).sum((2, 3))
    own_error = error.gather(1, slots.shape[:, None])[:, 0]
    inside = mean_colour(of_slots, core(fit.cover))
    present = _presence(of_slots, fit, inside) * _halving(own_error, fit.cover.sum((1, 2)) / 4)
    wanted = torch.tensor(list(COLOURS.values()), dtype=images.dtype)[slots.colour]
    colour = _halving((inside - wanted).square().sum(1), COLOUR_SCALE**2)
    shape = torch.softmax(-error / SHAPE_ENERGY, 1).gather(1, slots.shape[:, None])[:, 0] * present
    stray = _stray_objects(images, fit)
    missing = count - sum_by_image(present, slots)
    return Terms(
        colour=sum_by_image(colour, slots) / count,
        shape=sum_by_image(shape, slots) / count,
        relation=_relation(fit, present),
        count=_halving(missing.square() + stray.square(), 1.0),
        fidelity=_fidelity(images, fit),
        related=slots.axis.abs().sum(1),
    )


def _halving(square: Tensor, scale: Tensor | float) -> Tensor:
    """Compute a bounded score whose gradient never dies: 1 at 0, 1/2 at `scale`, falling slowly after."""
    return 1 / (1 + square / scale)


def _presence(images: Tensor, fit: Fit, inside: Tensor) -> Tensor:
    """Compute (N,) whether something stands out from its surroundings at the fitted place."""
    around = mean_colour(images, fit.window * (1 - fit.cover) ** 8)
    contrast = (inside - around).square().sum(1)
    return contrast / (contrast + FOREGROUND_FLOOR**2)


def _stray_objects(images: Tensor, fit: Fit) -> Tensor:
    """Compute (B,) the area outside all fitted objects that differs from the background there, in objects."""
    free = 1 - sum_by_image(grown(fit.geometry, fit.slots.shape), fit.slots).clamp_max(1)
    background = mean_colour(images, free)
    # Averaged over 3 x 3 pixels: a stray object is a patch, noise is the fidelity's business.
    distance = avg_pool2d(images - background[..., None, None], 3, 1, 1).square().sum(1)
    strays = distance.square() / (distance.square() + STRAY_SCALE**4)
    return (strays * free).sum((1, 2)) / STRAY_AREA


def _relation(fit: Fit, present: Tensor) -> Tensor:
    slots = fit.slots
    starts = (slots.count.cumsum(0) - slots.count).long()
    pairs = slots.axis.abs().sum(1) > 0
    first, second = starts, torch.where(pairs, starts + 1, starts)
    offset = fit.geometry[second, :2] - fit.geometry[first, :2]
    along = (offset * slots.axis).sum(1)
    across = (offset * slots.axis.flip(1)).sum(1).abs()
    holds = torch.sigmoid((along - across - MARGIN) / RELATION_SLACK)
    return holds * present[first] * present[second]


def _fidelity(images: Tensor, fit: Fit) -> Tensor:
    background = torch.tensor(BACKGROUND, dtype=images.dtype)[:, None, None]
    paint = torch.tensor(list(COLOURS.values()), dtype=images.dtype)[fit.slots.colour][..., None, None] - background
    target = background + sum_by_image(fit.cover[:, None] * paint, fit.slots)
    pixels = _halving((images - target).square().sum(1), PIXEL_SCALE**2).mean((1, 2))
    height: Any = sum((images.diff(dim=d) * target.diff(dim=d)).sum((1, 2, 3)) for d in (2, 3))
    wanted = sum(target.diff(dim=d).square().sum((1, 2, 3)) for d in (2, 3))
    return (pixels + _halving((height / wanted - 1).square(), EDGE_SCALE**2)) / 2
