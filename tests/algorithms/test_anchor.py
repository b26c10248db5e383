"""The distance to the untrained model, against autograd of its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders.backbones import PROMPTS, cfg, clear_gradients, gradients, make_backbone, noise_source, relative_error
from builders.clip import write_clip
from builders.messages import says
from builders.recipes import config

from rsaft_fast.algorithms import At, PlannedBatch, RewardGradient
from rsaft_fast.algorithms.anchor import DistanceToBase
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.errors import UserError
from rsaft_fast.methods import DRaFT, DRaFTLV, DRTune
from rsaft_fast.methods.losses import Loss
from rsaft_fast.recipe.check import check_keys
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.sampling import rollout
from rsaft_fast.smoothing.settings import Smoothing

T, B, GUIDANCE, WEIGHT = 4, 2, 2.5, 0.7
METHODS = {
    "draft-2": DRaFT(k=2),
    "draft_lv": DRaFTLV(n_extra=1),
    "drtune, one branch": DRTune(k=2, uncond="detached"),
}


@pytest.fixture(scope="module", params=["sd15", "sd3"])
def backbone(request, tmp_path_factory):
    return make_backbone(request.param, tmp_path_factory.mktemp(request.param), dtype=torch.float64)


@pytest.fixture
def moved(backbone):
    """An anchor at the present weights, which then move."""
    anchor = DistanceToBase(backbone, WEIGHT)
    generator = torch.Generator().manual_seed(3)
    own = {name: p.detach().clone() for name, p in backbone.trainable_parameters.items()}
    with torch.no_grad():
        for p in backbone.trainable_parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    clear_gradients(backbone)
    yield anchor
    with torch.no_grad():
        for name, p in backbone.trainable_parameters.items():
            p.copy_(own[name])


def planned(backbone, method) -> PlannedBatch:
    noise = noise_source(B)
    conditioning = backbone.encode(PROMPTS[:B], "blurry", **cfg(backbone, GUIDANCE))
    plan = method.draw(T, np.random.default_rng(5))
    return PlannedBatch(MicroBatch(PROMPTS[:B], conditioning, backbone.initial_latents(noise), noise), plan)


def sampled(backbone, part):
    batch = part.batch
    return rollout(backbone, backbone.schedule(T), part.plan, batch.latents, batch.conditioning, batch.noise)


def written_out(backbone, trajectory, base, total):
    """The penalty, in one graph of its own: guided predictions by hand, at the base's weights first."""
    plan, conditioning, own = trajectory.plan, trajectory.conditioning, backbone.trainable_parameters

    def guided(x, step):
        positive = backbone.predict(x, step, conditioning.positive)
        negative = backbone.predict(x, step, conditioning.negative)
        negative = negative.detach() if plan.uncond == "detached" else negative
        return GUIDANCE * positive + (1 - GUIDANCE) * negative

    calls = [(trajectory.inputs[i], trajectory.schedule[i]) for i in plan.graded]
    calls += [(x, trajectory.schedule[i]) for (i, _), x in zip(plan.renoise, trajectory.renoised)]
    kept = {name: p.detach().clone() for name, p in own.items()}
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(base[name])
        then = [guided(x, step) for x, step in calls]
        for name, p in own.items():
            p.copy_(kept[name])
    now = [guided(x, step) for x, step in calls]
    return torch.stack([(f - f0).square().flatten(1).mean(1).sum() / total for f, f0 in zip(now, then)]).mean()


@pytest.mark.parametrize("name", METHODS)
def test_value_and_gradient_are_those_of_the_definition(backbone, moved, name):
    part = planned(backbone, METHODS[name])
    trajectory = sampled(backbone, part)
    weights = {n: p.detach().clone() for n, p in backbone.trainable_parameters.items()}
    found = moved.backward(trajectory, total=5)
    ours = gradients(backbone)
    assert all(torch.equal(p, weights[n]) for n, p in backbone.trainable_parameters.items())
    clear_gradients(backbone)
    wanted = written_out(backbone, trajectory, moved.base, 5)
    (WEIGHT * wanted).backward()
    assert float(found) == pytest.approx(float(wanted.detach()), rel=1e-9) and float(found) > 1e-8
    assert relative_error(ours, gradients(backbone)) < 1e-9


def test_the_update_follows_it_and_the_perturbation_does_not(backbone, moved, tmp_path):
    clip = write_clip(tmp_path, image_size=16)
    reward = load_reward(RewardSettings(path=str(clip), dtype="float64", clamp="none", checkpoint=False))
    part = planned(backbone, DRaFT(k=1))
    off = Smoothing(image=None, parameters=None)
    found = {}
    for label, anchor in (("free", None), ("held", moved)):
        algorithm = RewardGradient(backbone, reward, backbone.schedule(T), smoothing=off, loss=Loss(), anchor=anchor)
        for at in (At.PLAIN, At.FIRST):
            clear_gradients(backbone)
            found[label, at] = algorithm.backward(part, at), gradients(backbone)
    clear_gradients(backbone)
    squares = moved.backward(sampled(backbone, part), B)
    alone = gradients(backbone)
    figures, held = found["held", At.PLAIN]
    _, free = found["free", At.PLAIN]
    assert relative_error({n: held[n] - free[n] for n in held}, alone) < 1e-9
    assert float(figures["kl_to_base"]) == float(squares)
    assert "kl_to_base" not in found["free", At.PLAIN][0] and "kl_to_base" not in found["held", At.FIRST][0]
    first, without = found["held", At.FIRST][1], found["free", At.FIRST][1]
    assert all(torch.equal(first[n], without[n]) for n in first)


def test_the_untrained_model_is_at_no_distance(backbone):
    anchor = DistanceToBase(backbone, WEIGHT)
    clear_gradients(backbone)
    assert float(anchor.backward(sampled(backbone, planned(backbone, DRaFT(k=1))), B)) == 0
    assert all((g == 0).all() for g in gradients(backbone).values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": {"name": "python", "call": "toy:Algorithm"}}, ("kl_to_base", "method.name", "python")),
        (
            {
                "parameters": {"train": "full"},
                "backbone__dtype": "bf16",
                "optimizer__release_gradients": True,
            },
            ("kl_to_base", "release_gradients"),
        ),
    ],
)
def test_what_has_no_graded_calls_or_one_backward_pass_is_refused(tiny, out, changes, named):
    check_keys(config(tiny, out, regularize={"kl_to_base": 0.1}))
    with pytest.raises(UserError, match=says(*named)):
        check_keys(config(tiny, out, regularize={"kl_to_base": 0.1}, **changes))
