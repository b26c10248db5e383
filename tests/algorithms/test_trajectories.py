"""RSA-FT around LeapAlign and FlowBP: both balls over their surrogates, once more by autograd; and as a recipe."""

import copy

import numpy as np
import pytest
import torch
from builders.backbones import PROMPTS, cfg, make_backbone, relative_error
from builders.clip import write_clip
from builders.messages import says
from builders.recipes import config
from sampling.test_leaps import METHODS, Surrogate, T, W, equations

from rsaft_fast.algorithms.reward_gradient import PlannedBatch, rsaft_step
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.errors import UserError
from rsaft_fast.methods.losses import Loss
from rsaft_fast.optim import SAM
from rsaft_fast.recipe.check import check_keys
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.sampling import NoiseSource
from rsaft_fast.smoothing.settings import ImageSmoothing, ParameterSmoothing, Smoothing

B, RADIUS, RHO = 3, 0.7, 0.3
BOTH = Smoothing(image=ImageSmoothing(radius=RADIUS), parameters=ParameterSmoothing(rho=RHO))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone("sd3", tmp_path_factory.mktemp("sd3"), dtype=torch.float64)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    path = write_clip(tmp_path_factory.mktemp("clip"), image_size=16)
    return load_reward(RewardSettings(path=str(path), dtype="float64", clamp="none", checkpoint=False))


def parts_of(backbone, name, sizes, seed):
    plan = METHODS[name].model_copy(update={"uncond": "detached"}).draw(T, np.random.default_rng(seed))
    parts, first = [], 0
    for size in sizes:
        noise = NoiseSource(seed, 0, tuple(range(first, first + size)))
        prompts = list(PROMPTS[first : first + size])
        conditioning = backbone.encode(prompts, "blurry", **cfg(backbone, W))
        parts.append(PlannedBatch(MicroBatch(prompts, conditioning, backbone.initial_latents(noise), noise), plan))
        first += size
    return parts


def step(backbone, reward, parts):
    """One update's gradient, by SGD at a learning rate of 1; the weights are put back."""
    parameters = backbone.trainable_parameters
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = SAM(parameters.values(), torch.optim.SGD, rho=RHO, lr=1.0)
    report = rsaft_step(
        backbone, reward, backbone.schedule(T), parts, optimizer, smoothing=BOTH, loss=Loss(), compare_gradients=True
    )
    update = {name: before[name] - p.detach() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])
            p.grad = None
    return update, report


def expected(backbone, reward, part, name):
    """Eqs. 15, 17 and 19 of RSA-FT over the surrogate, whose weights of samples are the reward's own."""
    batch, parameters = part.batch, list(backbone.trainable_parameters.values())

    def walk():
        surrogate = Surrogate(backbone, backbone.schedule(T), batch.latents, batch.conditioning, part.plan)
        end, weight = equations(surrogate, name, part.plan)
        return backbone.decode(end), torch.ones(B, dtype=torch.float64) if weight is None else weight

    images, weight = walk()
    rewards = reward.score(images, batch.prompts)
    (g,) = torch.autograd.grad(rewards.sum(), images, retain_graph=True)
    delta = -RADIUS * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    slopes = torch.autograd.grad((weight * rewards).mean(), parameters)
    norm = torch.cat([slope.flatten() for slope in slopes]).norm()
    with torch.no_grad():
        for p, slope in zip(parameters, slopes):
            p.sub_(RHO * slope / norm)
    images, weight = walk()
    loss = -(weight * reward.score(images + delta, batch.prompts)).mean()
    return dict(zip(backbone.trainable_parameters, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize(
    "name", [name if name == "leapalign" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_both_balls_around_a_surrogate(backbone, reward, name):
    seed = int(np.random.default_rng().integers(1000))
    print("seed", seed)
    (part,) = parts_of(backbone, name, (B,), seed)
    ours, report = step(backbone, reward, [part])
    assert relative_error(ours, expected(copy.deepcopy(backbone), reward, part, name)) < 1e-9
    weighted = part.plan.similarity_floor is not None
    assert (report.similarity is not None) == weighted and (report.realised_drop is None) == weighted
    if name == "leapalign":
        divided, again = step(backbone, reward, parts_of(backbone, name, (1, 2), seed))
        assert relative_error(divided, ours) < 1e-9
        assert again.similarity == pytest.approx(report.similarity, rel=1e-12)


def test_graded_only_takes_what_comes_before_the_leaps_from_the_first_pass(backbone, reward):
    (part,) = parts_of(backbone, "lagrange", (B,), 3)
    algorithm_sees = []
    predict = backbone.predict
    smoothing = BOTH.model_copy(update={"resample": "graded_only"})
    backbone.predict = lambda x, step, branch: algorithm_sees.append(step.t) or predict(x, step, branch)
    try:
        optimizer = SAM(backbone.trainable_parameters.values(), torch.optim.SGD, rho=RHO, lr=0.0)
        rsaft_step(backbone, reward, backbone.schedule(T), [part], optimizer, smoothing=smoothing, loss=Loss())
    finally:
        del backbone.predict
    first, schedule = part.plan.first_graded, backbone.schedule(T)
    before = [algorithm_sees.count(step.t) for step in schedule[:first]]
    assert before == [2] * first  # both branches, in the first pass alone


@pytest.mark.parametrize("name", ["leapalign", "flowbp_lagrange"])
def test_a_recipe_whose_leaps_would_cross_noise_is_refused(tiny, out, name):
    check_keys(config(tiny, out, sampler={"steps": 4}, method={"name": name}))
    with pytest.raises(UserError, match=says("sampler.eta", 0.5, name, "sampler.eta=0", "flowbp_sparse")):
        check_keys(config(tiny, out, sampler={"steps": 4, "eta": 0.5}, method={"name": name}))
    check_keys(config(tiny, out, sampler={"steps": 4, "eta": 0.5}, method={"name": "flowbp_sparse"}))
