"""The update is RSA-FT as the equations say, written a second time in plain autograd."""

import copy
import itertools

import numpy as np
import pytest
import torch
from builders.backbones import FAMILIES, PROMPTS, cfg, combined, make_backbone, relative_error
from builders.clip import write_clip
from builders.messages import says

from rsaft_fast.algorithms.reward_gradient import PlannedBatch, rsaft_step
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.errors import NonFiniteRewardError, UserError
from rsaft_fast.methods import DRaFT, DRaFTLV, DRTune, ReFL
from rsaft_fast.methods.losses import Loss
from rsaft_fast.optim import SAM, SAMAdamW
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.sampling import NoiseSource
from rsaft_fast.smoothing.objective import image_perturbation, observe
from rsaft_fast.smoothing.settings import ImageSmoothing, ParameterSmoothing, Smoothing

T, B, GUIDANCE = 4, 4, 2.5
LINEAR = Loss()
IMAGE = ImageSmoothing(radius=0.7)
PARAMETERS = ParameterSmoothing(rho=0.3)
BALLS = {
    "neither": Smoothing(image=None, parameters=None),
    "image": Smoothing(image=IMAGE, parameters=None),
    "parameters": Smoothing(image=None, parameters=PARAMETERS),
    "both": Smoothing(image=IMAGE, parameters=PARAMETERS),
}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    path = write_clip(tmp_path_factory.mktemp("clip"), image_size=16)
    return load_reward(RewardSettings(path=str(path), dtype="float64", clamp="none", checkpoint=False))


@pytest.fixture(scope="module", params=["sd15", "sd3"])
def shared_backbone(request, tmp_path_factory):
    return make_backbone(request.param, tmp_path_factory.mktemp(request.param), dtype=torch.float64)


@pytest.fixture
def backbone(shared_backbone):
    before = weights_of(shared_backbone)
    yield shared_backbone
    vars(shared_backbone).pop("predict", None)
    with torch.no_grad():
        for name, p in shared_backbone.trainable_parameters.items():
            p.copy_(before[name])
            p.grad = None


def make_batches(backbone, method, sizes=(B,), seed=5):
    """Micro-batches of one update over the same samples, whatever the division."""
    prompts = (PROMPTS * 2)[: sum(sizes)]
    plan = method.draw(T, np.random.default_rng(seed))
    batches, start = [], 0
    for size in sizes:
        noise = NoiseSource(seed, 0, tuple(range(start, start + size)))
        mine = prompts[start : start + size]
        conditioning = backbone.encode(mine, "blurry", **cfg(backbone, GUIDANCE))
        batches.append(PlannedBatch(MicroBatch(mine, conditioning, backbone.initial_latents(noise), noise), plan))
        start += size
    return batches


def weights_of(backbone):
    return {name: p.detach().clone() for name, p in backbone.trainable_parameters.items()}


def sgd_sam(backbone, smoothing):
    """With SGD at lr 1 the update is minus the gradient."""
    rho = smoothing.parameters.rho if smoothing.parameters else 0.05
    return SAM(backbone.trainable_parameters.values(), torch.optim.SGD, rho=rho, lr=1.0)


def step(backbone, reward, smoothing, batches, loss=LINEAR, **options):
    """Run one update; return its gradient, with the weights put back."""
    before = weights_of(backbone)
    report = rsaft_step(
        backbone,
        reward,
        backbone.schedule(T),
        batches,
        sgd_sam(backbone, smoothing),
        smoothing=smoothing,
        loss=loss,
        **options,
    )
    update = {name: before[name] - p.detach() for name, p in backbone.trainable_parameters.items()}
    with torch.no_grad():
        for name, p in backbone.trainable_parameters.items():
            p.copy_(before[name])
    return update, report


# -- the equations once more, in one differentiable expression ---------------------------------------------------------


def sample(backbone, batch):
    """x_0 of a DRaFT chain (last K calls differentiated), by autograd through the unrolled sampler."""
    x, plan = batch.batch.latents, batch.plan
    for i, s in enumerate(backbone.schedule(T)):
        with torch.set_grad_enabled(i in plan.graded):
            f_c = backbone.predict(x, s, batch.batch.conditioning.positive)
            f_u = backbone.predict(x, s, batch.batch.conditioning.negative)
            x = s.a * x + s.b * combined(backbone, f_c, f_u, GUIDANCE)
    return x


