"""Variants of image smoothing and ascent on the loss, under every reward-gradient method, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders.backbones import PROMPTS, cfg, make_backbone, relative_error
from builders.clip import write_clip
from builders.messages import says

from rsaft_fast.algorithms import Ascent, At, PlannedBatch, RewardGradient, reward_gradient, rsaft_step
from rsaft_fast.algorithms.ascent import needs_ascent
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.errors import UserError
from rsaft_fast.methods import AlignProp, DRaFT, DRaFTLV, DRTune, ReFL
from rsaft_fast.methods.losses import Loss
from rsaft_fast.optim import SAM
from rsaft_fast.rewards import Reward, RewardSpec, load_reward
from rsaft_fast.sampling import NoiseSource
from rsaft_fast.smoothing.settings import ImageSmoothing, ParameterSmoothing, Smoothing

STEPS, B = 4, 3
METHODS = [ReFL(window=(0.5, 1.0)), DRaFT(k=2), DRaFTLV(n_extra=2), AlignProp(), DRTune(k=2)]
VARIANTS = [
    {"kind": "gaussian", "samples": 3},
    {"steps": 3},
    {"lowpass": 1.0},
    {"per_sample": "s1"},
    {"schedule": "cosine"},
]
TRIED = [(m, VARIANTS if m.name == "draft_lv" else [VARIANTS[i - 1], VARIANTS[i]]) for i, m in enumerate(METHODS)]
"""What perturbs a picture knows nothing of the method: all variants under the one that scores pictures more than once,
two under every other."""


class Shifted(Reward):
    """The mean reward of pictures moved by given perturbations, another set at each call."""

    def __init__(self, reward, sets):
        super().__init__()
        self.reward, self.sets, self.spec = reward, list(sets), RewardSpec("shifted")

    def score(self, images, prompts):
        deltas = self.sets.pop(0)
        return sum(self.reward.score(images + delta, prompts) for delta in deltas) / len(deltas)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone("sd3", tmp_path_factory.mktemp("sd3"), dtype=torch.float64)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return load_reward("clip", write_clip(tmp_path_factory.mktemp("clip")), dtype=torch.float64, clamp="none")


def make_part(backbone, method):
    prompts, noise = (PROMPTS * 2)[:B], NoiseSource(5, 2, tuple(range(B)))
    conditioning = backbone.encode(prompts, "blurry", **cfg(backbone, 2.5))
    batch = MicroBatch(prompts, conditioning, backbone.initial_latents(noise), noise)
    return PlannedBatch(batch, method.draw(STEPS, np.random.default_rng(1)))


def gradient(backbone, reward, part, at, loss=None, **smoothing):
    algorithm = RewardGradient(
        backbone,
        reward,
        backbone.schedule(STEPS),
        smoothing=Smoothing(**({"image": None, "parameters": None} | smoothing)),
        loss=loss or Loss(),
        max_steps=5,
    )
    for p in backbone.trainable_parameters.values():
        p.grad = None
    figures = algorithm.backward(part, at)
    return {name: p.grad for name, p in backbone.trainable_parameters.items() if p.grad is not None}, figures


@pytest.mark.parametrize(("method", "variants"), TRIED, ids=[method.name for method in METHODS])
def test_a_variants_gradient_is_the_plain_one_of_the_perturbed_reward(backbone, reward, method, variants, monkeypatch):
    sets = []
    perturb = reward_gradient.perturb_around

    def spy(*arguments):
        around, s1 = perturb(*arguments)
        sets.append(list(around))
        return around, s1

    monkeypatch.setattr(reward_gradient, "perturb_around", spy)
    part = make_part(backbone, method)
    plain, _ = gradient(backbone, reward, part, At.PLAIN)
    for keys in variants:
        sets.clear()
        ours, figures = gradient(backbone, reward, part, At.PLAIN, image=ImageSmoothing(radius=0.7, **keys))
        assert len(sets) == len(part.plan.weights) and all(len(one) == keys.get("samples", 1) for one in sets)
        truth, expected = gradient(backbone, Shifted(reward, sets), part, At.PLAIN)
        assert relative_error(ours, truth) < 1e-9, keys
        assert float(figures["smoothed_reward"]) == pytest.approx(float(expected["reward"]), rel=1e-12)
        assert relative_error(ours, plain) > 1e-6, keys


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_ascent_on_the_loss_is_the_plain_updates_gradient(backbone, reward, method):
    part = make_part(backbone, method)
    _, figures = gradient(backbone, reward, part, At.PLAIN)
    hinge = Loss(map="hinge", margin=float(figures["reward"]), scale=0.3)  # some pictures above, some below
    plain, _ = gradient(backbone, reward, part, At.PLAIN, hinge)
    ball = ParameterSmoothing(rho=0.1)
    ascent, _ = gradient(backbone, reward, part, At.FIRST, hinge, parameters=ball, ascend="loss")
    by_reward, _ = gradient(backbone, reward, part, At.FIRST, hinge, parameters=ball)
    assert relative_error(ascent, plain) < 1e-12 and relative_error(by_reward, plain) > 1e-3


@pytest.mark.slow
def test_network_calls_that_are_spared(backbone, reward, monkeypatch):
    """What an update costs, without a clock: SAM makes every call of the network twice."""
    calls, predict, image = [], backbone.predict, ImageSmoothing(radius=0.7)
    monkeypatch.setattr(backbone, "predict", lambda *arguments: calls.append(0) or predict(*arguments))

    def calls_of(parameters):
        calls.clear()
        weights = backbone.trainable_parameters
        ascent = Ascent(parameters, weights) if needs_ascent(parameters) else None
        optimizer = SAM(weights.values(), torch.optim.SGD, rho=0.1, lr=0.0)
        for number in range(6):
            rsaft_step(
                *(backbone, reward, backbone.schedule(STEPS), [make_part(backbone, DRaFT(k=1))], optimizer),
                smoothing=Smoothing(image=image, parameters=parameters),
                loss=Loss(),
                ascent=ascent,
                number=number,
            )
        return len(calls)

    plain = calls_of(None)
    assert calls_of(ParameterSmoothing(rho=0.1)) == 2 * plain
    assert calls_of(ParameterSmoothing(rho=0.1, direction="momentum")) == plain
    assert calls_of(ParameterSmoothing(rho=0.1, reuse=3)) == plain * 8 // 6
    with pytest.raises(UserError, match=says("smoothing.parameters", "Ascent")):
        rsaft_step(
            *(backbone, reward, backbone.schedule(STEPS), [make_part(backbone, DRaFT(k=1))], None),
            smoothing=Smoothing(parameters=ParameterSmoothing(reuse=2)),
            loss=Loss(),
        )


def test_a_schedule_needs_an_end(backbone, reward):
    smoothing = Smoothing(image=ImageSmoothing(schedule="linear"))
    with pytest.raises(UserError, match=says("smoothing.image.schedule", "linear", "max_steps")):
        RewardGradient(backbone, reward, backbone.schedule(STEPS), smoothing=smoothing, loss=Loss())
