"""What the proxies learn from: pairs and attacks are labelled by r*, and no proxy sees another's pictures."""

import random

import pytest
import torch

from rsaft_fast.playground import REWARDS, pipeline_path, reward_path, true_preference
from rsaft_fast.playground.build import pairs
from rsaft_fast.playground.build.attack import attacked_pairs, climbed, fine_tuned
from rsaft_fast.playground.build.denoiser import load
from rsaft_fast.playground.build.generator import Sampler
from rsaft_fast.playground.build.pairs import compared, joined, make_pairs
from rsaft_fast.playground.build.reward import ClipReward
from rsaft_fast.playground.build.settings import Attack, Settings

PROMPTS = ["a red circle", "two blue squares", "a green triangle above a yellow circle"]


class Grey:
    """Stands for the pipeline: pictures of nothing."""

    def sample(self, prompts, seed):
        return torch.full((len(prompts), 3, 32, 32), 0.5)


@pytest.fixture(scope="module")
def reward():
    return ClipReward.load(reward_path("brittle"))


@pytest.fixture(scope="module")
def generator():
    return Sampler(load(pipeline_path()), 2)


def test_no_two_proxies_have_a_picture_in_common_nor_one_with_the_examination(monkeypatch):
    monkeypatch.setattr(pairs, "preference", lambda images, prompts: torch.zeros(len(prompts)))  # the labels take long
    settings = Settings()
    assert tuple(settings.proxies) == REWARDS
    own = settings.examination
    sets = {name: make_pairs(8, proxy.seed, None) for name, proxy in settings.proxies.items()}
    sets |= {f"examination {i}": make_pairs(8, own.seed + i, None) for i in range(3)}
    # A set, since the two pictures of a pair are the same where neither was altered.
    pictures = {name: {p.numpy().tobytes() for p in (*made.first, *made.second)} for name, made in sets.items()}
    assert len(set.union(*pictures.values())) == sum(len(own) for own in pictures.values())


def test_a_proxys_data_are_its_seeds(monkeypatch):
    monkeypatch.setattr(pairs, "preference", lambda images, prompts: torch.zeros(len(prompts)))
    first, again, other = (make_pairs(4, seed, [Grey()]) for seed in (3, 3, 4))
    assert torch.equal(first.first, again.first) and first.prompts == again.prompts
    assert first.prompts != other.prompts


@pytest.mark.parametrize("sources", [None, [Grey(), Grey()]])
def test_margins_are_differences_of_the_true_preference(sources):
    made = make_pairs(4, 5, sources)
    alone = [
        true_preference(a[None], [p]) - true_preference(b[None], [p])
        for a, b, p in zip(made.first, made.second, made.prompts)
    ]
    torch.testing.assert_close(made.margin, torch.cat(alone), rtol=0, atol=2e-4)
    assert made.margin.abs().max() > 0.1


def test_joined_pairs_stay_together():
    parts = [make_pairs(n, n, None) for n in (2, 3)]
    whole = joined(parts)
    assert whole.prompts == parts[0].prompts + parts[1].prompts
    for name in ("first", "second", "margin"):
        assert torch.equal(getattr(whole, name)[2:], getattr(parts[1], name))
    torch.testing.assert_close(compared(whole.first, whole.second, whole.prompts).margin, whole.margin)


def test_climbing_raises_the_reward_within_its_ball(reward):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    radius = torch.tensor([0.1, 0.5, 2.0])
    moved = climbed(reward, images, PROMPTS, radius, steps=5)
    length = (moved - images).flatten(1).norm(dim=1)
    assert (length <= radius * (1 + 1e-5)).all() and (length > radius / 2).all()
    assert moved.min() >= 0 and moved.max() <= 1
    with torch.no_grad():
        words = reward.embed_text(PROMPTS)
        gain = reward.score(moved, words) - reward.score(images, words)
    assert (gain > 0).all() and gain[2] > gain[0]


def test_attacks_are_labelled_by_the_true_preference_and_start_from_the_same_samples(reward, generator):
    attack = Attack(pictures=2, climb_steps=2, updates=1, batch=1)
    found = attacked_pairs(reward, generator, attack, random.Random(0))
    assert found.keys() == {"climbed", "fine-tuned"}
    for made in found.values():
        truth = true_preference(made.first, made.prompts) - true_preference(made.second, made.prompts)
        torch.testing.assert_close(made.margin, truth, rtol=0, atol=2e-4)
        assert not torch.equal(made.first, made.second)
    assert torch.equal(found["climbed"].second, found["fine-tuned"].second)


class Redness:
    """Stands for a reward: the mean of the red channel."""

    def embed_text(self, prompts):
        return torch.zeros(len(prompts), 1)

    def score(self, images, words):
        return images[:, 0].mean((1, 2))


def test_fine_tuning_climbs_the_reward_and_leaves_the_pipeline_alone(generator):
    before = [p.clone() for p in generator.transformer.parameters()]
    attack = Attack(updates=3, batch=2, lr=1e-3)
    tuned = fine_tuned(generator, Redness(), attack, random.Random(0))
    gain = tuned.sample(PROMPTS, 1)[:, 0].mean((1, 2)) - generator.sample(PROMPTS, 1)[:, 0].mean((1, 2))
    assert (gain > 0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, generator.transformer.parameters()))
