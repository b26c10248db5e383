"""The hand-walked adjoint is autograd through the whole unrolled chain."""

import re
from collections import Counter

import numpy as np
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
    noise_source,
    relative_error,
)
from builders.messages import says

from rsaft_fast.backbones import SD3, SD15, Conditioning, FLUX2Klein, Krea2, QwenImage, ZImage
from rsaft_fast.backbones.flow import FlowBackbone
from rsaft_fast.errors import UserError
from rsaft_fast.memory.accounting import saved_tensor_bytes
from rsaft_fast.methods import AlignProp, DRaFT, DRaFTLV, DRTune, ReFL
from rsaft_fast.sampling import GradientPlan, backpropagate, rollout

T = 6
METHODS = {
    "refl": ReFL(window=(0.3, 1.0)),
    "draft-1": DRaFT(k=1),
    "draft-4": DRaFT(k=4),
    "draft_lv": DRaFTLV(n_extra=2),
    "alignprop": AlignProp(mean=0.5),
    "drtune": DRTune(k=3),
}


def unrolled_endpoints(backbone, schedule, plan, x, conditioning, noise):
    """The chain of a plan as one differentiable expression: a second derivation, with detach where the plan says so."""

    def predict(x, i, graded, through):
        seen = x if through else x.detach()
        with torch.set_grad_enabled(graded):
            f = backbone.predict(seen, schedule[i], conditioning.positive)
            if conditioning.negative is not None and plan.uncond != "none":
                f_u = backbone.predict(seen, schedule[i], conditioning.negative)
                if plan.uncond == "detached":
                    f_u = f_u.detach()
                f = combined(backbone, f, f_u, conditioning.guidance_scale)
        return f if graded else f.detach()

    def update(x, f, i, x0, key):
        s = schedule[i]
        if x0:
            return s.x0_a * x + s.x0_b * f
        out = s.a * x + s.b * f
        return out + s.c * noise.draw("ancestral", x.shape[1:], key, x.dtype) if s.c else out

    for i in range(plan.last + 1):
        f = predict(x, i, i in plan.graded, i in plan.through)
        x = update(x, f, i, i == plan.last and plan.finish == "x0", i)
    endpoints = [x]
    for i, key in plan.renoise:
        s = schedule[i]
        noised = s.alpha * x.detach() + s.sigma * noise.draw("renoise", x.shape[1:], key, x.dtype)
        f = predict(noised, i, True, False)
        endpoints.append(update(noised, f, i, plan.finish == "x0", plan.num_steps + key))
    return endpoints


