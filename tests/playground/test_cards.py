"""The cards: what they say of a reward, against the package's own gradients and sharpness on a few pictures."""

from dataclasses import replace

import pytest
import torch
from builders.backbones import noise_source

from rsaft_fast.algorithms.base import At
from rsaft_fast.algorithms.reward_gradient import PlannedBatch, RewardGradient
from rsaft_fast.backbones import load_backbone
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.methods import DRaFT
from rsaft_fast.playground import ASSETS, eval_prompts, pipeline_path, reward_path, train_prompts, true_preference
from rsaft_fast.playground.build.cards import examine, questions, table
from rsaft_fast.playground.build.generator import Sampler
from rsaft_fast.playground.build.reward import ClipReward
from rsaft_fast.playground.build.settings import Examination, Settings
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.rewards.python import FunctionReward
from rsaft_fast.sampling import derive_rng
from rsaft_fast.smoothing.settings import Smoothing
from rsaft_fast.smoothing.sharpness import sharpness

FEW = replace(
    Settings(),
    sampler_steps=(3, 2),
    examination=Examination(pairs=6, pictures=4, gradient_pictures=3, radii=(0.5, 2.0)),
)


@pytest.fixture(scope="module")
def asked():
    return questions(FEW, ASSETS)


@pytest.fixture(scope="module")
def card(asked):
    return examine(ClipReward.load(reward_path("fair")), asked)


@pytest.fixture(scope="module")
def reward():
    """The package's own reading of the same file."""
    return load_reward(RewardSettings(path="playground/fair"))


def cosine(a, b):
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def test_pair_accuracy_is_the_share_of_clear_pairs_ordered_as_the_truth(card, asked, reward):
    for kind, pairs in asked.pairs.items():
        right = []
        for first, second, prompt in zip(pairs.first, pairs.second, pairs.prompts):
            truth = true_preference(first[None], [prompt]) - true_preference(second[None], [prompt])
            if truth.abs() > 0.02:
                guess = reward.score(first[None], [prompt]) - reward.score(second[None], [prompt])
                right.append(bool(guess * truth > 0))
        assert right and card["pair_accuracy"][kind] == pytest.approx(sum(right) / len(right), abs=1e-4)


def test_sharpness_is_the_packages(card, asked, reward):
    for radius in FEW.examination.radii:
        expected = sharpness(reward, asked.images, asked.prompts, radius)
        assert card["s1"][f"{radius:g}"] == pytest.approx(float(expected.mean()), abs=1e-3)
    scores = torch.tensor([float(reward.score(x[None], [p])) for x, p in zip(asked.images, asked.prompts)])
    assert card["spread"] == pytest.approx(float((scores - scores.mean()).square().sum() / 3) ** 0.5, abs=1e-3)


def test_image_gradients_agree_picture_by_picture(card, asked, reward):
    cosines = []
    for x, prompt in zip(asked.images.double(), asked.prompts):
        gradients = []
        for score in (true_preference, reward.score):
            leaf = x[None].clone().requires_grad_(True)
            value = score(leaf if score is true_preference else leaf.float(), [prompt])
            gradients.append(torch.autograd.grad(value.sum(), leaf)[0])
        cosines.append(cosine(*gradients))
    assert card["gradient_cosine"]["images"] == pytest.approx(sum(cosines) / len(cosines), abs=2e-3)


def test_parameter_gradients_are_the_trainers(card, asked, reward):
    backbone = load_backbone(pipeline_path())
    backbone.train_all_parameters()
    schedule, noise = backbone.schedule(3), noise_source(3)
    start = asked.generator.noise(3, FEW.examination.seed)
    batch = MicroBatch(asked.words, backbone.encode(asked.words), start, noise)
    plan = DRaFT(k=1).draw(3, derive_rng(0, 0, "plan"))
    plain, found = Smoothing(image=None, parameters=None), []
    for judge in (reward, FunctionReward(true_preference, reward.spec)):
        algorithm = RewardGradient(backbone, judge, schedule, smoothing=plain, loss=DRaFT(k=1).default_loss)
        algorithm.backward(PlannedBatch(batch, plan, 3), At.PLAIN)
        parameters = list(backbone.trainable_parameters.values())
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        for p in parameters:
            p.grad = None
    assert card["gradient_cosine"]["parameters"] == pytest.approx(cosine(*found), abs=2e-3)
    assert float(asked.parameter_gradient.norm()) == pytest.approx(float(found[1].norm()), rel=1e-3)


def test_nothing_asked_was_learned_from_and_the_answers_are_the_truths(asked):
    assert asked.prompts == eval_prompts(4) and asked.words == train_prompts()[:3]
    generator = Sampler(asked.generator.pipeline, 3)
    torch.testing.assert_close(generator.sample(asked.prompts, FEW.examination.seed), asked.images)
    kinds = {kind: pairs.first.flatten(1) for kind, pairs in asked.pairs.items()}
    assert kinds.keys() == {"exact", "mixed", "samples"}
    assert not torch.equal(kinds["exact"], kinds["mixed"])


def test_the_table_holds_every_figure(card):
    header, rule, row = table({"fair": card}).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    figures = [
        *(f"{100 * value:.1f}" for value in card["pair_accuracy"].values()),
        *(f"{value:.3f}" for value in card["gradient_cosine"].values()),
        f"{card['spread']:.2f}",
        *(f"{value / card['spread']:.2f}" for value in card["s1"].values()),
    ]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["`fair`", *figures]
