"""Procedural scenes: a small grammar of prompts, scenes drawn from it, and their antialiased renderer.

A prompt is one of

* one object: `a [small|large] COLOUR SHAPE`
* a count: `two|three|four COLOUR SHAPEs`
* a relation: `a [size] COLOUR SHAPE left of|right of|above|below a [size] COLOUR SHAPE`, the colours differing.

Coordinates and radii are in pixels; x grows to the right, y downwards, a pixel's centre lies at half-integers.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 32
BACKGROUND = (0.20, 0.20, 0.25)
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.15, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
}
SHAPES = ("circle", "square", "triangle")
# Half a square's side and a triangle's circumradius, as multiples of the object's radius: areas of the same order.
SQUARE_HALF_SIDE = 0.9
TRIANGLE_CIRCUMRADIUS = 1.25
# How far an object reaches from its centre, as a multiple of its radius, along x, up and down.
EXTENT = {"circle": (1.0, 1.0, 1.0), "square": (0.9, 0.9, 0.9), "triangle": (1.0825, 1.25, 0.625)}
RADII = {"small": (3.0, 4.0), "large": (5.0, 6.0), None: (3.0, 6.0)}
COUNT_RADII = (3.0, 4.0)  # four objects must fit
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}  # from first to second
GAP = 1.5  # least distance between two objects' boxes along one axis

_NOUN = rf"(?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PAIR = re.compile(rf"a {_NOUN}(?: ({'|'.join(RELATIONS)}) a {_NOUN})?")
_COUNT = re.compile(rf"({'|'.join(COUNTS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s")


@dataclass(frozen=True)
class Noun:
    """Object as a prompt describes it; `size` is "small", "large" or None (not said)."""

    colour: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.shape)))


@dataclass(frozen=True)
class Constraints:
    """Demands of a prompt: its nouns (a counted noun repeated) and, between two of them, a relation."""

    nouns: tuple[Noun, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        first = self.nouns[0]
        if self.relation:
            return f"a {first} {self.relation} a {self.nouns[1]}"
        if len(self.nouns) == 1:
            return f"a {first}"
        word = next(word for word, n in COUNTS.items() if n == len(self.nouns))
        return f"{word} {first}s"

    @property
    def radii(self) -> tuple[tuple[float, float], ...]:
        """Give the radii allowed to each noun, in pixels."""
        counted = len(self.nouns) > 1 and not self.relation
        return tuple(COUNT_RADII if counted else RADII[noun.size] for noun in self.nouns)


@dataclass(frozen=True)
class Object:
    """Object of a scene; position and radius in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Give left, top, right and bottom, in pixels."""
        side, up, down = (self.radius * e for e in EXTENT[self.shape])
        return self.x - side, self.y - up, self.x + side, self.y + down


@dataclass(frozen=True)
class Scene:
    """Scene: its objects, and the constraints that they satisfy."""

    objects: tuple[Object, ...]
    constraints: Constraints

    @property
    def prompt(self) -> str:
        return self.constraints.prompt


def parse(prompt: str) -> Constraints:
    """Read the constraints that `prompt` states.

    Raises:
        ValueError: the prompt lies outside the grammar.
    """
    text = " ".join(prompt.lower().split())
    if match := _COUNT.fullmatch(text):
        number, colour, shape = match.groups()
        return Constraints((Noun(colour, shape),) * COUNTS[number])
    if match := _PAIR.fullmatch(text):
        size, colour, shape, relation, *second = match.groups()
        first = Noun(colour, shape, size)
        if not relation:
            return Constraints((first,))
        size, colour, shape = second
        if colour != first.colour:
            return Constraints((first, Noun(colour, shape, size)), relation)
    raise ValueError(
        f"prompt {prompt!r} is outside the playground's grammar: write 'a [small|large] COLOUR SHAPE', "
        f"'{'|'.join(COUNTS)} COLOUR SHAPEs' or 'a … {'|'.join(RELATIONS)} a …' with two different colours; "
        f"colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}"
    )


def sample_constraints(rng: random.Random) -> Constraints:
    """Draw a prompt: six in ten a relation, three a count, one a single object."""
    kind = rng.random()
    colours = rng.sample(list(COLOURS), 2)
    nouns = tuple(Noun(colour, rng.choice(SHAPES), rng.choice((None, "small", "large"))) for colour in colours)
    if kind < 0.6:
        return Constraints(nouns, rng.choice(list(RELATIONS)))
    if kind < 0.9:
        return Constraints((Noun(nouns[0].colour, nouns[0].shape),) * rng.choice(list(COUNTS.values())))
    return Constraints(nouns[:1])


def realise(constraints: Constraints, rng: random.Random) -> Scene:
    """Draw positions and radii that satisfy `constraints`, no two objects touching."""
    while True:
        objects: list[Object] = []
        for noun, (low, high) in zip(constraints.nouns, constraints.radii):
            radius = rng.uniform(low, high)
            side, up, down = (radius * e for e in EXTENT[noun.shape])
            x = rng.uniform(side, IMAGE_SIZE - side)
            y = rng.uniform(up, IMAGE_SIZE - down)
            objects.append(Object(noun.colour, noun.shape, x, y, radius))
        scene = Scene(tuple(objects), constraints)
        if satisfies(scene, constraints):
            return scene


def sample(rng: random.Random) -> Scene:
    """Draw a prompt and a scene for it."""
    return realise(sample_constraints(rng), rng)


def satisfies(scene: Scene, constraints: Constraints) -> bool:
    """Tell whether the scene's objects, in order, are what `constraints` demand, apart from each other."""
    if len(scene.objects) != len(constraints.nouns):
        return False
    for thing, noun, (low, high) in zip(scene.objects, constraints.nouns, constraints.radii):
        if (thing.colour, thing.shape) != (noun.colour, noun.shape) or not low <= thing.radius <= high:
            return False
    pairs = [(a, b) for i, a in enumerate(scene.objects) for b in scene.objects[:i]]
    if not all(_separate(a.box, b.box) for a, b in pairs):
        return False
    return constraints.relation is None or _related(*scene.objects, relation=constraints.relation)


