"""S1 in low precision against S1 in float32, and S1 computed two ways."""

from __future__ import annotations

import pytest
import torch
from builders.clip import write_clip
from builders.image_reward import write_image_reward
from builders.messages import says

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import load_reward
from rsaft_fast.smoothing.precision import LIMIT, require_s1_precision, s1_error
from rsaft_fast.smoothing.sharpness import sharpness

PROMPTS = ["a red ox", "a blue owl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images():
    return torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def test_bf16_is_refused_at_a_small_radius_and_taken_at_a_large_one(folder, images):
    reward = load_reward("clip", folder, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"in bfloat16 the S1 .* set reward.dtype=fp32") as caught:
        require_s1_precision(reward, images, PROMPTS, 1e-3)
    assert "\n" not in str(caught.value)
    require_s1_precision(reward, images, PROMPTS, 2.0)
    assert s1_error(reward, images, PROMPTS, 2.0) < LIMIT < s1_error(reward, images, PROMPTS, 1e-3)
    assert reward.dtype == torch.bfloat16


def test_float32_and_float64_need_no_comparison(folder, images, monkeypatch):
    rewards = [load_reward("clip", folder, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    monkeypatch.setattr("copy.deepcopy", None)
    for reward in rewards:
        assert s1_error(reward, images, PROMPTS, 1e-6) == 0
        require_s1_precision(reward, images, PROMPTS, 1e-6)


def test_a_reward_that_is_no_number_is_refused(folder, images):
    reward = load_reward("clip", folder, dtype=torch.bfloat16)
    with torch.no_grad():
        reward.model.visual_projection.weight.zero_()
    with pytest.raises(UserError, match=says("nan%", "reward.dtype=fp32")):
        require_s1_precision(reward, images, PROMPTS, 2.0)


@pytest.mark.parametrize("kind", ["clip", "imagereward"])
def test_s1_computed_two_ways(folder, images, tmp_path, kind):
    """`sharpness` against a central difference of the score along its own normalised gradient, taken by hand."""
    if kind == "clip":
        reward = load_reward("clip", folder, dtype=torch.float64, clamp="none")
    else:
        reward = load_reward("imagereward", write_image_reward(tmp_path), dtype=torch.float64, clamp="none")
    images, radius = images.double(), 1e-3
    measured = sharpness(reward, images, PROMPTS, radius)
    for index in range(2):
        leaf = images[index : index + 1].clone().requires_grad_()
        score = reward.score(leaf, PROMPTS[index : index + 1])
        (gradient,) = torch.autograd.grad(score, leaf)
        direction = gradient / gradient.norm()
        with torch.no_grad():
            behind = reward.score(leaf - radius * direction, PROMPTS[index : index + 1])
        assert measured[index].item() == pytest.approx((score - behind).item(), rel=1e-8)
        # To first order S1 is radius times the gradient's length.
        assert measured[index].item() == pytest.approx(radius * gradient.norm().item(), rel=0.05)