def equations(backbone, reward, batch, smoothing, loss=LINEAR):
    """Gradient of the loss at x_0(theta + eps) + delta (eqs. 15, 17, 19)."""
    parameters = backbone.trainable_parameters
    images = backbone.decode(sample(backbone, batch))
    r = reward.score(images, batch.batch.prompts)
    gradients = torch.autograd.grad(r.mean(), [images, *parameters.values()], allow_unused=True, materialize_grads=True)
    delta = 0
    if smoothing.image:
        g = gradients[0]
        delta = -smoothing.image.radius * g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    if smoothing.parameters:
        g = torch.cat([grad.flatten() for grad in gradients[1:]])
        with torch.no_grad():
            for p, grad in zip(parameters.values(), gradients[1:]):
                p.sub_(smoothing.parameters.rho * grad / g.norm())
    value = loss(reward.score(backbone.decode(sample(backbone, batch)) + delta, batch.batch.prompts)).mean()
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found))


@pytest.mark.parametrize(("balls", "k"), [*itertools.product(BALLS, [3]), ("both", 1)])
def test_step_equals_the_equations(backbone, reward, balls, k):
    batches = make_batches(backbone, DRaFT(k=k))
    ours, report = step(backbone, reward, BALLS[balls], batches)
    truth = equations(copy.deepcopy(backbone), reward, batches[0], BALLS[balls])
    assert relative_error(ours, truth) < 1e-9
    if balls == "neither":
        assert report.reward == report.smoothed_reward == -report.loss


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("sd15", "sd3")])
def test_step_equals_the_equations_on_the_other_backbones(family, reward, tmp_path):
    backbone = make_backbone(family, tmp_path, dtype=torch.float64)
    if family in ("qwen", "krea"):  # diffusers' decoder rounds to fp32 where it doubles the sides
        backbone.recompute(["decoder-strips"])
    batches = make_batches(backbone, DRaFT(k=2))
    ours, report = step(backbone, reward, BALLS["both"], batches)
    truth = equations(copy.deepcopy(backbone), reward, batches[0], BALLS["both"])
    # Within these networks norms and positions are fp32: where an input's last bit differs, so may one of theirs.
    # How often depends on the processor: 1.3e-9 of Z-Image's on one.
    close = {"qwen": 1e-7, "krea": 1e-7, "zimage": 1e-8}
    assert relative_error(ours, truth) < close.get(family, 1e-9)
    assert report.reward != report.smoothed_reward


def test_smoothing_changes_the_gradient(backbone, reward):
    batches = make_batches(backbone, DRaFT())
    gradients = {name: step(backbone, reward, balls, batches)[0] for name, balls in BALLS.items()}
    for a in BALLS:
        for b in BALLS:
            assert a == b or relative_error(gradients[a], gradients[b]) > 1e-3, (a, b)


