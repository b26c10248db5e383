"""Checkpointed modules: the same bits, fewer bytes, in eval() as in train(), and undone without trace."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from builders.backbones import FAMILIES, make_backbone, noise_source
from builders.pipelines import tiny_sd15
from diffusers import AutoencoderKL
from torch import nn

from rsaft_fast.memory import checkpoint_calls, checkpoint_denoiser, checkpoint_vae_decoder, saved_tensor_bytes


def tower(depth: int = 6, width: int = 32, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))
        for _ in range(depth)
    ]
    return nn.Sequential(*layers)


def gradients(module, x, *args):
    """Output, gradient of input and parameters, and bytes kept for the backward pass."""
    x = x.clone().requires_grad_()
    with saved_tensor_bytes(module.parameters()) as saved:
        out = module(x, *args)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)], saved.peak


@pytest.mark.parametrize("training", [False, True])
def test_bits_are_equal_and_bytes_fewer(training):
    module, x = tower().train(training), torch.randn(16, 32)
    plain, plain_bytes = gradients(module, x)
    with checkpoint_calls(module):
        checked, checked_bytes = gradients(module, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, checked))
    # Left are the seven tensors between and after the layers, 16 x 32 each, in fp32.
    assert checked_bytes <= 7 * 16 * 32 * 4 < plain_bytes / 5


def test_the_backward_pass_recomputes_each_layer_once():
    module, calls = tower(3).eval(), []
    for index, layer in enumerate(module):
        layer[0].register_forward_hook(lambda *_, index=index: calls.append(index))
    with checkpoint_calls(module):
        out = module(torch.randn(2, 32, requires_grad=True))
        out.sum().backward()
    assert calls == [0, 1, 2, 2, 1, 0]


def test_nothing_is_recomputed_without_grad():
    module, calls = tower(2).eval(), []
    module[0][0].register_forward_hook(lambda *_: calls.append(1))
    with checkpoint_calls(module), torch.no_grad():
        out = module(torch.randn(2, 32))
    assert len(calls) == 1 and not out.requires_grad


def test_dropout_replays_in_training():
    module, x = tower(dropout=0.5).train(), torch.randn(16, 32)
    torch.manual_seed(7)
    plain, _ = gradients(module, x)
    torch.manual_seed(7)
    with checkpoint_calls(module):
        checked, _ = gradients(module, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, checked))


def test_removal_leaves_the_module_as_it_was():
    module = tower(2)
    before = [dict(m.__dict__) for m in module.modules()]
    names = list(module.state_dict())
    handle = checkpoint_calls(module)
    assert list(module.state_dict()) == names
    again = checkpoint_calls(module)
    again.remove()
    assert all("forward" in m.__dict__ for m in module)
    handle.remove()
    handle.remove()
    assert [m.__dict__.keys() for m in module.modules()] == [d.keys() for d in before]


def test_a_forward_that_somebody_replaced_is_kept():
    module = tower(1)
    module[0].forward = lambda x: 3 * x
    x = torch.randn(2, 32, requires_grad=True)
    with checkpoint_calls(module):
        assert torch.equal(module(x), 3 * x)
    assert torch.equal(module(x), 3 * x)


def test_a_deep_copy_computes_with_its_own_weights():
    module = tower(2).eval()
    checkpoint_calls(module)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x = torch.randn(2, 32, requires_grad=True)
    out = other(x)
    assert out.abs().sum() == 0
    out.sum().backward()
    assert all(p.grad is None for p in module.parameters())
    assert other[1][3].bias.grad is not None


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return tiny_sd15(tmp_path_factory.mktemp("sd15"))


def test_vae_decoder(sd15):
    vae = AutoencoderKL.from_pretrained(sd15, subfolder="vae").eval().requires_grad_(False)
    latents = torch.randn(2, vae.config.latent_channels, 8, 8)
    results = {}
    for checked in (False, True):
        handle = checkpoint_vae_decoder(vae) if checked else checkpoint_calls([])
        x = latents.clone().requires_grad_()
        with handle, saved_tensor_bytes(vae.parameters()) as saved:
            images = vae.decode(x).sample
        results[checked] = (images.detach(), *torch.autograd.grad(images.square().sum(), x), saved.peak)
    assert all(torch.equal(a, b) for a, b in zip(results[False][:2], results[True][:2]))
    # The tiny decoder's last norm and activation, outside any resnet, are a good part of what is left.
    assert results[True][2] < 0.6 * results[False][2]
    attentions = [m for m in vae.decoder.mid_block.attentions if m is not None]
    with checkpoint_vae_decoder(vae) as handle:
        resnets = [r for block in [vae.decoder.mid_block, *vae.decoder.up_blocks] for r in block.resnets]
        assert set(handle.modules) == {*resnets, *attentions} and resnets


@pytest.mark.parametrize("family", FAMILIES)
def test_denoisers_own_checkpointing_acts_under_eval(family, tmp_path):
    backbone = make_backbone(family, tmp_path, train="full")
    denoiser, step = backbone.denoiser, backbone.schedule(4)[1]
    branch = backbone.random_conditioning(2).positive
    x = backbone.initial_latents(noise_source(2))
    results = {}
    for checked in (False, True, "off again"):
        checkpoint_denoiser(denoiser, enabled=checked is True)
        with saved_tensor_bytes(denoiser.parameters()) as saved:
            out = backbone.predict(x, step, branch)
        # What the last block makes of the text is read by nobody in Qwen-Image: zeros.
        gradients = torch.autograd.grad(out.square().sum(), list(denoiser.parameters()), materialize_grads=True)
        results[checked] = (gradients, saved.peak)
        del out
        gc.collect()
        assert saved.alive == 0
    assert all(torch.equal(a, b) for a, b in zip(results[False][0], results[True][0]))
    assert results[True][1] < results[False][1] / 2
    assert results["off again"][1] == results[False][1]
