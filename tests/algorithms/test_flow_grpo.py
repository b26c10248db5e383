"""Flow-GRPO's gradient is that of the equations, written a second time in plain autograd."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from builders.backbones import (
    FAMILIES,
    PROMPTS,
    cfg,
    clear_gradients,
    combined,
    gradients,
    make_backbone,
    relative_error,
)
from builders.messages import says
from builders.toy_flow import ToyFlow

from rsaft_fast.algorithms.base import At
from rsaft_fast.algorithms.copies import REFERENCE, Copies
from rsaft_fast.algorithms.flow_grpo import FlowGRPO
from rsaft_fast.algorithms.update import update
from rsaft_fast.backbones import SD3, SD15
from rsaft_fast.data.batches import PromptBatches
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.distributed import World
from rsaft_fast.methods import FlowGRPO as Settings
from rsaft_fast.optim import SAM
from rsaft_fast.recipe.config import DataSettings, SamplerSettings
from rsaft_fast.rewards.base import Reward, RewardSpec

T, GROUP, SEED = 3, 2, 5


class Brightness(Reward):
    """The mean of a picture's red, which nobody differentiates."""

    differentiable = False
    spec = RewardSpec("brightness")

    def score(self, images, prompts):
        assert not torch.is_grad_enabled()
        return images[:, 0].mean((1, 2)).double()


@pytest.fixture(scope="module", params=FAMILIES)
def any_backbone(request, tmp_path_factory):
    return kept(make_backbone(request.param, tmp_path_factory.mktemp(request.param), dtype=torch.float64))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return kept(make_backbone("sd3", tmp_path_factory.mktemp("sd3"), dtype=torch.float64))


def kept(backbone):
    backbone.at_first = {name: p.detach().clone() for name, p in backbone.trainable_parameters.items()}
    return backbone


