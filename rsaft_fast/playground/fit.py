"""Best fit of the renderer to an image, given a prompt: where each demanded object is, or most nearly is."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from rsaft_fast.playground.scenes import (
    BACKGROUND,
    COLOURS,
    EXTENT,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    Constraints,
    coverage,
)

PALETTE = torch.tensor(list(COLOURS.values()))
SEARCH_RADII = (3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0)
REACH = 8  # pixels from an object's centre pixel to the edge of its search template
MARGIN = 1.5  # pixels around an object that belong to no other
# Refinement: steps in pixels, each tried twice along x, y and the radius. The last bounds the error of a fit.
STEPS = (0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.06, 0.03)
RIVAL_RADII = (2.5, 7.0)  # what a rival shape may take
OCCUPIED = -6.0  # evidence at a taken pixel: no distance in RGB can weigh as much
FOREGROUND_FLOOR = 0.1  # colour distance from the surroundings under which there is no object to speak of


@dataclass(frozen=True)
class Slots:
    """Objects that a batch of prompts demands, N in all, prompt after prompt."""

    image: Tensor  # (N,) int64, the image each belongs to
    shape: Tensor  # (N,) int64 into SHAPES
    colour: Tensor  # (N,) int64 into COLOURS
    radii: Tensor  # (N, 2), the least and greatest radius that the prompt allows
    count: Tensor  # (B,) objects demanded of each image
    axis: Tensor  # (B, 2), direction from a relation's first object to its second; zero where there is none

    @classmethod
    def of(cls, demands: Sequence[Constraints], dtype: torch.dtype) -> "Slots":
        flat = [(i, noun, radii) for i, d in enumerate(demands) for noun, radii in zip(d.nouns, d.radii)]
        axes = [RELATIONS[d.relation] if d.relation else (0, 0) for d in demands]
        return cls(
            image=torch.tensor([i for i, _, _ in flat], dtype=torch.int64),
            shape=torch.tensor([SHAPES.index(noun.shape) for _, noun, _ in flat], dtype=torch.int64),
            colour=torch.tensor([list(COLOURS).index(noun.colour) for _, noun, _ in flat], dtype=torch.int64),
            radii=torch.tensor([radii for _, _, radii in flat], dtype=dtype).reshape(-1, 2),
            count=torch.tensor([len(d.nouns) for d in demands], dtype=dtype),
            axis=torch.tensor(axes, dtype=dtype).reshape(-1, 2),
        )


@dataclass(frozen=True)
class Fit:
    """Best fit of a batch; all of it is constant where the preference is differentiated."""

    slots: Slots
    geometry: Tensor  # (N, 3): x, y, radius
    covers: Tensor  # (N, 3, 32, 32): coverage of the best fit of each of SHAPES
    window: Tensor  # (N, 32, 32) of 0 and 1: the object's surroundings, other objects left out

    @property
    def cover(self) -> Tensor:
        """Compute the coverage (N, 32, 32) of the demanded shape."""
        return self.covers[torch.arange(len(self.covers)), self.slots.shape]


def sum_by_image(values: Tensor, slots: Slots) -> Tensor:
    """Add slots' values (N, …) up to their images' (B, …)."""
    return values.new_zeros(len(slots.count), *values.shape[1:]).index_add(0, slots.image, values)


@torch.no_grad()
def best_fit(images: Tensor, demands: Sequence[Constraints]) -> Fit:
    """Fit the demanded shapes to images (B, 3, 32, 32) in [0, 1], floating point."""
    slots = Slots.of(demands, images.dtype)
    coarse = _detect(_evidence(images, slots), slots)
    cover = _cover(coarse, slots.shape)
    taken = sum_by_image(grown(coarse, slots.shape), slots)[slots.image] - grown(coarse, slots.shape)
    taken = (taken > 0.5).to(images.dtype)
    window = _window(coarse) * (1 - taken)
    matte = foreground(images[slots.image], cover, window)
    fits = torch.stack([_refine(matte, window, taken, coarse, slots, shape) for shape in range(len(SHAPES))], dim=1)
    covers = torch.stack([coverage(*fits[:, i].unbind(1), shape=shape) for i, shape in enumerate(SHAPES)], dim=1)
    return Fit(slots, fits[torch.arange(len(fits)), slots.shape], covers, window)


def foreground(images: Tensor, cover: Tensor, window: Tensor) -> Tensor:
    """Compute how much each pixel belongs to the object rather than its surroundings, on the object's own colours.

    The projection on the line from the surroundings' mean colour (0) to the object's mean colour (1), so neither
    contrast nor colour matters; goes to 0 where the two are alike.

    Args:
        images: (N, 3, 32, 32). cover, window: (N, 32, 32).
    Returns:
        (N, 32, 32)
    """
    inside = mean_colour(images, core(cover))
    around = mean_colour(images, window * (1 - cover) ** 8)
    axis = inside - around
    projection = ((images - around[..., None, None]) * axis[..., None, None]).sum(1)
    return projection / (axis.square().sum(1) + FOREGROUND_FLOOR**2)[:, None, None]


def core(cover: Tensor) -> Tensor:
    """Compute weights (N, 32, 32) that leave an object's antialiased edge out."""
    return cover**8


def mean_colour(images: Tensor, weight: Tensor) -> Tensor:
    """Compute the weighted mean colour (N, 3) of images (N, 3, H, W) by weights (N, H, W)."""
    return (images * weight[:, None]).sum((2, 3)) / weight.sum((1, 2)).clamp_min(1e-6)[:, None]


