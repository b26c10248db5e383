"""The search for the lowest reward in a ball, in float64, against rewards whose minimum there is known."""

from __future__ import annotations

import contextlib
import math
import warnings

import pytest
import torch
from builders.backbones import make_backbone
from builders.clip import write_clip
from builders.messages import says
from smoothing.test_sharpness import PROMPTS, Quadratic

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import Reward, RewardSpec, load_reward
from rsaft_fast.smoothing.sharpness import searched_sharpness, sharpness
from rsaft_fast.smoothing.worst import project

SIDE = (3, 9, 11)


@pytest.fixture
def images():
    return torch.rand(3, *SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Bowl(Reward):
    """r(x) = 1/2 sum h (x - m)^2, convex, with curvatures h from 0.2 to 5; its minimum in a ball is known."""

    def __init__(self, seed: int = 5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.h = 0.2 + 4.8 * torch.rand(SIDE, dtype=torch.float64, generator=generator)
        self.middle = torch.rand(SIDE, dtype=torch.float64, generator=generator)
        self.spec = RewardSpec("bowl")

    def score(self, images, prompts):
        return 0.5 * (self.h * (images - self.middle).square()).flatten(1).sum(1)

    def lowest(self, x: torch.Tensor, radius: float) -> float:
        """Of one picture: (h + lambda) d = -h (x - m), lambda found by bisection so that |d| is the radius."""
        g = self.h * (x - self.middle)
        if (g / self.h).norm() <= radius:
            return 0.0
        low, high = 0.0, g.norm().item() / radius
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (g / (self.h + middle)).norm() > radius else (low, middle)
        return self.score((x - g / (self.h + low))[None], [""]).item()


@pytest.mark.parametrize("norm", ["l2", "rms"])
@pytest.mark.parametrize("space", ["pixel01", "pixel11", "reward_input"])
def test_a_linear_rewards_worst_is_one_step_away(images, norm, space):
    weight = torch.randn(SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = searched_sharpness(Quadratic(weight, 0.0), images, PROMPTS, 0.05, norm, space, steps=5, restarts=1)
    # Length in [0, 1] pixels; this reward's input, like pixel11, is twice as wide.
    length = 0.05 * (math.sqrt(math.prod(SIDE)) if norm == "rms" else 1) / (1 if space == "pixel01" else 2)
    expected = torch.full((3,), length * weight.norm().item(), dtype=torch.float64)
    torch.testing.assert_close(found.search, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.one_step, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("radius", [0.3, 2.0, 20.0])
def test_a_bowls_lowest_place_in_the_ball_is_found(images, radius):
    """At 0.3 and 2 on the ball's edge, at 20 the middle itself, which one step overshoots by far."""
    bowl = Bowl()
    # One step that overshoots measures no sharpness.
    warned = pytest.warns(UserWarning, match=says("S1 is", "radius 20")) if radius == 20 else contextlib.nullcontext()
    with warned:
        found = searched_sharpness(bowl, images, PROMPTS, radius, steps=150)
    for index in range(3):
        start = bowl.score(images[index : index + 1], [""]).item()
        assert found.scores[index].item() == start
        known = start - bowl.lowest(images[index], radius)
        assert found.search[index].item() == pytest.approx(known, rel=1e-6)
        assert found.one_step[index] < found.search[index]


def test_the_search_is_never_below_one_step_and_more_steps_never_above(images):
    seed = 11
    generator = torch.Generator().manual_seed(seed)
    for trial in range(8):
        weight = torch.randn(SIDE, dtype=torch.float64, generator=generator)
        curvature = 40 * torch.rand((), dtype=torch.float64, generator=generator).item() - 20
        radius = 10 ** (2 * torch.rand((), generator=generator).item() - 1)
        reward = Quadratic(weight, curvature)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [
                searched_sharpness(reward, images, PROMPTS, radius, steps=steps, restarts=trial % 2)
                for steps in (1, 2, 7)
            ]
        for fewer, more in zip(found, found[1:]):
            assert (more.search >= fewer.search).all(), (seed, trial)
        assert (found[0].search >= found[0].one_step).all() and (found[0].search >= 0).all(), (seed, trial)
        torch.testing.assert_close(found[0].one_step, sharpness_quietly(reward, images, radius), rtol=0, atol=0)


def sharpness_quietly(reward, images, radius):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sharpness(reward, images, PROMPTS, radius)


class Bumps(Reward):
    """Two valleys along one axis: downhill from 0 is the shallow one, the deep one lies the other way."""

    spec = RewardSpec("bumps")

    def score(self, images, prompts):
        x = images.flatten(1)[:, 0]
        return -torch.exp(-((x - 1) / 0.5).square()) - 3 * torch.exp(-((x + 1.2) / 0.5).square()) - 0.05 * x


def test_restarts_find_what_lies_the_other_way():
    pictures = torch.zeros(4, 1, 1, 1, dtype=torch.float64)
    prompts = [""] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, more = (
            searched_sharpness(Bumps(), pictures, prompts, 1.5, steps=15, restarts=restarts) for restarts in (0, 4)
        )
        parts = [
            searched_sharpness(Bumps(), pictures[k : k + 1], [""], 1.5, steps=15, restarts=4, first=k) for k in range(4)
        ]
    start = Bumps().score(pictures, prompts)
    torch.testing.assert_close(more.search, start + 2.94, rtol=0, atol=2e-2)  # 3 - 0.06, at -1.2
    assert (one.search < 1.2).all()
    # A picture's random points are its own, whatever batch it is in.
    torch.testing.assert_close(torch.cat([p.search for p in parts]), more.search, rtol=0, atol=0)


def test_in_latents_it_is_the_reward_of_the_decoded_latents(tmp_path):
    backbone = make_backbone("sd15", tmp_path, dtype=torch.float64)
    (tmp_path / "clip").mkdir()
    reward = load_reward("clip", write_clip(tmp_path / "clip"), dtype=torch.float64, clamp="none")
    size = (2, 3, backbone.height, backbone.width)
    pictures = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = searched_sharpness(reward, pictures, PROMPTS[:2], 0.5, space="latent", steps=4, backbone=backbone)
    latents = backbone.encode_images(pictures).requires_grad_(True)
    scores = reward.score(backbone.decode(latents), PROMPTS[:2])
    (g,) = torch.autograd.grad(scores.sum(), latents)
    step = 0.5 * g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    expected = scores - reward.score(backbone.decode(latents - step), PROMPTS[:2])
    torch.testing.assert_close(found.one_step, expected.detach(), rtol=1e-9, atol=0)
    assert (found.search >= found.one_step).all() and found.search.sum() > found.one_step.sum()


def test_a_broken_gradient_is_nan_and_the_others_are_not(images):
    class Root(Quadratic):
        def score_inputs(self, inputs, prompts):
            return super().score_inputs(inputs, prompts).clamp(min=0).sqrt()

    images[1] = 0
    found = searched_sharpness(Root(torch.ones(SIDE, dtype=torch.float64), 0.0), images, PROMPTS, 0.05, steps=3)
    assert found.search.isnan().tolist() == found.one_step.isnan().tolist() == [False, True, False]


def test_nearest_points_of_the_ball():
    points = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(project(points, 1.0), expected, rtol=1e-15, atol=0)


def test_wrong_input_is_one_clear_line(images):
    reward = Quadratic(torch.ones(SIDE, dtype=torch.float64), 0.0)
    for arguments, message in [
        ({"steps": 0}, says("steps", 0, 1)),
        ({"restarts": -1}, says("restarts", -1, 0)),
        ({"space": "latent"}, says("'latent'", "backbone")),
    ]:
        with pytest.raises(UserError, match=message):
            searched_sharpness(reward, images, PROMPTS, **arguments)
    empty = searched_sharpness(reward, images[:0], [])
    assert empty.search.shape == empty.one_step.shape == empty.scores.shape == (0,)