def moved(backbone, scale, seed):
    """Give the weights a random offset from their first values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in backbone.trainable_parameters.items():
            offset = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(backbone.at_first[name] + scale * offset)
    clear_gradients(backbone)


def prepared(backbone, guidance=1.0, data=None, **settings):
    """The algorithm with a reference at the first weights, and what it collects at weights beside them."""
    moved(backbone, 0.0, 0)
    algorithm = FlowGRPO(backbone, Brightness(), Settings(**settings), T)
    options = {"batch_size": 2, "group_size": GROUP, "prompts_per_iteration": 2} | (data or {})
    source = PromptBatches(DataSettings(prompts="x", **options), PROMPTS, SEED)
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings(**cfg(backbone, guidance)))
    moved(backbone, 0.02, 1)
    experience = algorithm.collect(source(backbone, encoded, 4))
    algorithm.judge(experience, World())
    return algorithm, experience


def gradient_of(algorithm, parts, at=At.PLAIN):
    clear_gradients(algorithm.backbone)
    sums = {}
    for part in parts:
        for name, share in algorithm.backward(part, at).items():
            sums[name] = sums.get(name, 0.0) + float(share)
    return gradients(algorithm.backbone), sums


# --- the same from the equations ---


def guided(backbone, x, step, conditioning):
    f = backbone.predict(x, step, conditioning.positive)
    if conditioning.negative is None:
        return f
    negative = backbone.predict(x, step, conditioning.negative)
    return combined(backbone, f, negative, conditioning.guidance_scale)


def mean_and_std(schedule, call, x, f, a):
    """Flow-GRPO's eq. 9 of a flow; DDIM's eq. 12 and 16 of an eps model."""
    step = schedule[call]
    after_sigma = schedule[call + 1].sigma if call + 1 < len(schedule) else None
    if step.a == 1:
        sigma, after = step.sigma, 0.0 if after_sigma is None else after_sigma
        s = a * math.sqrt(sigma / (1 - (after if sigma == 1 else sigma)))
        drift = f + s**2 / (2 * sigma) * (x + (1 - sigma) * f)
        return x + drift * (after - sigma), s * math.sqrt(sigma - after)
    abar = step.alpha**2
    abar_after = schedule[call + 1].alpha ** 2
    variance = a**2 * (1 - abar_after) / (1 - abar) * (1 - abar / abar_after)
    clean = (x - math.sqrt(1 - abar) * f) / math.sqrt(abar)
    return math.sqrt(abar_after) * clean + math.sqrt(1 - abar_after - variance) * f, math.sqrt(variance)


def truth(algorithm, experience, parts, level, clip, kl_weight, old=None, total=None):
    """The loss over some samples by autograd; `old`: log-probabilities of the collecting weights by (part, call)."""
    backbone, batches = algorithm.backbone, experience.batches
    schedule, calls = backbone.schedule(T), experience.calls
    loss, found, total = 0.0, {}, total or sum(len(part.places) for part in parts)
    for index, part in enumerate(parts):
        conditioning = batches.conditioning(part.places)
        advantages = experience.advantages[list(part.places)]
        for call in calls:
            x, after = experience.latent(call, part), experience.latent(call + 1, part)
            f = guided(backbone, x, schedule[call], conditioning)
            mean, std = mean_and_std(schedule, call, x, f, level)
            log_p = torch.distributions.Normal(mean, std).log_prob(after).flatten(1).mean(1)
            found[index, call] = log_p.detach()
            ratio = (log_p - (log_p.detach() if old is None else old[index, call])).exp()
            policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
            loss = loss + policy.sum() / (total * len(calls))
            if kl_weight:
                with torch.no_grad():
                    here = {n: p.detach().clone() for n, p in backbone.trainable_parameters.items()}
                    put(backbone, backbone.at_first)
                    other = guided(backbone, x, schedule[call], conditioning)
                    put(backbone, here)
                other_mean, _ = mean_and_std(schedule, call, x, other, level)
                divergence = ((mean - other_mean).square() / (2 * std**2)).flatten(1).mean(1)
                loss = loss + kl_weight * divergence.sum() / (total * len(calls))
    return loss, found


@torch.no_grad()
def put(backbone, values):
    for name, p in backbone.trainable_parameters.items():
        p.data = values[name].clone()


def autograd_of(backbone, loss):
    parameters = backbone.trainable_parameters
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found)}


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_both_updates_gradients_are_the_equations(any_backbone, guidance):
    """Ratio 1 in the first; in the second the weights have moved, and some samples are clipped."""
    backbone = any_backbone
    if guidance == 1.0 and not isinstance(backbone, (SD15, SD3)):
        pytest.skip("without guidance there is a sampler and no backbone's own: tried with the first of each sampler")
    flow = backbone.schedule(T)[0].a == 1
    level = 0.7 if flow else 1.0
    algorithm, experience = prepared(
        backbone, guidance, {"prompts_per_iteration": 4}, updates=2, kl_weight=0.3, kl_dt=True, clip=1e-3
    )
    first, second = experience.updates
    assert experience.calls == (0, 1) and len(first) == len(second) == 2
    loss, _ = truth(algorithm, experience, first, level, 1e-3, 0.3)
    wanted = autograd_of(backbone, loss)
    ours, sums = gradient_of(algorithm, first)
    assert relative_error(ours, wanted) < 1e-9
    assert sums["ratio_off"] == sums["clipped"] == 0 and sums["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    _, old = truth(algorithm, experience, second, level, 1e-3, 0.0)
    moved(backbone, 0.03, 2)
    _, now = truth(algorithm, experience, second, level, 1e-3, 0.0)
    ratios = torch.cat([(now[key] - old[key]).exp() for key in old])
    algorithm.clip = clip = float((ratios - 1).abs().quantile(0.25))
    loss, _ = truth(algorithm, experience, second, level, clip, 0.3, old)
    wanted = autograd_of(backbone, loss)
    ours, sums = gradient_of(algorithm, second)
    assert 0 < sums["clipped"] < 1 and sums["ratio_off_squared"] > 0
    assert relative_error(ours, wanted) < 1e-9
    assert sums["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)


def test_latents_and_advantages_are_those_of_a_rollout_by_hand(sd3):
    algorithm, experience = prepared(sd3, 2.5)
    batches = experience.batches
    schedule = sd3.schedule(T)
    with torch.no_grad():
        x, noise = batches.initial_latents(range(4)), batches.noise(range(4))
        conditioning = batches.conditioning(range(4))
        for call in range(T):
            if call in experience.latents:
                torch.testing.assert_close(experience.latents[call], x, rtol=1e-9, atol=1e-9)
            f = guided(sd3, x, schedule[call], conditioning)
            mean, std = mean_and_std(schedule, call, x, f, 0.7)
            x = mean + std * noise.draw("ancestral", x.shape[1:], call, x.dtype)
        rewards = sd3.decode(x)[:, 0].mean((1, 2)).view(2, 2)
    wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    assert set(experience.latents) == {0, 1, 2}
    torch.testing.assert_close(experience.advantages, wanted.flatten(), rtol=1e-6, atol=1e-9)
    assert algorithm.judged["reward"] == pytest.approx(float(rewards.mean()), rel=1e-9)


def test_a_perturbed_update_is_a_hand_written_sam_step(sd3):
    """The old log-probability stays theta's; the ratio is taken at theta + eps, on the same samples."""
    rho, clip = 0.02, 0.5
    algorithm, experience = prepared(sd3, kl_weight=0.3, kl_dt=True, clip=clip)
    parts = algorithm.parts(experience, 0)
    before = {n: p.detach().clone() for n, p in sd3.trainable_parameters.items()}
    loss, old = truth(algorithm, experience, parts, 0.7, clip, 0.3)
    ascent = autograd_of(sd3, loss)
    norm = sum(g.square().sum() for g in ascent.values()).sqrt()
    put(sd3, {n: before[n] + rho * ascent[n] / norm for n in before})
    loss, _ = truth(algorithm, experience, parts, 0.7, clip, 0.3, old)
    wanted = autograd_of(sd3, loss)
    put(sd3, before)
    optimizer = SAM(sd3.trainable_parameters.values(), torch.optim.SGD, rho=rho, lr=1.0)
    figures, _ = update(algorithm, optimizer, parts, perturbs=True)
    ours = {n: before[n] - p.detach() for n, p in sd3.trainable_parameters.items()}
    assert relative_error(ours, wanted) < 1e-8
    assert figures["ratio_std"] > 0 and figures["old_gap"] < 1e-12
    assert figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)


