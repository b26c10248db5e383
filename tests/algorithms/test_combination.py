"""A whole RSA-FT update through combined rewards is that of the same rule written as one graph, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders.backbones import PROMPTS, cfg, make_backbone, noise_source, relative_error
from builders.clip import write_clip

from rsaft_fast.algorithms.reward_gradient import PlannedBatch, rsaft_step
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.methods import DRaFT
from rsaft_fast.methods.losses import Loss
from rsaft_fast.optim import SAM
from rsaft_fast.rewards import Combination, Reward, RewardSettings, RewardSpec, load_reward
from rsaft_fast.rewards.combine import Part
from rsaft_fast.sampling import sample_chain
from rsaft_fast.smoothing.settings import ImageSmoothing, ParameterSmoothing, Smoothing

STEPS = 3
BALL = ImageSmoothing(radius=0.7)
RULES = {
    "weighted": lambda a, b: 0.3 * a + 1.7 * b,
    "worst": torch.minimum,
    # Over two parts the standard deviation is half their distance.
    "mean-std": lambda a, b: (a + b) / 2 - 0.8 * (a - b).abs() / 2,
}


class OneGraph(Reward):
    """Two rewards and a rule, by plain autograd through both at once."""

    def __init__(self, first, second, rule):
        super().__init__()
        self.first, self.second, self.rule, self.spec = first, second, rule, RewardSpec("one graph")

    def score(self, images, prompts):
        return self.rule(self.first.score(images, prompts), self.second.score(images, prompts))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone("sd15", tmp_path_factory.mktemp("sd15"), dtype=torch.float64)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    folders = [write_clip(tmp_path_factory.mktemp("clip"), image_size=size, seed=size) for size in (16, 24)]
    return [load_reward(RewardSettings(path=str(f), dtype="float64", clamp="none")) for f in folders]


def update(backbone, reward):
    """What one update takes off the weights, which are then put back; its report; the pictures at theta."""
    noise = noise_source(len(PROMPTS))
    plan = DRaFT(k=1).draw(STEPS, np.random.default_rng(0))
    conditioning = backbone.encode(PROMPTS, "", **cfg(backbone, 2.5))
    batch = PlannedBatch(MicroBatch(PROMPTS, conditioning, backbone.initial_latents(noise), noise), plan)
    start = batch.batch
    end, _ = sample_chain(backbone, backbone.schedule(STEPS), start.latents, conditioning, noise)
    with torch.no_grad():
        images = backbone.decode(end)
    parameters = backbone.trainable_parameters
    before = {name: p.detach().clone() for name, p in parameters.items()}
    report = rsaft_step(
        backbone,
        reward,
        backbone.schedule(STEPS),
        [batch],
        SAM(parameters.values(), torch.optim.SGD, rho=0.3, lr=1.0),
        smoothing=Smoothing(image=BALL, parameters=ParameterSmoothing(rho=0.3)),
        loss=Loss(),
        probe=BALL,
    )
    taken = {name: before[name] - p.detach() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])
            p.grad = None
    return taken, report, images


@pytest.mark.parametrize("how", RULES)
def test_an_update_through_a_combination(backbone, rewards, how):
    weights = (0.3, 1.7) if how == "weighted" else (1.0, 1.0)
    parts = [Part(name, reward, weight) for name, reward, weight in zip("ab", rewards, weights)]
    ours, report, images = update(backbone, Combination(parts, how, penalty=0.8))
    truth, expected, _ = update(backbone, OneGraph(*rewards, RULES[how]))
    assert relative_error(ours, truth) < 1e-9
    assert report.s1 == pytest.approx(expected.s1, rel=1e-9) and report.s1 > 0
    assert report.smoothed_reward == pytest.approx(expected.smoothed_reward, rel=1e-9)
    assert set(report.parts) == {"a", "b"} and expected.parts == {}
    # The parts' own means, at the same pictures.
    for name, reward in zip("ab", rewards):
        with torch.no_grad():
            own = reward.score(images, PROMPTS).mean().item()
        assert report.parts[name] == pytest.approx(own, rel=1e-9)
