"""Attention kernels: of one model alone, really used, and refused with the way out where they do not run."""

import sys
import types

import pytest
import torch
from builders.backbones import (
    FAMILIES,
    clear_gradients,
    gradients,
    make_backbone,
    noise_source,
    relative_error,
)
from builders.messages import says
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from rsaft_fast.errors import UserError
from rsaft_fast.memory import checkpoint_denoiser
from rsaft_fast.speed import attention
from rsaft_fast.speed.attention import check_attention, set_attention
from rsaft_fast.speed.regional import compile_blocks, repeated_blocks

CPU = torch.device("cpu")


def predict(backbone) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    clear_gradients(backbone)
    conditioning = backbone.random_conditioning(2)
    out = backbone.predict(backbone.initial_latents(noise_source(2)), backbone.schedule(4)[1], conditioning.positive)
    out.square().sum().backward()
    return out.detach(), gradients(backbone)


def kernels_of(call) -> set[str]:
    """Names of the attention operations that run."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return {event.key for event in seen.key_averages() if "attention" in event.key}


def by_hand(query, key, value):
    """Softmax attention of (B, L, H, D) written out, in place of a package's kernel."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def package(monkeypatch):
    """xformers as a module that computes by hand and counts; its library does not load without a GPU."""
    calls = []
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = lambda q, k, v: calls.append(q.shape) or by_hand(q, k, v)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_packages_kernel_attends_in_every_layer_and_nowhere_else(family, checkpointed, tmp_path, package):
    """diffusers' own setting reaches FLUX.1 alone."""
    if family == "zimage":
        with pytest.raises(UserError, match=says("speed.attention", "xformers", "mask", "efficient", "auto")):
            set_attention(make_backbone(family, tmp_path).denoiser, "xformers")
        return
    backbone, other = (make_backbone(family, tmp_path / name) for name in ("a", "b"))
    before, default = predict(backbone), _AttentionBackendRegistry.get_active_backend()
    if checkpointed:
        checkpoint_denoiser(backbone.denoiser)
    set_attention(backbone.denoiser, "xformers")
    package.clear()
    assert not any("scaled_dot_product" in name for name in kernels_of(lambda: predict(backbone)))
    layers = sum(
        isinstance(m, attention.Attention | attention.AttentionModuleMixin) for m in backbone.denoiser.modules()
    )
    recomputed = 2 if checkpointed else 1
    assert layers <= len(package) <= recomputed * layers and (not checkpointed or len(package) > layers)
    after = predict(backbone)
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-5)
    assert relative_error(after[1], before[1]) < 1e-4
    package.clear()
    predict(other)
    backbone.decode(backbone.initial_latents(noise_source(1)))
    assert not package and _AttentionBackendRegistry.get_active_backend() == default


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_torchs_own_kernels_are_chosen_by_name(family, tmp_path):
    backbone = make_backbone(family, tmp_path)
    before = predict(backbone)
    set_attention(backbone.denoiser, "flash")
    assert any("flash" in name for name in kernels_of(lambda: predict(backbone)))
    after = predict(backbone)
    assert torch.equal(after[0], before[0]) and relative_error(after[1], before[1]) < 1e-6


def test_sdpa_is_torchs_choice_whatever_diffusers_default_is(tmp_path, monkeypatch):
    backbone = make_backbone("flux", tmp_path)
    before = predict(backbone)[0]
    set_attention(backbone.denoiser, "sdpa")
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", "nonsense")
    assert torch.equal(predict(backbone)[0], before)


@pytest.mark.parametrize("name", ["cudnn", "efficient", "xformers", "flash3"])
def test_kernels_that_do_not_run_here_are_refused_with_the_way_out(name):
    if name == "xformers":
        sys.modules.pop("xformers", None)
    with pytest.raises(UserError, match=says("speed.attention", name, "cpu in float32 at 64", "speed.attention=auto")):
        check_attention(name, CPU, torch.float32)


def test_a_head_size_that_the_kernel_does_not_take_is_found_at_the_model(tmp_path, package, monkeypatch):
    def picky(query, key, value):
        if query.shape[-1] % 64:
            raise ValueError("head size must be a multiple of 64")
        return by_hand(query, key, value)

    monkeypatch.setitem(attention.PACKAGES, "xformers", picky)
    check_attention("xformers", CPU, torch.float32)
    with pytest.raises(UserError, match=says("speed.attention", "xformers", 8, "multiple of 64")):
        set_attention(make_backbone("flux", tmp_path).denoiser, "xformers")


def test_a_mask_is_refused_by_kernels_that_would_ignore_it(package):
    q = torch.zeros(1, 2, 4, 8)
    with (
        attention._with_kernel("xformers")(),
        pytest.raises(NotImplementedError, match=says("mask", "speed.attention=auto")),
    ):
        functional.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(4, 4, dtype=torch.bool))


@pytest.mark.slow
def test_a_named_kernel_inside_compiled_blocks(tmp_path):
    backbone = make_backbone("sdxl", tmp_path)
    truth = predict(backbone)
    set_attention(backbone.denoiser, "flash")
    torch._dynamo.reset()
    compile_blocks(repeated_blocks(backbone.denoiser), with_gradient=True, backend="aot_eager")
    assert any("flash" in name for name in kernels_of(lambda: predict(backbone)))
    ours = predict(backbone)
    torch.testing.assert_close(ours[0], truth[0], rtol=1e-5, atol=1e-5)
    assert relative_error(ours[1], truth[1]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_gpu(family, name, tmp_path):
    backbone = make_backbone(family, tmp_path, device="cuda", dtype=torch.bfloat16)
    before = predict(backbone)
    try:
        set_attention(backbone.denoiser, name)
    except UserError as error:  # the tiny models' heads are odd; what is refused must say so
        assert "speed.attention=auto" in str(error)
        return
    after = predict(backbone)
    assert (after[0] - before[0]).abs().max() <= 0.05 * before[0].abs().max()
    assert relative_error(after[1], before[1]) < 0.1
