"""Running statistics stay as they are inside the block; normalisation, gradients and nesting are as without it."""

import copy

import pytest
import torch
from torch import nn

from rsaft_fast.optim import SAMAdamW, frozen_batch_norm_statistics

LAYERS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "BatchNorm3d": lambda: nn.BatchNorm3d(3, affine=False),
    "cumulative average": lambda: nn.BatchNorm2d(3, momentum=None),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(3, track_running_stats=True, affine=True),
    "without statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "InstanceNorm without statistics": lambda: nn.InstanceNorm2d(3),
}


def an_input(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dims = 3 if "3d" in type(layer).__name__ else 1 if "1d" in type(layer).__name__ else 2
    return torch.randn(4, 3, *[5] * dims, generator=generator) * 2 + 1


def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(params=LAYERS)
def layer(request):
    layer = LAYERS[request.param]()
    layer(an_input(layer, seed=9))  # statistics that are not the initial ones
    return layer


def test_outputs_and_gradients_are_the_same_and_statistics_are_left(layer):
    free, frozen = layer, copy.deepcopy(layer)
    x, y = (an_input(layer).requires_grad_() for _ in range(2))
    expected = free(x)
    expected.pow(3).sum().backward()
    before = buffers(frozen)
    with frozen_batch_norm_statistics(frozen):
        out = frozen(y)
    out.pow(3).sum().backward()  # after the block, as well
    assert torch.equal(out, expected) and torch.equal(x.grad, y.grad)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(free.parameters(), frozen.parameters()))
    assert same(buffers(frozen), before)
    if before:
        assert not same(buffers(free), before)  # the block is what made the difference
    frozen(an_input(layer))
    assert same(buffers(frozen), buffers(free))  # and afterwards they move as ever


def test_a_batch_that_is_not_finite_leaves_no_trace(layer):
    before = buffers(layer)
    with frozen_batch_norm_statistics(layer):
        layer(torch.full_like(an_input(layer), float("inf")))
    assert same(buffers(layer), before)


def test_evaluation_mode_uses_the_running_statistics(layer):
    layer.eval()
    expected = layer(an_input(layer))
    with frozen_batch_norm_statistics(layer):
        assert torch.equal(layer(an_input(layer)), expected)


def test_an_exception_and_nesting(layer):
    def moves():
        before = buffers(layer)
        layer(an_input(layer))
        return not same(buffers(layer), before)

    tracks = bool(buffers(layer))
    with pytest.raises(KeyError), frozen_batch_norm_statistics(layer):
        raise KeyError
    assert moves() is tracks
    with frozen_batch_norm_statistics(nn.Sequential(layer)):
        with frozen_batch_norm_statistics(layer):
            pass
        assert not moves()
    assert moves() is tracks


def test_layers_in_evaluation_mode_are_not_woken():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].eval()
    before = buffers(model[0])
    with frozen_batch_norm_statistics(model):
        model(an_input(model))
    model(an_input(model))
    assert same(buffers(model[0]), before) and model[0].track_running_stats


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))


def test_a_sharp_step_leaves_the_statistics_of_one_plain_forward():
    model, witness = convolutions(), convolutions()
    opt = SAMAdamW(model.parameters(), lr=0.01, rho=0.5)
    for seed in range(3):
        x = an_input(model, seed)
        witness.load_state_dict(model.state_dict())
        witness(x)
        model(x).pow(2).mean().backward()
        with opt.perturbed(zero_grad=True), frozen_batch_norm_statistics(model):
            model(x).pow(2).mean().backward()
            opt.step()
        opt.zero_grad()
        assert same(buffers(model), buffers(witness))
    assert model[1].num_batches_tracked == 3


def test_a_compiled_model_is_compiled_for_both_passes_and_no_more():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, plain = convolutions(), convolutions()
    compiled = torch.compile(model, backend=counting)
    counts = []
    for seed in range(4):
        x = an_input(model, seed)
        for net in (compiled, plain):
            net(x).sum().backward()
            with frozen_batch_norm_statistics(net):
                net(x).sum().backward()
        counts.append(len(graphs))
    assert counts == [2] * 4
    assert model[1].num_batches_tracked == 4 and same(buffers(model), buffers(plain))