def _evidence(images: Tensor, slots: Slots) -> Tensor:
    """Compute per pixel how much better the slot's colour explains it than the background: (N, 32, 32).

    Where another colour of the palette explains it better still, that counts against: a yellow object is nearer to
    red than the background is, but must not draw the search away from a red one.
    """
    palette = torch.cat([PALETTE, torch.tensor([BACKGROUND])]).to(images)
    distance = (images[:, None] - palette[None, :, :, None, None]).square().sum(2)
    own = distance[slots.image, slots.colour]
    return distance[slots.image, -1] + distance[slots.image].amin(1) - 2 * own


def _detect(evidence: Tensor, slots: Slots) -> Tensor:
    """Place the slots of each image one after the other, clearest first, apart from each other: (N, 3)."""
    n = len(slots.image)
    found = evidence.new_zeros(n, 3)
    open_slots = torch.ones(n, dtype=torch.bool)
    evidence = evidence.clone()
    for _ in range(int(slots.count.max()) if n else 0):
        score, place = _best_place(evidence, slots)
        score = score.masked_fill(~open_slots, -torch.inf)
        best = score.new_full((len(slots.count),), -torch.inf).scatter_reduce(0, slots.image, score, "amax")
        chosen = _first_of_each_image((score == best[slots.image]) & open_slots, slots)
        found[chosen] = place[chosen]
        open_slots &= ~chosen
        covered = grown(place, slots.shape) * chosen[:, None, None]
        occupied = sum_by_image(covered, slots)[slots.image] > 0.5
        evidence = torch.where(occupied, OCCUPIED, evidence)
    return found


def _first_of_each_image(candidates: Tensor, slots: Slots) -> Tensor:
    order = torch.where(candidates, torch.arange(len(candidates)), len(candidates))
    first = order.new_full((len(slots.count),), len(candidates)).scatter_reduce(0, slots.image, order, "amin")
    return candidates & (order == first[slots.image])


def _best_place(evidence: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """Find the best score (N,) and its x, y, radius (N, 3) on the pixel grid."""
    n = len(evidence)
    scores = evidence.new_full((n, len(SEARCH_RADII), IMAGE_SIZE, IMAGE_SIZE), -torch.inf)
    radii = torch.tensor(SEARCH_RADII, dtype=evidence.dtype)
    for i, shape in enumerate(SHAPES):
        rows = (slots.shape == i).nonzero()[:, 0]
        if len(rows):
            templates, inside = (t.to(evidence) for t in _templates(shape))
            scores[rows] = conv2d(evidence[rows, None], templates[:, None], padding=REACH) + inside
    allowed = (radii >= slots.radii[:, :1]) & (radii <= slots.radii[:, 1:])
    scores = scores.masked_fill(~allowed[:, :, None, None], -torch.inf).flatten(1)
    score, index = scores.max(1)
    row, column = index // IMAGE_SIZE % IMAGE_SIZE, index % IMAGE_SIZE
    return score, torch.stack([column + 0.5, row + 0.5, radii[index // IMAGE_SIZE**2]], dim=1)


@cache
def _templates(shape: str) -> tuple[Tensor, Tensor]:
    """Make search templates (radii, 17, 17), and 0 where the object lies inside the image, −inf elsewhere."""
    radii = torch.tensor(SEARCH_RADII)
    middle = torch.full_like(radii, REACH + 0.5)
    templates = coverage(middle, middle, radii, shape)[:, : 2 * REACH + 1, : 2 * REACH + 1]
    side, up, down = (radii[:, None, None] * e for e in EXTENT[shape])
    at = torch.arange(IMAGE_SIZE) + 0.5
    x, y = at[None, None, :], at[None, :, None]
    # Half a pixel of grace: the coarse grid need not hold the exact place.
    inside = (x >= side - 0.5) & (x <= IMAGE_SIZE - side + 0.5) & (y >= up - 0.5) & (y <= IMAGE_SIZE - down + 0.5)
    return templates, torch.where(inside, 0.0, -torch.inf)


def _cover(geometry: Tensor, shape: Tensor) -> Tensor:
    every = torch.stack([coverage(*geometry.unbind(1), shape=name) for name in SHAPES], dim=1)
    return every[torch.arange(len(shape)), shape]


def grown(geometry: Tensor, shape: Tensor) -> Tensor:
    """Compute the coverage of the shapes grown by `MARGIN` pixels."""
    return _cover(geometry + geometry.new_tensor([0.0, 0.0, MARGIN]), shape)


def _window(geometry: Tensor) -> Tensor:
    at = torch.arange(IMAGE_SIZE, dtype=geometry.dtype) + 0.5
    x, y, radius = (g[:, None, None] for g in geometry.unbind(1))
    return (torch.maximum((at - x).abs(), (at[:, None] - y).abs()) <= 1.25 * radius + 2).to(geometry.dtype)


def _refine(matte: Tensor, window: Tensor, taken: Tensor, start: Tensor, slots: Slots, shape: int) -> Tensor:
    """Search for the least squared error between a shape's coverage and the matte: (N, 3).

    What other objects have taken must stay uncovered.
    """
    demanded = (slots.shape == shape)[:, None]
    rival = torch.tensor(RIVAL_RADII, dtype=start.dtype).expand_as(slots.radii)
    low, high = torch.where(demanded, slots.radii, rival).unbind(1)
    moves = torch.cat([torch.zeros(1, 3), torch.eye(3), -torch.eye(3)]).to(start)
    best, rows = start.clone(), torch.arange(len(start))
    for step in STEPS:
        for _ in range(2):
            tried = best[:, None] + step * moves
            tried[..., 2] = torch.minimum(torch.maximum(tried[..., 2], low[:, None]), high[:, None])
            cover = coverage(*tried.unbind(-1), shape=SHAPES[shape])
            misfit = (cover - matte[:, None]).square() * window[:, None] + cover * taken[:, None]
            error = misfit.sum((2, 3))
            best = tried[rows, error.argmin(1)]
    return best
