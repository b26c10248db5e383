"""The grammar, the scenes drawn from it, and the renderer."""

import random

import numpy as np
import pytest
import torch
from builders.messages import says
from hypothesis import given
from hypothesis import strategies as st

from rsaft_fast.playground import eval_prompts, prompts, scenes, train_prompts

seeds = st.integers(0, 2**32 - 1)


@given(seeds)
def test_prompt_and_constraints_are_inverse(seed):
    scene = scenes.sample(random.Random(seed))
    assert scenes.parse(scene.prompt) == scene.constraints
    assert scenes.satisfies(scene, scenes.parse(scene.prompt))


@given(seeds)
def test_objects_lie_inside_and_apart(seed):
    boxes = [thing.box for thing in scenes.sample(random.Random(seed)).objects]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left >= -1e-9 and top >= -1e-9 and right <= 32 + 1e-9 and bottom <= 32 + 1e-9
        for other in boxes[:i]:
            assert max(left - other[2], other[0] - right, top - other[3], other[1] - bottom) >= scenes.GAP


@given(seeds)
def test_relations_hold_in_coordinates(seed):
    scene = scenes.sample(random.Random(seed))
    if scene.constraints.relation is None:
        return
    (ax, ay), (bx, by) = [(thing.x, thing.y) for thing in scene.objects]
    holds = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
    assert holds[scene.constraints.relation]


def test_sampling_is_deterministic_and_covers_the_grammar():
    first = [scenes.sample(random.Random(s)) for s in range(400)]
    assert first == [scenes.sample(random.Random(s)) for s in range(400)]
    text = " ".join(scene.prompt for scene in first)
    words = [*scenes.COLOURS, *scenes.SHAPES, *scenes.COUNTS, *scenes.RELATIONS, "small", "large"]
    assert all(word in text for word in words)
    assert {len(scene.objects) for scene in first} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a circle",
        "a purple circle",
        "two small red circles",
        "two red circle",
        "five red circles",
        "a red circle beside a blue square",
        "a red circle above a red square",
        "a red circle above a blue square above a green circle",
    ],
)
def test_prompt_outside_the_grammar_is_refused_by_name(prompt):
    with pytest.raises(ValueError, match=says(repr(prompt), "COLOUR SHAPE", "yellow")):
        scenes.parse(prompt)


def test_parse_forgives_case_and_spaces():
    assert scenes.parse("  A Red  circle ABOVE a blue square ").prompt == "a red circle above a blue square"


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_coverage_matches_supersampling(shape):
    """Against counting 64 x 64 points a pixel inside the outline, for random places and radii."""
    rng = np.random.default_rng(7)
    at = (np.arange(32 * 64) + 0.5) / 64
    for _ in range(5):
        x, y, r = rng.uniform(8, 24), rng.uniform(8, 24), rng.uniform(3, 6)
        dx, dy = np.meshgrid(at - x, at - y)
        if shape == "circle":
            inside = dx**2 + dy**2 <= r**2
        elif shape == "square":
            inside = np.maximum(abs(dx), abs(dy)) <= 0.9 * r
        else:  # equilateral, circumradius 1.25 r, apex up: below both slanted sides and above the base
            inside = (dy <= 0.625 * r) & (abs(dx) * 3**0.5 <= dy + 1.25 * r)
        exact = inside.reshape(32, 64, 32, 64).mean((1, 3))
        ours = scenes.coverage(*torch.tensor([x, y, r], dtype=torch.float64), shape).numpy()
        assert abs(ours - exact).max() < {"circle": 0.12, "square": 0.02, "triangle": 0.3}[shape]
        assert abs(ours.sum() / exact.sum() - 1) < 0.03


def test_render_composes_objects_on_the_background():
    scene = scenes.realise(scenes.parse("a large red circle left of a large blue square"), random.Random(3))
    image = scenes.render([scene])[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    for thing in scene.objects:
        centre = image[:, int(thing.y), int(thing.x)]
        torch.testing.assert_close(centre, torch.tensor(scenes.COLOURS[thing.colour]))
    covered = sum(
        scenes.coverage(*torch.tensor([t.x, t.y, t.radius], dtype=torch.float32), t.shape) for t in scene.objects
    )
    empty = image[:, covered == 0]
    torch.testing.assert_close(empty, torch.tensor(scenes.BACKGROUND)[:, None].expand_as(empty))


def test_render_does_not_depend_on_the_batch():
    drawn = [scenes.sample(random.Random(s)) for s in range(12)]
    together = scenes.render(drawn)
    assert together.min() >= 0 and together.max() <= 1
    for i, scene in enumerate(drawn):
        torch.testing.assert_close(scenes.render([scene])[0], together[i], rtol=0, atol=1e-6)
    assert scenes.render([]).shape == (0, 3, 32, 32)


def test_prompt_lists_are_fixed_distinct_and_apart():
    train, judged = train_prompts(), eval_prompts()
    assert (len(train), len(judged)) == (256, 32)
    assert len({*train, *judged}) == 288
    assert (train, judged) == (train_prompts(), eval_prompts())
    assert prompts(0, seed=1) == [] and prompts(5, seed=1) == judged[:5]
    many = eval_prompts(512)
    assert many[:32] == judged and many[:256] == eval_prompts(256) and eval_prompts(33) == many[:33]
    assert len({*train, *many}) == 256 + 512
    with pytest.raises(ValueError, match=says(513, 512)):
        eval_prompts(513)
    for prompt in train + many:
        scenes.parse(prompt)
    with pytest.raises(ValueError, match=says(1001, 1000)):
        prompts(1001, seed=0)
