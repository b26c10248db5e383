"""Qwen-Image's 3-D causal decoder in 2-D row strips, against diffusers' own: images, gradients, and what is kept."""

from __future__ import annotations

import pytest
import torch
from builders.pipelines import tiny_causal_vae
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageUpsample
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rsaft_fast.estimate.live import LiveBytes, shapes_alone
from rsaft_fast.memory import checkpoint_vae_decoder, decode_in_strips
from rsaft_fast.memory.strips import STRIP_ELEMENTS

GIB = 2**30


def make_vae(seed=0, **config) -> AutoencoderKLQwenImage:
    torch.manual_seed(seed)
    vae = tiny_causal_vae(**config).double().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return vae


VAES = {
    "as it is": make_vae(),
    "three doublings, two in time": make_vae(
        base_dim=2, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    ),
    "one resolution": make_vae(dim_mult=[2], temperal_downsample=[]),
}


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """diffusers' upsampling rounds float64 to fp32 on its way; the truth must not."""
    monkeypatch.setattr(QwenImageUpsample, "forward", nn.Upsample.forward)


def decoded(vae, latents, cotangent=None):
    """Images of one frame, and the gradient at the latents."""
    x = latents.clone().requires_grad_()
    images = vae.decoder(x.unsqueeze(2)).squeeze(2)
    if cotangent is None:
        cotangent = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images.detach(), torch.autograd.grad(images, x, cotangent.to(images.dtype))[0]


def relative_error(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def assert_close(found, truth, tolerance):
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < tolerance


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(list(VAES)),
    batch=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    strip_elements=st.sampled_from([1, 100, 333, 1000, STRIP_ELEMENTS]),
    seed=st.integers(0, 2**31),
)
def test_images_and_gradients_are_those_of_diffusers(name, batch, height, width, strip_elements, seed):
    vae = VAES[name]
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64)
    truth = decoded(vae, latents)
    with decode_in_strips(vae, strip_elements):
        found = decoded(vae, latents)
        with torch.no_grad():
            assert torch.equal(vae.decoder(latents.unsqueeze(2)).squeeze(2), found[0])
    # Pixels of two channels can be short, and their norm's gradient is divided by their length: rounding grows there.
    assert_close(found, truth, 1e-9)


def test_pixels_of_no_length_have_the_gradient_of_diffusers():
    """Where all channels are zero the norm divides by its least length."""
    vae = make_vae(dim_mult=[2], temperal_downsample=[])
    for conv in (vae.decoder.conv_in, vae.decoder.mid_block.resnets[0].conv1):
        conv.bias.zero_()
    latents = torch.randn(1, 4, 5, 4, dtype=torch.float64)
    latents[:, :, :3] = 0
    truth = decoded(vae, latents)
    with decode_in_strips(vae, 50):
        assert_close(decoded(vae, latents), truth, 1e-10)


def test_in_fp32_and_bf16_they_are_those_of_the_plain_decoder_to_rounding(monkeypatch):
    monkeypatch.undo()
    vae, latents = make_vae(base_dim=4), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    truth = decoded(vae, latents)
    for dtype in (torch.float32, torch.bfloat16):
        low = make_vae(base_dim=4).to(dtype)
        plain = decoded(low, latents.to(dtype))
        with decode_in_strips(low, 333):
            found = decoded(low, latents.to(dtype))
        for ours, theirs, exact in zip(found, plain, truth, strict=True):
            assert ours.dtype == dtype
            # How far convolutions round depends on the processor.
            assert relative_error(ours, exact) < 2 * relative_error(theirs, exact)


def test_several_frames_and_a_cache_are_left_to_the_plain_decoder():
    vae = VAES["as it is"]
    frames = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64)
    truth = vae.decode(frames).sample, vae.decoder(frames)
    one = frames[:, :, :1]
    assert torch.equal(vae.decode(one).sample, vae.decoder(vae.post_quant_conv(one)).clamp(-1, 1))
    with decode_in_strips(vae, 100):
        assert torch.equal(vae.decode(frames).sample, truth[0]) and torch.equal(vae.decoder(frames), truth[1])


def add_a_hook(vae):
    vae.decoder.up_blocks[0].resnets[0].register_forward_hook(lambda module, inputs, out: 0.5 * out)


def change_an_activation(vae):
    vae.decoder.mid_block.resnets[1].nonlinearity = nn.Tanh()


def change_the_tail(vae):
    vae.decoder.nonlinearity = nn.Tanh()


def replace_a_layer(vae):
    vae.decoder.up_blocks[1].resnets[0].conv1 = (
        nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1)).double().requires_grad_(False)
    )
    forward = type(vae.decoder.up_blocks[1].resnets[0].conv1).forward
    conv = vae.decoder.up_blocks[1].resnets[0].conv1
    conv.forward = lambda x, cache=None: forward(conv, x)


@pytest.mark.parametrize("change", [add_a_hook, change_an_activation, change_the_tail, replace_a_layer])
def test_what_is_not_as_expected_runs_as_it_is(change):
    vae, latents = make_vae(seed=5), torch.randn(2, 4, 3, 4, dtype=torch.float64)
    untouched = decoded(vae, latents)
    change(vae)
    truth = decoded(vae, latents)
    assert relative_error(truth[0], untouched[0]) > 1e-6
    with decode_in_strips(vae, 100):
        assert_close(decoded(vae, latents), truth, 1e-10)


def test_checkpointing_a_layer_keeps_the_bits():
    vae, latents = VAES["as it is"], torch.randn(2, 4, 3, 4, dtype=torch.float64)
    truth = decoded(vae, latents)
    with checkpoint_vae_decoder(vae) as handle:
        assert len(handle.modules) == sum("Residual" in type(m).__name__ for m in vae.decoder.modules()) + 1
        found = decoded(vae, latents)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, truth))


def kept(vae, size: int) -> tuple[float, float]:
    """GiB that one decode keeps for its backward pass, and at its peak, backward included."""
    live = LiveBytes("meta")
    live.see(vae.parameters())
    with shapes_alone(), live:
        x = torch.empty(1, 16, 1, size // 8, size // 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
        before = live.alive
        images = vae.decoder(x)
        alive = live.alive - before
        images.backward(torch.empty_like(images))
    return alive / GIB, (live.peak - before) / GIB


def test_a_real_decode_keeps_little():
    """The published VAE at 1024x1024 in bf16; diffusers' own decoder keeps 14.35 GiB, measured apart from this code."""
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage().bfloat16().eval().requires_grad_(False)
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    plain = kept(vae, 1024)
    assert plain[0] == pytest.approx(14.35, rel=0.01)
    with checkpoint_vae_decoder(vae):
        layers = kept(vae, 1024)
    with decode_in_strips(vae):
        strips = kept(vae, 1024)
    print(f"kept and peak, GiB: plain {plain}, by layers {layers}, in strips {strips}")
    assert strips[0] < 1.0 and strips[1] < 2.0 and strips[1] < layers[1] < plain[1]