@pytest.mark.parametrize("space", ["mean", "velocity", "x0"])
def test_other_ratios_and_penalties(sd3, space):
    """GRPO-Guard's ratio in each space of the penalty, by autograd from its definition."""
    algorithm, experience = prepared(sd3, updates=2, kl_weight=0.3, kl_space=space, ratio_norm=True, clip=0.3)
    parts = algorithm.parts(experience, 1)
    remembered = {call: guided_at(sd3, experience, parts[0], call) for call in experience.calls}
    moved(sd3, 0.05, 2)
    with algorithm.copies.applied(REFERENCE):
        others = {call: guided_at(sd3, experience, parts[0], call) for call in experience.calls}
    ours, sums = gradient_of(algorithm, parts)
    schedule, part, loss = sd3.schedule(T), parts[0], 0.0
    advantages = experience.advantages[list(part.places)]
    for call in experience.calls:
        step = schedule[call]
        duration = step.sigma - (schedule[call + 1].sigma if call + 1 < T else 0.0)
        x, after = experience.latent(call, part), experience.latent(call + 1, part)
        f = guided(sd3, x, step, experience.batches.conditioning(part.places))
        mean, std = mean_and_std(schedule, call, x, f, 0.7)
        mean_old, _ = mean_and_std(schedule, call, x, remembered[call], 0.7)
        log, log_old = (torch.distributions.Normal(m, std).log_prob(after).flatten(1).mean(1) for m in (mean, mean_old))
        bias = (mean - mean_old).square().flatten(1).mean(1) / (2 * std**2)
        ratio = ((log - log_old + bias) * std).exp()
        policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.7, 1.3))
        away = {
            # The released code divides by s^2, which is the variance over the duration.
            "mean": (mean - mean_and_std(schedule, call, x, others[call], 0.7)[0]).square() / (2 * std**2 / duration),
            "velocity": (f - others[call]).square(),
            "x0": (step.sigma * (f - others[call])).square(),
        }[space]
        loss = loss + (policy / duration + 0.3 * away.flatten(1).mean(1)).sum() / (2 * 2)
    wanted = autograd_of(sd3, loss)
    assert relative_error(ours, wanted) < 1e-9 and sums["ratio_off_squared"] > 0