def check_against_autograd(backbone, schedule, plan, conditioning, seed):
    """Gradients and endpoints of one rollout, for adjoints drawn at random."""
    noise = noise_source(2, seed)
    latents = backbone.initial_latents(noise)
    assert latents.dtype == torch.float64

    clear_gradients(backbone)
    expected = unrolled_endpoints(backbone, schedule, plan, latents, conditioning, noise)
    generator = torch.Generator().manual_seed(seed)
    adjoints = [torch.randn(latents.shape, generator=generator, dtype=torch.float64) for _ in expected]
    torch.autograd.backward(expected, adjoints)
    truth = gradients(backbone)
    assert sum(t.abs().sum() for t in truth.values()) > 0

    clear_gradients(backbone)
    trajectory = rollout(backbone, schedule, plan, latents, conditioning, noise)
    for ours, theirs in zip(trajectory.endpoints, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    backpropagate(backbone, trajectory, adjoints)
    assert relative_error(gradients(backbone), truth) < 1e-9


@pytest.mark.parametrize("uncond", ["graded", "detached", "none"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", METHODS)
def test_backpropagate_equals_autograd(backbone64, name, guidance, uncond):
    if guidance == 1.0 and uncond != "graded":
        pytest.skip("without a negative branch all three are the same")
    backbone, eta = backbone64, 0.0 if isinstance(backbone64, FlowBackbone) else 1.0
    # SDXL and FLUX.1 add their `predict`: guidance off, and eta 0, are the samplers' and are tried with the first.
    first_of_its_sampler = isinstance(backbone, (SD15, SD3, FLUX2Klein, ZImage, QwenImage))
    if not first_of_its_sampler and (guidance == 1.0 or uncond == "none"):
        pytest.skip("tried with the first backbone of this sampler")
    for seed in (0, 1) if isinstance(backbone, SD15) else (1,):  # eta 0 and 1
        method = METHODS[name].model_copy(update={"uncond": uncond})
        plan = method.draw(T, np.random.default_rng(seed))
        schedule = backbone.schedule(T, eta=eta * seed)
        conditioning = backbone.encode(PROMPTS[:2], "blurry", **cfg(backbone, guidance))
        check_against_autograd(backbone, schedule, plan, conditioning, seed)


@pytest.mark.parametrize("uncond", ["graded", "detached", "none"])
@pytest.mark.parametrize("name", ["draft_lv", "drtune"])
def test_backpropagate_equals_autograd_with_the_branches_in_one_call(backbone64, name, uncond, monkeypatch):
    backbone, seed = backbone64, int(np.random.default_rng().integers(1000))
    monkeypatch.setattr(backbone, "cfg_batching", "batched")
    plan = METHODS[name].model_copy(update={"uncond": uncond}).draw(T, np.random.default_rng(seed))
    schedule = backbone.schedule(T, eta=0.0 if isinstance(backbone, FlowBackbone) else 0.5)
    conditioning = backbone.encode(PROMPTS[:2], "blurry", **cfg(backbone, 4.0))
    check_against_autograd(backbone, schedule, plan, conditioning, seed)


def counted_calls(backbone, monkeypatch) -> list[tuple[int, bool]]:
    """Rows of every network call from now on, and whether it built a graph."""
    calls, forward = [], backbone.denoiser.forward

    def counting(*args, **kwargs):
        out = forward(*args, **kwargs)
        calls.append((len(out[0]), out[0].requires_grad))
        return out

    monkeypatch.setattr(backbone.denoiser, "forward", counting)
    return calls


@pytest.mark.parametrize(
    ("batching", "uncond", "expected"),
    [
        ("separate", "graded", {(2, False): 2 * T, (2, True): 2 * 3}),
        ("rollout", "graded", {(4, False): T, (2, True): 2 * 3}),
        ("batched", "graded", {(4, False): T, (4, True): 3}),
        ("batched", "detached", {(4, False): T, (2, True): 3}),
        ("batched", "none", {(2, False): T, (2, True): 3}),
    ],
)
def test_network_calls_of_guided_sampling(tmp_path, monkeypatch, batching, uncond, expected):
    """In a detached branch's graded call there is no unconditional half: neither in the graph nor computed."""
    backbone = make_backbone("sd15", tmp_path)
    backbone.cfg_batching = batching
    plan = DRaFT(k=3, uncond=uncond).draw(T, np.random.default_rng(0))
    conditioning = backbone.encode(PROMPTS[:2], "blurry", guidance_scale=4.0)
    noise = noise_source(2)
    calls = counted_calls(backbone, monkeypatch)
    trajectory = rollout(backbone, backbone.schedule(T), plan, backbone.initial_latents(noise), conditioning, noise)
    backpropagate(backbone, trajectory, [torch.ones_like(trajectory.endpoints[0])])
    assert Counter(calls) == expected


@pytest.mark.parametrize(
    ("batching", "uncond", "expected"),
    [
        ("separate", "graded", {(2, False): 2 * T + 3, (2, True): 2 * 3}),
        ("separate", "detached", {(2, False): 2 * T + 3, (2, True): 3}),
        ("batched", "graded", {(4, False): T, (4, True): 3}),
        ("batched", "detached", {(4, False): T, (2, False): 3, (2, True): 3}),
        ("batched", "none", {(2, False): T, (2, True): 3}),
    ],
)
def test_network_calls_where_guidance_is_not_linear(tmp_path, monkeypatch, batching, uncond, expected):
    """The cotangents follow from both predictions: in separate branches the unconditional one is computed once more."""
    backbone = make_backbone("qwen", tmp_path)
    backbone.cfg_batching = batching
    plan = DRaFT(k=3, uncond=uncond).draw(T, np.random.default_rng(0))
    conditioning = backbone.encode(PROMPTS[:2], "blurry", guidance_scale=4.0)
    noise = noise_source(2)
    calls = counted_calls(backbone, monkeypatch)
    trajectory = rollout(backbone, backbone.schedule(T), plan, backbone.initial_latents(noise), conditioning, noise)
    backpropagate(backbone, trajectory, [torch.ones_like(trajectory.endpoints[0])])
    assert Counter(calls) == expected


def test_branches_that_cannot_share_a_call_are_refused(backbone64, monkeypatch):
    if isinstance(backbone64, ZImage | QwenImage | Krea2):
        pytest.skip("their texts have lengths of their own, and any can share a call")
    monkeypatch.setattr(backbone64, "cfg_batching", "rollout")
    both = backbone64.encode(PROMPTS[:2], "blurry", **cfg(backbone64, 4.0))
    shorter = {n: t[:, :-1] if n == "encoder_hidden_states" else t for n, t in both.negative.items()}
    plan = DRaFT().draw(2, np.random.default_rng(0))
    noise = noise_source(2)
    shapes = [str(tuple(n["encoder_hidden_states"].shape)) for n in (both.negative, shorter)]
    with pytest.raises(UserError, match=says(*shapes, "speed.cfg=separate")):
        rollout(
            backbone64,
            backbone64.schedule(2),
            plan,
            backbone64.initial_latents(noise),
            Conditioning(both.positive, shorter, both.guidance_scale),
            noise,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_backpropagate_equals_autograd_for_all_parameters(family, tmp_path):
    backbone = make_backbone(family, tmp_path, dtype=torch.float64, train="full")
    plan = DRaFT(k=2).draw(4, np.random.default_rng(0))
    conditioning = backbone.encode(PROMPTS[:2], "blurry", **cfg(backbone, 4.0))
    check_against_autograd(backbone, backbone.schedule(4), plan, conditioning, seed=0)
    untouched = [name for name, p in backbone.trainable_parameters.items() if p.grad is None]
    if family == "qwen":  # what the last block makes of the text is read by nobody
        untouched = [name for name in untouched if not re.match(r"transformer_blocks\.1\.(attn\.to_add|txt_mlp)", name)]
    assert not untouched, "every parameter of the denoiser is trained"


def test_alignprop_from_b_equals_draft_of_the_rest(backbone64):
    """AlignProp as published: the latent path keeps its graph, predictions before b are detached."""
    backbone, b = backbone64, 3
    schedule = backbone.schedule(T)
    conditioning = backbone.encode(PROMPTS[:2], **cfg(backbone, 3.0))
    noise = noise_source(2)
    x = latents = backbone.initial_latents(noise)
    clear_gradients(backbone)
    for i, s in enumerate(schedule):
        branches = (conditioning.positive, conditioning.negative)
        f = combined(backbone, *(backbone.predict(x, s, branch) for branch in branches), conditioning.guidance_scale)
        x = s.a * x + s.b * (f.detach() if i < b else f)
    adjoint = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.backward(adjoint)
    truth = gradients(backbone)

    clear_gradients(backbone)
    plan = DRaFT(k=T - b).draw(T, np.random.default_rng(0))
    backpropagate(backbone, rollout(backbone, schedule, plan, latents, conditioning, noise), [adjoint])
    assert relative_error(gradients(backbone), truth) < 1e-9
    drawn = {AlignProp().draw(50, np.random.default_rng(seed)) for seed in range(20)}
    assert drawn <= {DRaFT(k=k).draw(50, np.random.default_rng(0)) for k in range(1, 50)}


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peak_activation_memory_is_flat_in_k(family, train, tmp_path):
    backbone = make_backbone(family, tmp_path / family, train=train)
    schedule = backbone.schedule(8)
    conditioning = backbone.encode(PROMPTS[:2], **cfg(backbone, 3.0))
    peaks = {}
    for k in (1, 2, 8):
        noise = noise_source(2)
        plan = DRaFT(k=k).draw(8, np.random.default_rng(0))
        clear_gradients(backbone)
        with saved_tensor_bytes(ignore=list(backbone.denoiser.parameters())) as account:
            trajectory = rollout(backbone, schedule, plan, backbone.initial_latents(noise), conditioning, noise)
            backpropagate(backbone, trajectory, [torch.ones_like(trajectory.endpoints[0])])
        peaks[k] = account.peak
    assert peaks[1] > 40 * backbone.initial_latents(noise).nbytes
    assert peaks[8] == peaks[2]
    # With adapters, a call that is also differentiated by its input keeps what lies before the first adapter: a share
    # of these two-block networks that is far above a real one's, and of one call only.
    assert peaks[8] <= {"full": 1.0, "lora": 1.25}[train] * peaks[1], peaks


def test_graded_only_prefix_is_taken_from_the_first_pass(backbone64):
    schedule = backbone64.schedule(T)
    conditioning = backbone64.encode(PROMPTS[:2])
    noise = noise_source(2)
    plan = DRaFT(k=2).draw(T, np.random.default_rng(0))
    first = rollout(backbone64, schedule, plan, backbone64.initial_latents(noise), conditioning, noise)
    again = rollout(
        backbone64, schedule, plan, torch.full_like(first.endpoints[0], torch.nan), conditioning, noise, prefix=first
    )
    assert torch.equal(first.endpoints[0], again.endpoints[0])
    assert again.inputs.keys() == first.inputs.keys()


def test_noise_depends_on_the_sample_alone():
    whole = noise_source(4).draw("initial", (2, 3))
    parts = [noise_source(1, first=i).draw("initial", (2, 3)) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    different = [
        noise_source(4).draw("ancestral", (2, 3)),
        noise_source(4).draw("initial", (2, 3), key=1),
        noise_source(4, step=1).draw("initial", (2, 3)),
        noise_source(4, seed=4).draw("initial", (2, 3)),
    ]
    for other in different:
        assert not torch.isclose(whole, other).any()
    assert noise_source(0).draw("initial", (2, 3)).shape == (0, 2, 3)


def test_plans_that_make_no_sense_are_refused():
    good = dict(num_steps=4, last=3, finish="sampler", graded=(3,))
    GradientPlan(**good)
    for bad in (
        {"last": 4},
        {"graded": ()},
        {"graded": (3, 2)},
        {"graded": (4,)},
        {"through": (2,)},
        {"weights": (0.5,)},
        {"renoise": ((9, 0),), "weights": (0.5, 0.5)},
    ):
        with pytest.raises(UserError):
            GradientPlan(**{**good, **bad})
