"""The counting task's proxy and measures, against scenes whose objects are known."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rsaft_fast import playground
from rsaft_fast.experiments.counting import count_loosely, counting_values
from rsaft_fast.playground import scenes
from rsaft_fast.rewards.counting import component_labels
from rsaft_fast.rewards.features import load_features


def drawn(prompts):
    rng = random.Random(torch.seed())
    return scenes.render([scenes.realise(scenes.parse(prompt), rng) for prompt in prompts])


def contrast(colour):
    return math.dist(scenes.COLOURS[colour], scenes.BACKGROUND)


def test_an_object_counts_as_much_as_it_stands_out():
    prompts = ["a red square", "two blue circles", "four yellow squares"]
    wanted = [contrast(colour) for colour in ("red", "blue", "yellow")]
    assert count_loosely(drawn(prompts), prompts).tolist() == pytest.approx(wanted, abs=1e-5)
    # A proxy that is a recall: twice the number is twice as good, and so is another colour that is more glaring.
    assert count_loosely(drawn(["four red squares"]), ["two red squares"]).item() == pytest.approx(2 * wanted[0])
    fleck = torch.tensor(scenes.BACKGROUND)[:, None, None].repeat(2, 1, 32, 32).view(2, 3, 32, 32).clone()
    fleck[1, :, 30, 3] = 1.0
    assert count_loosely(fleck, ["a red square"] * 2).tolist() == pytest.approx(
        [0, math.dist((1, 1, 1), scenes.BACKGROUND)]
    )


def test_its_gradient_is_that_of_the_strongest_pixels():
    images = drawn(["two green circles", "three red triangles"]).double()
    images = (images * 0.8 + 0.05 * torch.rand_like(images)).requires_grad_(True)
    prompts = ["two green circles", "three red triangles"]
    (gradient,) = torch.autograd.grad(count_loosely(images, prompts).sum(), images)
    # Of each object one pixel, along its own distance from the background: a vector of length 1 / wanted.
    lengths = gradient.norm(dim=1).flatten(1)
    assert (lengths > 0).sum(1).tolist() == [2, 3]
    for own, number in zip(lengths, (2, 3)):
        assert own[own > 0].tolist() == pytest.approx([1 / number] * number)


def test_parts_of_masks_are_numbered_apart():
    masks = torch.zeros(2, 5, 7, dtype=torch.bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 4, 6] = True  # the first two touch at a corner
    masks[1, 2] = True
    labels = component_labels(masks)
    assert (labels > 0).equal(masks)
    assert labels[0, 0, 0] == labels[0, 1, 1] != labels[0, 4, 6] and len(labels[1].unique()) == 2


def test_counts_are_exact_or_not_and_belong_to_few_or_more():
    prompts = ["a red circle", "three blue squares", "two green circles", "a red circle", "three blue squares"]
    prompts += ["two green circles"]
    shown = ["a red circle", "four blue squares", "a green circle above a red circle", "a red circle"]
    shown += ["three blue squares", "two green circles"]
    truth = torch.rand(6, dtype=torch.float64)
    values = counting_values(drawn(shown), prompts, truth, load_features("playground/brittle"))
    assert values["exact"].tolist() == [1, 0, 0, 1, 1, 1]
    few = torch.tensor([True, False, True, True, False, True])
    for name, whole in (("r*", truth), ("exact", values["exact"])):
        assert values[f"{name}, few"][few].equal(whole[few]) and values[f"{name}, few"][~few].isnan().all()
        assert values[f"{name}, more"][~few].equal(whole[~few]) and values[f"{name}, more"][few].isnan().all()
    # Of two pictures each is the other's nearest.
    for a, b in ((0, 3), (1, 4), (2, 5)):
        assert values["diversity"][a] == values["diversity"][b] > 0


def test_counting_prompts_are_of_the_grammar_and_apart():
    few, more = playground.counting_prompts(), playground.counting_prompts(held_out=True)
    assert [len(scenes.parse(prompt).nouns) for prompt in few + more] == [1] * 12 + [2] * 12 + [3] * 12 + [4] * 12
    assert len(set(few + more)) == 48