def test_a_divergence_mask_takes_the_clip_ranges_place(sd3):
    found = {}
    for name, settings in {
        "open": {"clip": 0.99},
        "never": {"most_divergence": 1e9},
        "always": {"most_divergence": 1e-30},
    }.items():
        algorithm, experience = prepared(sd3, updates=2, kl_weight=0.0, **settings)
        moved(sd3, 0.05, 2)
        found[name] = gradient_of(algorithm, algorithm.parts(experience, 1))
    assert relative_error(found["never"][0], found["open"][0]) < 1e-9
    assert found["never"][1]["clipped"] == 0 < found["always"][1]["clipped"] < 1
    assert relative_error(found["always"][0], found["open"][0]) > 0.01


def test_without_guidance_in_training_the_rollout_has_none_either(sd3):
    (_, none), (_, plain) = (prepared(sd3, w, uncond=uncond) for w, uncond in ((2.5, "none"), (1.0, "graded")))
    assert torch.equal(none.latents[1], plain.latents[1])
    ours, wanted = (
        gradient_of(made, found.updates[0])[0] for made, found in (prepared(sd3, 2.5, uncond="none"), prepared(sd3))
    )
    assert relative_error(ours, wanted) < 1e-9


@torch.no_grad()
def guided_at(backbone, experience, part, call):
    conditioning = experience.batches.conditioning(part.places)
    return guided(backbone, experience.latent(call, part), backbone.schedule(T)[call], conditioning)


def test_in_bf16_the_first_ratio_is_exactly_one(tmp_path):
    backbone = kept(make_backbone("sd3", tmp_path, dtype=torch.bfloat16))
    algorithm, experience = prepared(backbone, data={"batch_size": 1}, collect_batch=4, kl_weight=0.0)
    assert all(latents.dtype == torch.float32 for latents in experience.latents.values())
    _, sums = gradient_of(algorithm, algorithm.parts(experience, 0))
    assert sums["ratio_off"] == sums["ratio_off_squared"] == sums["clipped"] == 0
    assert 0 < sums["old_gap"] < 0.1  # other shapes round otherwise


def test_a_window_draws_and_trains_its_calls_alone_and_shares_what_comes_before(sd3):
    window = {"size": 1, "first": 1, "last": 1}
    shared = {"group_noise": "same"}
    algorithm, experience = prepared(sd3, data=shared, window=window)
    assert experience.calls == (1,) and set(experience.latents) == {1, 2}
    assert [step.c > 0 for step in experience.schedule] == [False, True, False]
    for first in (0, 2):
        assert torch.equal(experience.latents[1][first], experience.latents[1][first + 1])
        assert not torch.equal(experience.latents[2][first], experience.latents[2][first + 1])
    _, whole = prepared(sd3, data=shared | {"batch_size": 4}, window=window)
    for call, latents in whole.latents.items():
        torch.testing.assert_close(latents, experience.latents[call], rtol=1e-9, atol=1e-9)
    _, alone = prepared(sd3, window=window, data={"group_noise": "different"})
    assert not torch.equal(alone.latents[1][0], alone.latents[1][1])