@pytest.mark.parametrize(
    "method, resample, delta_from",
    [
        (DRaFT(k=2), "full", "first"),
        pytest.param(DRaFTLV(n_extra=1), "full", "first", marks=pytest.mark.slow),
        pytest.param(DRTune(k=2), "graded_only", "first", marks=pytest.mark.slow),
        (ReFL(window=(0.5, 1.0)), "full", "perturbed"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_accumulation_over_four_micro_batches_equals_one_batch(backbone, reward, method, resample, delta_from):
    smoothing = BALLS["both"].model_copy(update={"resample": resample, "delta_from": delta_from})
    loss = Loss(map="hinge", margin=1e3, scale=0.1)
    whole, one = step(backbone, reward, smoothing, make_batches(backbone, method), loss)
    parts, four = step(backbone, reward, smoothing, make_batches(backbone, method, sizes=(1,) * 4), loss)
    assert relative_error(parts, whole) < 1e-9
    assert four.reward == pytest.approx(one.reward, rel=1e-12)
    assert four.smoothed_reward == pytest.approx(one.smoothed_reward, rel=1e-12)


def test_uneven_micro_batches_weigh_by_their_size(backbone, reward):
    whole, _ = step(backbone, reward, BALLS["both"], make_batches(backbone, DRaFT()))
    uneven, _ = step(backbone, reward, BALLS["both"], make_batches(backbone, DRaFT(), sizes=(3, 1)))
    assert relative_error(uneven, whole) < 1e-9


def test_perturbations_have_exactly_the_radius_asked_for(backbone, reward, monkeypatch):
    """Seen from outside: the weights during the second pass, and the pictures that the reward is shown."""
    smoothing, batches = BALLS["both"], make_batches(backbone, DRaFT())
    start = torch.cat([p.flatten() for p in weights_of(backbone).values()])
    shown = []

    def spy(images, prompts):
        now = torch.cat([p.detach().flatten() for p in backbone.trainable_parameters.values()])
        shown.append((images.detach().clone(), (now - start).norm().item()))
        return original(images, prompts)

    original = reward.score
    monkeypatch.setattr(reward, "score", spy)
    decoded = []
    decode = backbone.decode
    monkeypatch.setattr(backbone, "decode", lambda x: decoded.append(decode(x)) or decoded[-1])
    step(backbone, reward, smoothing, batches)
    (_, first), *_, (images, second) = shown
    assert first == 0.0
    assert second == pytest.approx(smoothing.parameters.rho, rel=1e-8)  # SAM divides by the norm + 1e-12
    # The picture shown last is one of the decoded ones, moved by delta.
    distances = [(images - d.detach()).flatten(1).norm(dim=1) for d in decoded]
    assert any(torch.allclose(d, torch.full_like(d, IMAGE.radius), rtol=1e-9) for d in distances)


@pytest.mark.parametrize("norm", ["l2", "rms"])
@pytest.mark.parametrize("space", ["pixel01", "pixel11", "latent", "reward_input"])
def test_image_radius_in_every_space(backbone, reward, space, norm):
    batch = make_batches(backbone, DRaFT())[0]
    x = batch.batch.latents * 0.5
    smoothing = ImageSmoothing(radius=0.2, norm=norm, space=space)
    here = observe(backbone, reward, x, batch.batch.prompts, space=space)
    delta = image_perturbation(backbone, here, smoothing)
    # The node where the ball lives, and the gradient there, by autograd.
    node = (
        {
            "pixel01": lambda: backbone.decode(x),
            "pixel11": lambda: backbone.decode(x),
            "latent": lambda: x,
            "reward_input": lambda: reward.preprocess(backbone.decode(x)),
        }[space]()
        .detach()
        .requires_grad_(True)
    )
    tail = {
        "latent": lambda v: reward.score(backbone.decode(v), batch.batch.prompts),
        "reward_input": lambda v: reward.score_inputs(v, batch.batch.prompts),
    }.get(space, lambda v: reward.score(v, batch.batch.prompts))
    (g,) = torch.autograd.grad(tail(node).sum(), node)
    length = g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    radius = 0.2 * (g[0].numel() ** 0.5 if norm == "rms" else 1.0) / (2 if space == "pixel11" else 1)
    assert torch.allclose(delta, -radius * g / length, rtol=1e-9)
    moved = observe(backbone, reward, x, batch.batch.prompts, delta, space)
    assert torch.allclose(moved.rewards, tail(node + delta), rtol=1e-12)
    assert (moved.rewards < here.rewards).all()


@pytest.mark.parametrize("space", ["latent", "reward_input"])
def test_image_smoothing_in_other_spaces_follows_its_own_gradient(backbone, reward, space):
    """Gradient of r at the perturbed node, delta constant, by autograd."""
    ball = ImageSmoothing(radius=0.2, space=space)
    smoothing = Smoothing(image=ball, parameters=None)
    batches = make_batches(backbone, DRaFT())
    ours, report = step(backbone, reward, smoothing, batches, probe=ball)
    batch = batches[0]
    x = sample(backbone, batch)
    here = observe(backbone, reward, x.detach(), batch.batch.prompts, space=space)
    delta = image_perturbation(backbone, here, ball)
    if space == "latent":
        r = reward.score(backbone.decode(x + delta), batch.batch.prompts)
    else:
        r = reward.score_inputs(reward.preprocess(backbone.decode(x)) + delta, batch.batch.prompts)
    parameters = backbone.trainable_parameters
    truth = dict(zip(parameters, torch.autograd.grad(-r.mean(), list(parameters.values()))))
    assert relative_error(ours, truth) < 1e-9
    assert report.s1 == pytest.approx(float(here.rewards.mean() - r.detach().mean()), rel=1e-9)


def test_delta_from_the_perturbed_picture(backbone, reward):
    smoothing = BALLS["both"].model_copy(update={"delta_from": "perturbed"})
    batches = make_batches(backbone, DRaFT())
    ours, _ = step(backbone, reward, smoothing, batches)
    there, batch = copy.deepcopy(backbone), batches[0]
    parameters = there.trainable_parameters
    r = reward.score(there.decode(sample(there, batch)), batch.batch.prompts)
    gradients = torch.autograd.grad(r.mean(), list(parameters.values()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(parameters.values(), gradients):
            p.sub_(PARAMETERS.rho * g / norm)
    images = there.decode(sample(there, batch))
    (g,) = torch.autograd.grad(reward.score(images, batch.batch.prompts).sum(), images, retain_graph=True)
    delta = -IMAGE.radius * g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    value = -reward.score(images + delta, batch.batch.prompts).mean()
    truth = dict(zip(parameters, torch.autograd.grad(value, list(parameters.values()))))
    assert relative_error(ours, truth) < 1e-9


def test_graded_only_takes_the_prefix_at_theta(backbone, reward):
    """Cheaper, and a different gradient: the prefix does not see eps."""
    batches = make_batches(backbone, DRaFT())
    calls = []
    predict = backbone.predict
    backbone.predict = lambda *a: calls.append(0) or predict(*a)
    counts = {}
    gradients = {}
    for mode in ("full", "graded_only"):
        calls.clear()
        gradients[mode], _ = step(backbone, reward, BALLS["both"].model_copy(update={"resample": mode}), batches)
        counts[mode] = len(calls)
    assert counts["full"] - counts["graded_only"] == 2 * (T - 1)
    assert relative_error(gradients["graded_only"], gradients["full"]) > 1e-6


def test_ascending_the_loss_ignores_samples_beyond_the_hinge(backbone, reward):
    batches = make_batches(backbone, DRaFT())
    _, report = step(backbone, reward, BALLS["neither"], batches)
    loss = Loss(map="hinge", margin=report.reward)  # some samples above, some below
    both = [
        step(backbone, reward, BALLS["parameters"].model_copy(update={"ascend": what}), batches, loss)[0]
        for what in ("reward", "loss")
    ]
    assert relative_error(*both) > 1e-3


def test_realised_drop_tends_to_one_as_the_ball_shrinks(backbone, reward):
    smoothing = BALLS["both"].model_copy(
        update={"parameters": ParameterSmoothing(rho=1e-4), "resample": "graded_only", "image": None}
    )
    _, report = step(backbone, reward, smoothing, make_batches(backbone, DRaFT()), compare_gradients=True)
    assert report.realised_drop == pytest.approx(1.0, abs=1e-2)
    assert report.optimizer["gradient_cosine"] > 0.99 and report.optimizer["gradient_change"] < 0.1
    assert report.optimizer["eps_norm"] == pytest.approx(1e-4, rel=1e-9)
    assert report.optimizer["projection"] == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("backup", ["own", "gradient"])
def test_how_far_the_gradient_turned_wherever_the_weights_wait(reward, tmp_path, backup):
    backbone = make_backbone("sd3", tmp_path)
    batches = make_batches(backbone, DRaFT(), sizes=(2, 2))
    first, _ = step(backbone, reward, BALLS["neither"], batches)
    second, _ = step(backbone, reward, BALLS["parameters"], batches)
    a, b = (torch.cat([g.double().flatten() for g in of.values()]) for of in (first, second))
    optimizer = SAMAdamW(backbone.trainable_parameters.values(), rho=PARAMETERS.rho, lr=1e-4, backup=backup)
    how = dict(smoothing=BALLS["parameters"], loss=LINEAR, compare_gradients=True)
    stats = rsaft_step(backbone, reward, backbone.schedule(T), batches, optimizer, **how).optimizer
    assert stats["gradient_change"] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-3)
    assert stats["gradient_cosine"] == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-3)


def test_s1_of_the_probe(backbone, reward):
    probe = ImageSmoothing(radius=0.3)
    batches = make_batches(backbone, DRaFT())
    for name, balls in BALLS.items():
        _, report = step(backbone, reward, balls, batches, probe=probe)
        images = backbone.decode(sample(backbone, batches[0])).detach().requires_grad_(True)
        r = reward.score(images, batches[0].batch.prompts)
        (g,) = torch.autograd.grad(r.sum(), images)
        moved = images - 0.3 * g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        expected = (r - reward.score(moved, batches[0].batch.prompts)).mean().item()
        assert report.s1 == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize(("when", "value"), [(1, float("nan")), (2, float("inf")), (3, float("nan"))])
def test_a_reward_that_is_not_finite_loses_nothing(backbone, reward, monkeypatch, when, value):
    """In whichever evaluation it comes: the weights are those before the step, to the bit."""
    before = weights_of(backbone)
    optimizer = SAMAdamW(backbone.trainable_parameters.values(), lr=1e-2, rho=0.3)
    calls, original = [], reward.score

    def failing(images, prompts):
        calls.append(0)
        r = original(images, prompts)
        return r * value if len(calls) == when else r

    monkeypatch.setattr(reward, "score", failing)
    batches, schedule = make_batches(backbone, DRaFT()), backbone.schedule(T)
    options = dict(smoothing=BALLS["both"], loss=LINEAR)
    with pytest.raises(NonFiniteRewardError, match=says("finite", "4 of 4", "first: ", "'a red circle'")):
        rsaft_step(backbone, reward, schedule, batches, optimizer, **options)
    for name, p in backbone.trainable_parameters.items():
        assert torch.equal(p, before[name])
    report = rsaft_step(backbone, reward, schedule, batches, optimizer, **options)
    assert report.optimizer["skipped"] == 0
    assert any(not torch.equal(p, before[name]) for name, p in backbone.trainable_parameters.items())


def test_an_exception_in_the_second_pass_restores_the_weights(backbone, reward, monkeypatch):
    before = weights_of(backbone)
    decode, calls = backbone.decode, []

    def failing(x):
        calls.append(any(not torch.equal(p, before[n]) for n, p in backbone.trainable_parameters.items()))
        if calls[-1]:
            raise torch.OutOfMemoryError("out of memory")
        return decode(x)

    monkeypatch.setattr(backbone, "decode", failing)
    optimizer = SAMAdamW(backbone.trainable_parameters.values(), rho=0.3)
    with pytest.raises(torch.OutOfMemoryError):
        rsaft_step(
            backbone,
            reward,
            backbone.schedule(T),
            make_batches(backbone, DRaFT()),
            optimizer,
            smoothing=BALLS["parameters"],
            loss=LINEAR,
        )
    assert calls[-1], "the failure came while the weights were perturbed"
    for name, p in backbone.trainable_parameters.items():
        assert torch.equal(p, before[name])


def test_a_reward_without_gradient_is_refused(backbone, reward, monkeypatch):
    monkeypatch.setattr(reward, "differentiable", False)
    with pytest.raises(UserError, match=says("'clip'", "gradient")):
        step(backbone, reward, BALLS["neither"], make_batches(backbone, DRaFT()))


def test_reward_gradient_through_decode_and_preprocessing_against_finite_differences(backbone, reward):
    batch = make_batches(backbone, DRaFT())[0]
    x = batch.batch.latents * 0.5
    here = observe(backbone, reward, x, batch.batch.prompts)
    from rsaft_fast.smoothing.objective import latent_gradient

    g = latent_gradient(backbone, here, here.image_gradient)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        v = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        h = 1e-5
        with torch.no_grad():
            up = reward.score(backbone.decode(x + h * v), batch.batch.prompts).sum()
            down = reward.score(backbone.decode(x - h * v), batch.batch.prompts).sum()
        assert float((up - down) / (2 * h)) == pytest.approx(float((g * v).sum()), rel=1e-6)


def test_fused_adamw_takes_the_step_of_torchs(backbone, reward):
    """One update with SAMAdamW against the equations' gradient in torch.optim.AdamW."""
    smoothing, batches = BALLS["both"], make_batches(backbone, DRaFT())
    truth = equations(copy.deepcopy(backbone), reward, batches[0], smoothing)
    reference = {n: p.detach().clone().requires_grad_() for n, p in backbone.trainable_parameters.items()}
    for name, p in reference.items():
        p.grad = truth[name]
    torch.nn.utils.clip_grad_norm_(reference.values(), 0.5)
    settings = dict(lr=1e-2, weight_decay=0.1, eps=1e-3)
    torch.optim.AdamW(reference.values(), **settings).step()
    optimizer = SAMAdamW(
        backbone.trainable_parameters.values(), rho=smoothing.parameters.rho, max_grad_norm=0.5, **settings
    )
    rsaft_step(backbone, reward, backbone.schedule(T), batches, optimizer, smoothing=smoothing, loss=LINEAR)
    for name, p in backbone.trainable_parameters.items():
        assert torch.allclose(p, reference[name], rtol=1e-8, atol=1e-11)
