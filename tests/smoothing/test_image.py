"""Variants of image smoothing in float64, against the same written out for one picture at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from builders.messages import says
from pydantic import ValidationError
from smoothing.test_sharpness import PROMPTS
from smoothing.test_worst import Bowl

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import Combination, Reward, RewardSpec
from rsaft_fast.rewards.combine import Part
from rsaft_fast.sampling import NoiseSource
from rsaft_fast.smoothing.image import lowpass, observe_around, perturb_around, radius_factor, rewards_around
from rsaft_fast.smoothing.objective import observe
from rsaft_fast.smoothing.settings import ImageSmoothing

NOISE = NoiseSource(seed=4, step=7, samples=(0, 1, 2))
# What decodes latents that are pictures already.
BACKBONE = SimpleNamespace(decode=lambda latents: latents)


class Wave(Reward):
    """A curved reward with an input of its own: r = mean sin(2 a . x) over a few directions a."""

    def __init__(self, seed: int = 1):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.directions = torch.randn(5, 3 * 8 * 10, dtype=torch.float64, generator=generator) / 4
        self.spec = RewardSpec(f"wave {seed}")

    def preprocess(self, images):
        return 2 * images - 1

    def score_inputs(self, inputs, prompts):
        return (inputs.flatten(1) @ self.directions.T).sin().mean(1)


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def around_of(reward, pictures, image, **options):
    seen = observe(BACKBONE, reward, pictures, PROMPTS, space=image.space)
    around, s1 = perturb_around(BACKBONE, reward, seen, PROMPTS, image, NOISE, **options)
    return list(around), s1, seen


def gradient_of(reward, pictures):
    leaf = pictures.clone().requires_grad_(True)
    return torch.autograd.grad(reward.score(leaf, PROMPTS).sum(), leaf)[0]


def unit(direction):
    return direction / direction.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def test_without_a_variant_it_is_equation_15(pictures):
    (delta,), s1, _ = around_of(Wave(), pictures, ImageSmoothing(radius=0.3))
    torch.testing.assert_close(delta, -0.3 * unit(gradient_of(Wave(), pictures)), rtol=1e-12, atol=0)
    assert s1 is None


@pytest.mark.parametrize("space", ["pixel01", "pixel11", "latent", "reward_input"])
@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_more_steps_stay_in_the_ball_and_go_lower(pictures, space, norm):
    reward, radius = Wave(), 1.5 if norm == "l2" else 0.1
    drops = []
    for steps in (1, 2, 6):
        image = ImageSmoothing(radius=radius, norm=norm, space=space, steps=steps)
        around, _, seen = around_of(reward, pictures, image)
        length = radius * (math.sqrt(240) if norm == "rms" else 1) / (2 if space == "pixel11" else 1)
        assert (around[0].flatten(1).norm(dim=1) <= length * (1 + 1e-12)).all()
        drops.append(seen.rewards - rewards_around(BACKBONE, reward, seen, PROMPTS, around, space))
    # A step more may come back to the same picture, and its reward be rounded otherwise.
    least = [drop - 1e-12 for drop in drops]
    assert (drops[1] >= least[0]).all() and (drops[2] >= least[1]).all() and drops[2].mean() > drops[0].mean()


def test_many_steps_find_a_bowls_middle():
    bowl = Bowl()
    pictures = torch.rand(3, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (delta,), _, _ = around_of(bowl, pictures, ImageSmoothing(radius=20.0, steps=150))
    torch.testing.assert_close(pictures + delta, bowl.middle.expand(3, -1, -1, -1), rtol=0, atol=3e-3)


def filtered_by_hand(picture, deviation):
    """A bell of 8 deviations over the mirrored picture, place by place, along one axis after the other."""
    for axis in (-2, -1):
        moved = picture.transpose(axis, -1)
        size, out = moved.shape[-1], torch.zeros_like(moved)
        reach = math.ceil(8 * deviation)
        weights = torch.tensor([math.exp(-0.5 * (k / deviation) ** 2) for k in range(-reach, reach + 1)]).double()
        for i in range(size):
            for k, weight in zip(range(-reach, reach + 1), weights / weights.sum()):
                j = (i + k) % (2 * size)
                out[..., i] += weight * moved[..., j if j < size else 2 * size - 1 - j]
        picture = out.transpose(axis, -1)
    return picture


@pytest.mark.parametrize("deviation", [0.6, 2.0, 30.0])
def test_lowpass_is_a_bell_over_the_mirrored_picture(pictures, deviation):
    torch.testing.assert_close(lowpass(pictures, deviation), filtered_by_hand(pictures, deviation), rtol=0, atol=1e-5)
    # Symmetric, and a constant stays: what it takes off is detail alone.
    other = pictures.flip(0)
    assert (lowpass(pictures, deviation) * other).sum().item() == pytest.approx(
        (pictures * lowpass(other, deviation)).sum().item(), rel=1e-12
    )
    torch.testing.assert_close(lowpass(torch.ones_like(pictures), deviation), torch.ones_like(pictures))


def test_a_smooth_perturbation_is_as_long_as_any(pictures):
    (delta,), _, _ = around_of(Wave(), pictures, ImageSmoothing(radius=0.3, lowpass=1.5))
    expected = -0.3 * unit(lowpass(gradient_of(Wave(), pictures), 1.5))
    torch.testing.assert_close(delta, expected, rtol=1e-12, atol=1e-15)
    with pytest.raises(UserError, match=says("smoothing.image.lowpass", "(16, 4)")):
        lowpass(torch.zeros(2, 16, 4), 1.0)


@pytest.mark.parametrize("space", ["pixel01", "reward_input"])
def test_gaussian_is_the_mean_over_random_pictures_of_one_length(pictures, space):
    reward, image = Wave(), ImageSmoothing(radius=0.8, kind="gaussian", samples=3, space=space)
    around, _, seen = around_of(reward, pictures, image, endpoint=1)
    noises = [NOISE.draw("smoothing", (3, 8, 10), 3 + k, dtype=torch.float64) for k in range(3)]
    for delta, noise in zip(around, noises, strict=True):
        torch.testing.assert_close(delta, -0.8 * unit(noise), rtol=1e-12, atol=0)
    leaf = pictures.clone().requires_grad_(True)
    node = reward.preprocess(leaf) if space == "reward_input" else leaf
    score = reward.score_inputs if space == "reward_input" else reward.score
    mean = sum(score(node + delta, PROMPTS) for delta in around) / 3
    smoothed = observe_around(BACKBONE, reward, pictures, PROMPTS, around, space)
    torch.testing.assert_close(smoothed.rewards, mean.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        smoothed.image_gradient, torch.autograd.grad(mean.sum(), leaf)[0], rtol=1e-10, atol=1e-15
    )
    torch.testing.assert_close(
        rewards_around(BACKBONE, reward, seen, PROMPTS, around, space), mean.detach(), rtol=1e-12, atol=0
    )


def test_a_samples_random_directions_are_its_own(pictures):
    image = ImageSmoothing(radius=0.8, kind="gaussian", samples=2)
    whole, _, _ = around_of(Wave(), pictures, image)
    seen = observe(BACKBONE, Wave(), pictures[1:2], PROMPTS[1:2])
    alone, _ = perturb_around(BACKBONE, Wave(), seen, PROMPTS[1:2], image, NoiseSource(4, 7, (1,)))
    for first, second, once_more in zip(whole, alone, alone, strict=True):
        assert torch.equal(first[1:2], second) and torch.equal(second, once_more)


def test_the_radius_follows_a_schedule(pictures):
    for schedule, at in [
        ("constant", lambda p: 1.0),
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: 0.5 + 0.5 * math.cos(math.pi * p)),
    ]:
        image = ImageSmoothing(radius=0.4, schedule=schedule)
        for progress in (0.0, 0.25, 0.9):
            assert radius_factor(image, progress) == pytest.approx(at(progress), rel=1e-12)
            (delta,), _, _ = around_of(Wave(), pictures, image, progress=progress)
            lengths = delta.flatten(1).norm(dim=1)
            torch.testing.assert_close(lengths, torch.full_like(lengths, 0.4 * at(progress)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("times", [None, 0.8, -1.0])
def test_a_pictures_own_radius_follows_its_sharpness(pictures, times):
    reward = Wave()
    common = -0.3 * unit(gradient_of(reward, pictures))
    expected = [
        (reward.score(pictures[i : i + 1], [""]) - reward.score((pictures + common)[i : i + 1], [""])).item()
        for i in range(3)
    ]
    mean = sum(expected) / 3 * (1 if times is None else times)
    image, usual = ImageSmoothing(radius=0.3, per_sample="s1"), None if times is None else mean
    (delta,), s1, _ = around_of(reward, pictures, image, usual_s1=usual)
    assert s1.tolist() == pytest.approx(expected, rel=1e-12)
    factors = [min(max(value / mean, 0.5), 2.0) if mean > 0 else 1.0 for value in expected]
    assert len(set(factors)) > 1 or mean < 0
    own = torch.tensor(factors, dtype=torch.float64).reshape(3, 1, 1, 1)
    torch.testing.assert_close(delta, common * own, rtol=1e-9, atol=0)


def test_only_pictures_that_the_parts_disagree_on_are_perturbed(pictures):
    parts = [Part("a", Wave(1)), Part("b", Wave(2))]
    reward = Combination(parts, "weighted")
    scores = [part.reward.score(pictures, PROMPTS) for part in parts]
    wins = [[sum(mine > other for other in row) / 2 for mine in row] for row in (s.tolist() for s in scores)]
    apart = [abs(a - b) for a, b in zip(*wins)]
    assert 0 < sum(value >= 0.5 for value in apart) < 3, "a seed at which they neither all agree nor all differ"
    everywhere, _, _ = around_of(reward, pictures, ImageSmoothing(radius=0.3))
    there, _, _ = around_of(reward, pictures, ImageSmoothing(radius=0.3, only_where=0.5))
    for index, value in enumerate(apart):
        expected = everywhere[0][index] if value >= 0.5 else torch.zeros(3, 8, 10, dtype=torch.float64)
        assert torch.equal(there[0][index], expected)
    with pytest.raises(UserError, match=says("smoothing.image.only_where", "parts", 0)):
        around_of(Wave(), pictures, ImageSmoothing(only_where=0.5))


def test_a_pictures_own_radius_follows_its_uncertainty(pictures):
    """Win rates of three pictures by counting; only the parts of weight 0 are compared with."""
    parts = [Part("main", Wave(1)), Part("other", Wave(2), 0.5), Part("a", Wave(3), 0.0), Part("b", Wave(4), 0.0)]
    reward = Combination(parts, "weighted")
    rows = {part.name: part.reward.score(pictures, PROMPTS) for part in parts}
    rows["whole"] = rows["main"] + 0.5 * rows["other"]
    wins = {name: [sum(mine > other for other in row) / 2 for mine in row] for name, row in rows.items()}
    factors = [1 + w - (a + b) / 2 for w, a, b in zip(wins["whole"], wins["a"], wins["b"])]
    assert len(set(factors)) > 1 and sum(factors) == 3
    plain, _, _ = around_of(reward, pictures, ImageSmoothing(radius=0.3))
    own, s1, _ = around_of(reward, pictures, ImageSmoothing(radius=0.3, per_sample="uncertainty"))
    expected = plain[0] * torch.tensor(factors, dtype=torch.float64).reshape(3, 1, 1, 1)
    torch.testing.assert_close(own[0], expected, rtol=1e-12, atol=0)
    assert s1 is None
    for one in (Wave(), Combination(parts[:2], "weighted")):
        with pytest.raises(UserError, match=says("per_sample uncertainty", "weight 0", 0)):
            around_of(one, pictures, ImageSmoothing(per_sample="uncertainty"))


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"samples": 4}, ("samples", 4, "gaussian")),
        ({"kind": "gaussian", "space": "latent"}, ("gaussian", "latent")),
        ({"kind": "gaussian", "steps": 2}, ("gaussian", "steps")),
        ({"kind": "gaussian", "per_sample": "s1"}, ("gaussian", "per_sample")),
        ({"only_where": 1.5}, ("only_where", 1)),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, said):
    with pytest.raises(ValidationError, match=says(*said)):
        ImageSmoothing(**keys)