def _separate(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= GAP


def _related(first: Object, second: Object, relation: str) -> bool:
    """Tell whether the relation's axis separates the objects and dominates: the other offset is at most half of it."""
    along_x, along_y = RELATIONS[relation]
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx * along_x, dy) if along_x else (dy * along_y, dx)
    return along > 0 and abs(across) <= along / 2


def coverage(x: Tensor, y: Tensor, radius: Tensor, shape: str) -> Tensor:
    """Compute the share of each pixel that an object covers: a linear edge one pixel wide about its outline.

    Args:
        x, y, radius: (...) pixels.
        shape: one of SHAPES.
    Returns:
        (..., 32, 32) in [0, 1], of x's dtype; exact for squares, 1/2 minus the signed distance elsewhere.
    """
    centres = torch.arange(IMAGE_SIZE, dtype=x.dtype, device=x.device) + 0.5
    dx = centres - x[..., None, None]
    dy = centres[:, None] - y[..., None, None]
    r = radius[..., None, None]
    if shape == "circle":
        return (0.5 + r - torch.sqrt(dx * dx + dy * dy)).clamp(0, 1)
    if shape == "square":
        half = SQUARE_HALF_SIDE * r
        return (0.5 + half - dx.abs()).clamp(0, 1) * (0.5 + half - dy.abs()).clamp(0, 1)
    if shape == "triangle":  # apex up; inside means within the inradius along each of three edge normals
        inradius = TRIANGLE_CIRCUMRADIUS * r / 2
        slanted = dx.abs() * (3**0.5 / 2) - dy / 2
        return (0.5 + inradius - torch.maximum(slanted, dy)).clamp(0, 1)
    raise ValueError(f"shape {shape!r} is unknown: choose one of {', '.join(SHAPES)}")


def render(scenes: Sequence[Scene], dtype: torch.dtype = torch.float32) -> Tensor:
    """Render scenes to (B, 3, 32, 32) in [0, 1]."""
    background = torch.tensor(BACKGROUND, dtype=dtype)[:, None, None]
    images = background.expand(len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE).clone()
    for shape in SHAPES:
        found = [(i, thing) for i, scene in enumerate(scenes) for thing in scene.objects if thing.shape == shape]
        if not found:
            continue
        geometry = torch.tensor([(thing.x, thing.y, thing.radius) for _, thing in found], dtype=dtype)
        colour = torch.tensor([COLOURS[thing.colour] for _, thing in found], dtype=dtype)[..., None, None]
        mask = coverage(*geometry.unbind(1), shape=shape)[:, None]
        rows = torch.tensor([i for i, _ in found])
        images.index_add_(0, rows, mask * (colour - background))
    return images
