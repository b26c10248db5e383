"""Denoisers under checkpointing: which blocks are kept, that bits stay, and that each kept block costs bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from builders.backbones import FAMILIES, make_backbone, noise_source
from builders.messages import says
from builders.recipes import config

from rsaft_fast.backbones import SD15, Krea2
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.estimate.suggestions import candidates, changed
from rsaft_fast.memory import checkpoint_denoiser, checkpoint_networks, denoiser_blocks, saved_tensor_bytes
from rsaft_fast.memory.decoder import StripForward
from rsaft_fast.phases import DENOISER
from rsaft_fast.recipe.check import check_settings
from rsaft_fast.train.inputs import check_config
from rsaft_fast.train.loaders import prepare_backbone


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request, tmp_path_factory):
    return make_backbone(request.param, tmp_path_factory.mktemp(request.param))


def graded_call(backbone):
    """Gradients of a call, and the bytes that it keeps for its backward pass."""
    parameters = list(backbone.trainable_parameters.values())
    with saved_tensor_bytes(backbone.denoiser.parameters()) as saved:
        out = backbone.predict(
            backbone.initial_latents(noise_source(2)), backbone.schedule(4)[1], backbone.random_conditioning(2).positive
        )
    kept = saved.alive
    # What the last block makes of the text is read by nobody in Qwen-Image: zeros.
    return torch.autograd.grad(out.square().sum(), parameters, materialize_grads=True), kept


def in_the_graph(backbone):
    """Blocks from the first one that is trained; a UNet's first resnets come before any adapter."""
    blocks = list(denoiser_blocks(backbone.denoiser))
    trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    return blocks[trained.index(True) :]


def test_blocks_are_those_that_diffusers_checkpoints_in_the_order_of_their_calls(backbone):
    called = []

    def record(block, *args):
        called.append(block)
        return block(*args)

    backbone.denoiser.enable_gradient_checkpointing(record)
    graded_call(backbone)
    backbone.denoiser.disable_gradient_checkpointing()
    assert called == list(denoiser_blocks(backbone.denoiser)) and called


def test_each_kept_block_costs_bytes_and_no_bit_changes(backbone):
    count = len(list(denoiser_blocks(backbone.denoiser)))
    checkpoint_denoiser(backbone.denoiser, enabled=False)
    plain, most = graded_call(backbone)
    kept_bytes = []
    for keep in range(count + 1):
        checkpoint_denoiser(backbone.denoiser, keep_blocks=keep)
        found, kept = graded_call(backbone)
        assert all(torch.equal(a, b) for a, b in zip(found, plain))
        kept_bytes.append(kept)
    assert kept_bytes == sorted(kept_bytes)
    # Of Krea-2 the blocks over the text are recomputed still.
    assert kept_bytes[-1] < most if isinstance(backbone, Krea2) else kept_bytes[-1] == most
    assert len(set(kept_bytes)) == 1 + len(in_the_graph(backbone))


def test_the_last_blocks_run_once_and_the_others_twice(backbone):
    blocks, calls = list(denoiser_blocks(backbone.denoiser)), []
    hooks = [block.register_forward_pre_hook(lambda module, _: calls.append(module)) for block in blocks]
    checkpoint_denoiser(backbone.denoiser, keep_blocks=2)
    graded_call(backbone)
    for hook in hooks:
        hook.remove()
    recomputed = in_the_graph(backbone)[:-2]
    assert [calls.count(block) for block in blocks] == [2 if block in recomputed else 1 for block in blocks]


def test_a_deep_copy_keeps_its_own_blocks(backbone):
    checkpoint_denoiser(backbone.denoiser, keep_blocks=1)
    other = copy.deepcopy(backbone.denoiser)
    functions = {m._gradient_checkpointing_func for m in other.modules() if hasattr(m, "gradient_checkpointing")}
    assert [f.kept for f in functions] == [[list(denoiser_blocks(other))[-1]]]


def test_more_blocks_than_there_are(backbone):
    count = len(list(denoiser_blocks(backbone.denoiser)))
    with pytest.raises(
        UserError, match=says("backbone.keep_blocks", count + 1, count, type(backbone.denoiser).__name__)
    ):
        checkpoint_networks(backbone.denoiser, backbone.pipeline.vae, ["denoiser"], keep_blocks=count + 1)


def test_a_recipe_applies_both(tiny, out):
    keys = {"backbone__checkpoint": ["denoiser", "decoder-strips"], "backbone__keep_blocks": 1}
    backbone = prepare_backbone(config(tiny, out, "sd3", **keys).backbone, torch.device("cpu"))
    assert type(backbone.pipeline.vae.decoder.forward) is StripForward
    assert backbone.denoiser._gradient_checkpointing_func.kept == [backbone.denoiser.transformer_blocks[-1]]


def test_the_estimate_sees_kept_blocks(tiny, out):
    none, both = (
        estimate(config(tiny, out, "sd3", backbone__checkpoint=["denoiser"], backbone__keep_blocks=keep)).phase(
            DENOISER
        )
        for keep in (0, 2)
    )
    assert none.own < both.own


@pytest.mark.parametrize(
    ("checkpoint", "keep_blocks", "first"),
    [
        ([], 0, {"backbone.checkpoint": ["decoder-strips"]}),
        (["denoiser", "decoder"], 0, {"backbone.checkpoint": ["denoiser", "decoder-strips"]}),
        (["denoiser", "decoder-strips"], 5, {"backbone.keep_blocks": 2}),
    ],
)
def test_what_is_suggested_first(tiny, out, checkpoint, keep_blocks, first):
    recipe = config(tiny, out, backbone__checkpoint=checkpoint, backbone__keep_blocks=keep_blocks)
    found = list(candidates(recipe))
    assert found[0] == first
    for keys in found:
        if {"backbone.checkpoint", "backbone.keep_blocks"} & set(keys):
            check_settings(changed(recipe, keys), SD15)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"backbone__keep_blocks": 1}, says("backbone.keep_blocks", 1, "backbone.checkpoint", "denoiser")),
        (
            {"backbone__checkpoint": ["decoder", "decoder-strips"]},
            says("backbone.checkpoint", "decoder", "decoder-strips"),
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused_before_anything_loads(tiny, out, keys, message):
    with pytest.raises(UserError, match=message):
        check_config(config(tiny, out, **keys))
