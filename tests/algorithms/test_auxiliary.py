"""Bi-LoRA's second adapter against the paper's equations 7 to 10, written out in plain torch in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from algorithms.test_ascent import Descent
from builders.messages import says
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from rsaft_fast.algorithms import AuxiliaryAdapter
from rsaft_fast.algorithms.auxiliary import AUXILIARY
from rsaft_fast.algorithms.base import At
from rsaft_fast.algorithms.update import update
from rsaft_fast.backbones.lora_linear import beside, keep_inputs
from rsaft_fast.errors import UserError
from rsaft_fast.optim import SAM, SAMAdamW
from rsaft_fast.smoothing.settings import ParameterSmoothing

RANK, SCALE, LR, UPDATES = 2, 1.5, 0.3, 6
WIDTHS = {"first": (5, 4), "second": (4, 3)}
INPUTS = torch.randn(UPDATES, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Network(nn.Module):
    """Two linear layers with peft's adapters, both sides drawn."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        for name, (columns, rows) in WIDTHS.items():
            self.add_module(name, nn.Linear(columns, rows, bias=False))
        self.requires_grad_(False)
        config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=list(WIDTHS))
        inject_adapter_in_model(config, self)
        generator = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data = (0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(dtype)
        keep_inputs(self)

    @property
    def trained(self):
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def loss(self, x):
        return self.second(torch.tanh(self.first(x))).sin().mean()


def make(settings, optimizer=None, dtype=torch.float64):
    net = Network(dtype)
    optimizer = optimizer(net.trained.values()) if optimizer else sgd(net.trained.values())
    return net, optimizer, AuxiliaryAdapter(settings, net, net.trained, SCALE, seed=5)


def sgd(parameters):
    return SAM(parameters, torch.optim.SGD, rho=0.1, lr=LR)


def adamw(parameters):
    return SAM(parameters, torch.optim.AdamW, rho=0.1, lr=LR, weight_decay=0.0)


def weights(tensors, layer):
    a, b = (tensors[f"{layer}.lora_{side}.default.weight"] for side in "AB")
    return SCALE * b @ a


def by_hand(net, second, rho, lr, rule):
    """Both adapters' matrices after each update, and the length that each pass was taken at."""
    frozen = {layer: getattr(net, layer).base_layer.weight.detach().clone() for layer in WIDTHS}
    first = {name: p.detach().clone() for name, p in net.trained.items()}
    second = {name: t.detach().clone() for name, t in second.items()}
    optimizers = [rule(list(first.values()), lr=LR), rule(list(second.values()), lr=lr, maximize=True)]
    seen = []
    for number in range(UPDATES):
        for t in (*first.values(), *second.values()):
            t.requires_grad_(True).grad = None
        w = {layer: frozen[layer] + weights(first, layer) + weights(second, layer) for layer in WIDTHS}
        length = torch.cat([weights(second, layer).flatten() for layer in WIDTHS]).norm().item()
        (torch.tanh(INPUTS[number] @ w["first"].T) @ w["second"].T).sin().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            c = torch.cat([weights(second, layer).flatten() for layer in WIDTHS]).norm()
            if c > rho:
                for t in second.values():
                    t.mul_((rho / c).sqrt())
        seen.append(({n: t.detach().clone() for n, t in (first | {}).items()}, copy.deepcopy(second), length))
    return seen


@pytest.mark.parametrize("auxiliary_lr", [None, 0.7])
@pytest.mark.parametrize("base", [sgd, adamw], ids=["sgd", "adamw"])
def test_one_pass_lowers_one_adapter_and_raises_the_other_within_its_ball(base, auxiliary_lr):
    rho = {sgd: 0.02, adamw: 1.2}[base]
    net, optimizer, ascent = make(ParameterSmoothing(direction="bi_lora", rho=rho, auxiliary_lr=auxiliary_lr), base)
    rule = {sgd: torch.optim.SGD, adamw: lambda ps, **keys: torch.optim.AdamW(ps, weight_decay=0.0, **keys)}[base]
    truth = by_hand(net, ascent.kept[AUXILIARY], rho, auxiliary_lr or LR, rule)
    algorithm, lengths = Descent(net, INPUTS), []
    for number, (first, second, length) in enumerate(truth):
        _, stats = update(algorithm, optimizer, [number], perturbs=True, ascent=ascent, number=number)
        assert stats["eps_norm"] == pytest.approx(length, rel=1e-9, abs=1e-12)
        lengths.append(stats["eps_norm"])
        for name, p in net.trained.items():
            torch.testing.assert_close(p.detach(), first[name], rtol=1e-9, atol=1e-12, msg=f"{number} {name}")
            ours = ascent.kept[AUXILIARY][name].detach()
            torch.testing.assert_close(
                ours, second[name].detach(), rtol=1e-9, atol=1e-12, msg=f"{number} second {name}"
            )
    assert lengths[0] == 0 and max(lengths) == pytest.approx(rho, rel=1e-9), "the ball's edge is reached"
    assert algorithm.asked == [At.PLAIN] * UPDATES, "no second pass"


def test_the_second_adapter_is_in_the_network_during_the_pass_alone():
    net, optimizer, ascent = make(ParameterSmoothing(direction="bi_lora", rho=0.5))
    for number in range(3):
        update(Descent(net, INPUTS), optimizer, [number], perturbs=True, ascent=ascent, number=number)
    alone = net.loss(INPUTS[0])
    with ascent.attached():
        assert not torch.equal(net.loss(INPUTS[0]), alone)
    assert torch.equal(net.loss(INPUTS[0]), alone)
    assert not any("second" in name and "auxiliary" in name for name, _ in net.named_parameters())
    before = [p.detach().clone() for p in net.trained.values()]
    kept = copy.deepcopy(ascent.kept)

    class Broken(Descent):
        def backward(self, part, at, check=lambda *tensors: None):
            raise KeyError("in the pass")

    with pytest.raises(KeyError):
        update(Broken(net, INPUTS), optimizer, [0], perturbs=True, ascent=ascent, number=3)
    assert all(torch.equal(p, b) for p, b in zip(net.trained.values(), before))
    assert all(torch.equal(t, kept[kind][name]) for kind, own in ascent.kept.items() for name, t in own.items())
    assert torch.equal(net.loss(INPUTS[0]), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_adapters_are_one_product_of_both(dtype):
    """Rounded once, as one adapter is: against the weight itself in float64."""
    net = Network(torch.float32)
    layer, generator = net.first, torch.Generator().manual_seed(4)
    layer.base_layer.weight.data = layer.base_layer.weight.data.to(dtype)
    a, b = torch.randn(RANK, 5, generator=generator), torch.randn(4, RANK, generator=generator)
    x = torch.randn(3, 5, generator=generator).to(dtype)
    own = SCALE * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    base = layer.base_layer(x).double()
    truth = base + x.double() @ (own + SCALE * b.double() @ a.double()).T
    with beside(layer, a, b):
        ours = layer(x)
    assert ours.dtype == dtype
    error, rounding = (ours.double() - truth).abs().max(), (truth.to(dtype).double() - truth).abs().max()
    assert error <= max(2 * rounding.item(), 1e-6)


def test_a_resumed_run_repeats_and_what_is_not_finite_leaves_no_trace():
    settings = ParameterSmoothing(direction="bi_lora", rho=0.5)
    fused = lambda parameters: SAMAdamW(parameters, lr=LR, rho=0.1)  # noqa: E731
    runs = [make(settings, fused, torch.float32) for _ in range(2)]
    inputs = INPUTS.float()

    def train(run, numbers, x=inputs):
        net, optimizer, ascent = run
        for number in numbers:
            update(Descent(net, x), optimizer, [number], perturbs=True, ascent=ascent, number=number)

    train(runs[0], range(3))
    (net, optimizer, ascent), (again, resumed, other) = runs
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for kind, tensors in ascent.kept.items():
            for name, tensor in tensors.items():
                other.kept[kind][name].copy_(tensor)
    for run in runs:
        train(run, range(3, UPDATES))
    for one, two in zip(net.trained.values(), again.trained.values()):
        assert torch.equal(one, two)
    kept, before = copy.deepcopy(ascent.kept), [p.detach().clone() for p in net.trained.values()]
    spoilt = inputs.clone()
    spoilt[0, 0, 0] = float("nan")
    train(runs[0], [0], spoilt)
    assert int(optimizer.skipped) == 1
    assert all(torch.equal(p, b) for p, b in zip(net.trained.values(), before))
    assert all(torch.equal(t, kept[kind][name]) for kind, own in ascent.kept.items() for name, t in own.items())


def test_what_is_no_linear_adapter_is_refused():
    settings = ParameterSmoothing(direction="bi_lora")
    plain = nn.Linear(2, 2)
    with pytest.raises(UserError, match=says("smoothing.parameters.direction", "bi_lora", "weight", "lora")):
        AuxiliaryAdapter(settings, plain, dict(plain.named_parameters()))
    convolution = nn.Sequential(nn.Conv2d(2, 2, 1)).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), convolution)
    trained = {name: p for name, p in convolution.named_parameters() if p.requires_grad}
    with pytest.raises(UserError, match=says("bi_lora", "0.lora_A", "linear", "parameters.lora.targets")):
        AuxiliaryAdapter(settings, convolution, trained)