class Constant(Brightness):
    """All pictures of one prompt are alike, those of the other are not."""

    def score(self, images, prompts):
        return torch.where(torch.tensor([p == self.flat for p in prompts]), 1.0, super().score(images, prompts))


def test_equal_groups_are_left_out_counted_and_fill_up(sd3):
    algorithm, experience = prepared(sd3, data={"batch_size": 2})
    flat = experience.batches.prompts[0]
    algorithm.reward = Constant()
    algorithm.reward.flat = flat
    again = algorithm.collect(experience.batches)
    algorithm.judge(again, World())
    assert [part.places for part in again.updates[0]] == [(2, 3)] and again.updates[0][0].total == 2
    assert algorithm.judged["equal_groups"] == 1 and again.advantages[:2].tolist() == [0, 0]
    # Three of a micro-batch: one of those left out fills it.
    again = algorithm.collect(experience.batches.of(4))
    algorithm.judge(again, World())
    assert [part.places for part in again.updates[0]] == [(2, 3, 0, 1)]


def test_an_iteration_that_says_nothing_changes_nothing(sd3):
    algorithm, experience = prepared(sd3)
    experience.scores.rewards[:] = 1.0
    algorithm.judge(experience, World())
    before = {n: p.detach().clone() for n, p in sd3.trainable_parameters.items()}
    for perturbs in (False, True):
        optimizer = SAM(sd3.trainable_parameters.values(), torch.optim.SGD, rho=0.1, lr=1.0)
        figures, _ = update(algorithm, optimizer, algorithm.parts(experience, 0), perturbs=perturbs)
        assert figures["equal_groups"] == 2 and figures["loss"] is None and figures["reward"] == 1
    assert all(torch.equal(before[n], p) for n, p in sd3.trainable_parameters.items())


class Gated(FlowGRPO):
    """No advantages, and a penalty on some samples alone."""

    def shape(self, experience):
        experience.advantages = torch.zeros_like(experience.advantages)
        experience.gate = torch.tensor(self.weights, dtype=torch.float64)


def test_a_gate_weighs_each_samples_penalty(sd3):
    algorithm, experience = prepared(sd3, kl_weight=0.3)
    algorithm.__class__ = Gated
    found = []
    for weights in ([1, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]):
        algorithm.weights = weights
        algorithm.judge(experience, World())
        found.append(gradient_of(algorithm, algorithm.parts(experience, 0))[0])
    both = {name: found[0][name] + found[1][name] for name in found[0]}
    assert relative_error(both, found[2]) < 1e-9
    assert 0.01 < relative_error(found[0], found[2]) < 2


def test_long_predictions_cost_where_norm_weight_says_so(sd3):
    gardo = {"gate": None, "diversity": None, "kl_weight": 0.0, "norm_weight": 0.7, "reference": None}
    algorithm, experience = prepared(sd3, gardo=gardo)
    parts = list(algorithm.parts(experience, 0))
    moved(sd3, 0.2, 3)
    with_it, sums = gradient_of(algorithm, parts)
    algorithm.norm_weight = 0.0
    without, plain = gradient_of(algorithm, parts)
    here = {n: p.detach().clone() for n, p in sd3.trainable_parameters.items()}
    inputs = [(part, call) for part in parts for call in experience.calls]
    seen = [(experience.latent(call, part), sd3.schedule(T)[call]) for part, call in inputs]
    branches = [experience.batches.conditioning(part.places).positive for part, _ in inputs]
    put(sd3, sd3.at_first)
    with torch.no_grad():
        first = [sd3.predict(x, step, branch) for (x, step), branch in zip(seen, branches)]
    put(sd3, here)
    penalty, total = 0.0, sum(len(part.places) for part in parts) * len(experience.calls)
    for (x, step), branch, reference in zip(seen, branches, first):
        ratio = sd3.predict(x, step, branch).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
        penalty = penalty + 0.7 * (ratio - 1).clamp(min=0).sum() / total
    assert float(penalty.detach()) > 0
    assert relative_error({n: with_it[n] - without[n] for n in with_it}, autograd_of(sd3, penalty)) < 1e-8
    assert sums["loss"] - plain["loss"] == pytest.approx(float(penalty.detach()))


