"""S1 in float64, against a closed form and against eq. 10 written out by hand on a tiny CLIP reward."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from builders.clip import write_clip
from builders.messages import says

from rsaft_fast.errors import NonFiniteRewardError, UserError
from rsaft_fast.rewards import Reward, RewardSpec, load_reward
from rsaft_fast.smoothing.sharpness import sharpness

PROMPTS = ["a red circle", "two blue squares", "a green triangle"]


class Quadratic(Reward):
    """r(x) = sum(w x) - c/2 |x|^2, whose S1 is known: rho |g| + c/2 rho^2 with g = w - c x."""

    def __init__(self, weight: torch.Tensor, curvature: float):
        super().__init__()
        self.weight, self.curvature = weight, curvature
        self.spec = RewardSpec("quadratic")

    def preprocess(self, images):
        return 2 * images - 1

    def score_inputs(self, inputs, prompts):
        images = (inputs + 1) / 2
        return (self.weight * images).flatten(1).sum(1) - self.curvature / 2 * images.flatten(1).square().sum(1)


@pytest.fixture
def images():
    return torch.rand(3, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("norm", ["l2", "rms"])
@pytest.mark.parametrize("space", ["pixel01", "pixel11", "reward_input"])
def test_a_quadratic_rewards_s1_is_known(images, norm, space):
    weight, curvature, radius = torch.randn(3, 9, 11, dtype=torch.float64), 0.3, 0.05
    reward = Quadratic(weight, curvature)
    # Length of the step in [0, 1] pixels; this reward's input, like pixel11, is twice as wide.
    rho = radius * (math.sqrt(3 * 9 * 11) if norm == "rms" else 1) / (1 if space == "pixel01" else 2)
    length = (weight - curvature * images).flatten(1).norm(dim=1)
    expected = rho * length - curvature / 2 * -(rho**2)
    measured = sharpness(reward, images, PROMPTS, radius, norm, space)
    assert measured.dtype == torch.float64
    torch.testing.assert_close(measured, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_clip_rewards_s1_is_equation_10(clip_folder, images, batch_size):
    reward = load_reward("clip", clip_folder, dtype=torch.float64, clamp="none")
    radius, expected = 0.1, []
    for i in range(3):
        x = images[i : i + 1].clone().requires_grad_()
        r = reward.score(x, PROMPTS[i : i + 1])
        r.backward()
        lowered = reward.score(x.detach() - radius * x.grad / x.grad.pow(2).sum().sqrt(), PROMPTS[i : i + 1])
        expected.append((r - lowered).item())
    measured = sharpness(reward, images, PROMPTS, radius, batch_size=batch_size)
    assert measured.tolist() == pytest.approx(expected, rel=1e-9)
    assert not measured.requires_grad


def test_it_leaves_no_gradient_behind(clip_folder, images):
    reward = load_reward("clip", clip_folder, dtype=torch.float64)
    images.requires_grad_()
    with torch.no_grad():
        sharpness(reward, images, PROMPTS, 0.1)
    assert images.grad is None and all(p.grad is None for p in reward.parameters())


def test_no_image():
    empty = torch.rand(0, 3, 4, 4)
    assert sharpness(Quadratic(torch.ones(3, 4, 4), 1.0), empty, [], 0.1).shape == (0,)


def test_a_flat_reward_has_none_and_a_broken_gradient_is_nan(images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sharpness(Quadratic(torch.zeros(3, 9, 11), 0.0), images, PROMPTS).tolist() == [0, 0, 0]

    class Root(Quadratic):
        def score_inputs(self, inputs, prompts):
            return super().score_inputs(inputs, prompts).clamp(min=0).sqrt()

    images[1] = 0
    measured = sharpness(Root(torch.ones(3, 9, 11, dtype=torch.float64), 0.0), images, PROMPTS)
    assert measured.isnan().tolist() == [False, True, False]


def test_it_warns_when_rounding_hides_it(clip_folder):
    images = torch.rand(3, 3, 16, 16) * 0.8 + 0.1
    half = load_reward("clip", clip_folder, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="float32 reward or a larger radius"):
        sharpness(half, images, PROMPTS, 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharpness(half, images, PROMPTS, 2.0)
        sharpness(load_reward("clip", clip_folder), images, PROMPTS, 1e-2)


def test_wrong_input_is_one_clear_line(images):
    reward = Quadratic(torch.ones(3, 9, 11), 0.0)
    for arguments, message in [
        ({"radius": 0.0}, says("radius", 0.0, "positive and finite")),
        ({"radius": float("nan")}, says("radius", "nan", "positive and finite")),
        ({"norm": "l1"}, says("'l1'", "l2 or rms")),
        ({"space": "latent"}, says("'latent'", "pixel01, pixel11 or reward_input")),
        ({"batch_size": 0}, says("batch_size", 0, 1)),
        ({"prompts": PROMPTS[:2]}, says("prompts", 2, "images", 3)),
    ]:
        with pytest.raises(UserError, match=message):
            sharpness(**({"reward": reward, "images": images, "prompts": PROMPTS} | arguments))
    reward.differentiable = False
    with pytest.raises(UserError, match=says("'quadratic'", "gradient")):
        sharpness(reward, images, PROMPTS)
    images[2, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteRewardError, match="'a green triangle'"):
        sharpness(Quadratic(torch.ones(3, 9, 11), 0.0), images, PROMPTS)