@pytest.mark.parametrize("host", [False, True])
def test_copies_come_and_go_by_value(host):
    weights = {"w": torch.nn.Parameter(torch.tensor([1.0, 2.0])), "v": torch.nn.Parameter(torch.tensor([0.1]))}
    copies = Copies(weights, ("reference", "old"), host)
    addresses = [p.data_ptr() for p in weights.values()]
    with torch.no_grad():
        weights["w"].add_(0.3)
    now = weights["w"].detach().clone()
    with pytest.raises(ZeroDivisionError), copies.applied("reference"):
        assert weights["w"].tolist() == [1.0, 2.0]
        raise ZeroDivisionError
    assert torch.equal(weights["w"], now) and [p.data_ptr() for p in weights.values()] == addresses
    copies.take("old")
    assert torch.equal(copies.tensors["old"]["w"], now) and copies.tensors["reference"]["w"].tolist() == [1.0, 2.0]
    other = Copies(weights, ("reference", "old"), host)
    other.load(copies.tensors)
    assert other.tensors["reference"]["w"].tolist() == [1.0, 2.0]


def test_a_distilled_model_is_warned_about():
    backbone = ToyFlow(Shift(), -0.4, 4)
    make = lambda: FlowGRPO(backbone, Brightness(), Settings(), 4)  # noqa: E731
    assert not make().notes
    backbone.usual_sampling = (4, 1.0)
    assert says("ToyFlow", 4, "distilled").search(make().notes[0])


class Shift(torch.nn.Module):
    """A flow's velocity k x + theta."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))


def test_the_policy_gradient_of_a_toy_flow_is_the_analytic_one():
    """Reward x_0; dE[x_0]/dtheta is a product of scalars. 4 standard errors of 64 independent parts' mean."""
    slope, group, size = -0.4, 256, 32
    backbone = ToyFlow(Shift(), slope, steps := 4)
    settings = Settings(timestep_fraction=1.0, advantage_std="none", advantage_clip=None, kl_weight=0.0,
                        log_prob="sum", clip=0.5)  # fmt: skip
    reward = SimpleNamespace(differentiable=False, elsewhere=False, score_parts=lambda x, prompts: (x[:, 0], {}))
    algorithm = FlowGRPO(backbone, reward, settings, steps)
    data = DataSettings(prompts="x", batch_size=size, group_size=group, prompts_per_iteration=8)
    source = PromptBatches(data, PROMPTS, SEED)
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings())
    experience = algorithm.collect(source(backbone, encoded, 0))
    algorithm.judge(experience, World())
    parts = algorithm.parts(experience, 0)
    found = []
    for part in parts:
        (gradient,) = gradient_of(algorithm, [part])[0].values()
        found.append(float(gradient) * len(parts))
    found = torch.tensor(found, dtype=torch.float64)
    wanted = 0.0
    for step in algorithm.drawing:
        wanted = wanted * (step.a + step.b * slope) + step.b
    # The baseline holds the sample itself, and the loss is a mean over the calls.
    wanted = -wanted * (1 - 1 / group) / steps
    error = float(found.std() / len(found) ** 0.5)
    assert error < 0.1 * abs(wanted)
    assert abs(float(found.mean()) - wanted) < 4 * error
