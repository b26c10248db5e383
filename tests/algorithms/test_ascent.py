"""Directions of the weight perturbation, each against its paper's update written out in plain torch, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from builders.messages import says
from pydantic import ValidationError

from rsaft_fast.algorithms import Algorithm, Ascent, At
from rsaft_fast.algorithms.ascent import needs_ascent
from rsaft_fast.algorithms.update import update
from rsaft_fast.errors import UserError
from rsaft_fast.optim import SAM, SAMAdamW
from rsaft_fast.smoothing.settings import ParameterSmoothing

RHO, LR, UPDATES = 0.3, 0.05, 7
INPUTS = torch.randn(UPDATES, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class LowRank(torch.nn.Module):
    """y = tanh(x (W + 2 B A)^T) for two layers, named as peft names LoRA's factors."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for layer, (rows, columns) in {"first": (4, 5), "second": (3, 4)}.items():
            make = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
            self.register_buffer(layer, make(rows, columns))
            factors = torch.nn.ModuleDict()
            for name, size in {"lora_A": (2, columns), "lora_B": (rows, 2)}.items():
                factors[name] = torch.nn.ParameterDict({"weight": torch.nn.Parameter(0.3 * make(*size))})
            self.add_module(f"{layer}_factors", factors)

    def weight(self, layer):
        factors = getattr(self, f"{layer}_factors")
        return getattr(self, layer) + 2 * factors["lora_B"]["weight"] @ factors["lora_A"]["weight"]

    def loss(self, x):
        hidden = torch.tanh(x @ self.weight("first").T)
        return (hidden @ self.weight("second").T).sin().mean()


class Descent(Algorithm[int]):
    """The loss of one batch of inputs, and where it was asked for."""

    def __init__(self, net, inputs=INPUTS):
        self.net, self.inputs, self.asked = net, inputs, []

    def collect(self, batches):
        return None

    def parts(self, experience, index) -> Sequence[int]:
        return [index]

    def backward(self, part, at, check=lambda *tensors: None):
        self.asked.append(at)
        value = self.net.loss(self.inputs[part])
        check(value)
        value.backward()
        return {"loss": value.detach()}


def train(settings, net=None, updates=range(UPDATES), ascent=None, optimizer=None, inputs=INPUTS):
    """Updates by the package; the weights after each, the algorithm and the ascent."""
    net = net or LowRank()
    parameters = dict(net.named_parameters())
    optimizer = optimizer or SAM(parameters.values(), torch.optim.SGD, rho=RHO, lr=LR)
    ascent = ascent or Ascent(settings, parameters, lora_scale=2.0)
    algorithm, seen = Descent(net, inputs), []
    for number in updates:
        update(algorithm, optimizer, [number], perturbs=True, ascent=ascent, number=number)
        seen.append({name: p.detach().clone() for name, p in parameters.items()})
    return seen, algorithm, ascent


def gradients(net, number, eps=None):
    """By autograd, at the weights or at weights + eps."""
    there = copy.deepcopy(net)
    with torch.no_grad():
        for name, p in there.named_parameters():
            p.add_(eps[name] if eps else 0)
    names = [name for name, _ in there.named_parameters()]
    return dict(zip(names, torch.autograd.grad(there.loss(INPUTS[number]), list(there.parameters()))))


def scaled(direction, rho=RHO):
    norm = torch.cat([d.flatten() for d in direction.values()]).norm()
    return {name: rho * d / norm if norm > 0 else d for name, d in direction.items()}


def descend(net, gradient):
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.sub_(LR * gradient[name])


def check(seen, expected):
    for number, (ours, truth) in enumerate(zip(seen, expected, strict=True)):
        for name in truth:
            torch.testing.assert_close(ours[name], truth[name], rtol=1e-9, atol=1e-13, msg=f"{number} {name}")


def by_hand(rule):
    """`rule(net, number, state)` gives eps and what the second gradient becomes; the weights after each update."""
    net, state, seen = LowRank(), {}, []
    for number in range(UPDATES):
        eps, change = rule(net, number, state)
        descend(net, change(gradients(net, number, eps)))
        seen.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return seen


def test_momentum_follows_the_running_mean_of_the_updates_gradients():
    def rule(net, number, state):
        mean = state.setdefault("mean", {name: torch.zeros_like(p) for name, p in net.named_parameters()})

        def take_up(second):
            state["mean"] = {name: 0.8 * mean[name] + 0.2 * g for name, g in second.items()}
            return second

        return scaled(mean), take_up

    seen, algorithm, _ = train(ParameterSmoothing(direction="momentum", decay=0.8))
    check(seen, by_hand(rule))
    assert algorithm.asked == [At.PLAIN] * UPDATES, "no first pass"


def test_a_direction_is_renewed_every_so_many_updates():
    def rule(net, number, state):
        if number % 3 == 0:
            state["g"] = gradients(net, number)
        return scaled(state["g"]), lambda second: second

    seen, algorithm, _ = train(ParameterSmoothing(reuse=3))
    check(seen, by_hand(rule))
    two, one = [At.FIRST, At.SECOND], [At.PLAIN]
    assert algorithm.asked == two + one + one + two + one + one + two


def friendly(net, number, state):
    mean = state.setdefault("mean", {name: torch.zeros_like(p) for name, p in net.named_parameters()})
    g = gradients(net, number)
    state["mean"] = {name: 0.6 * mean[name] + 0.4 * g[name] for name in g}
    return {name: g[name] - 0.7 * state["mean"][name] for name in g}


def test_friendly_takes_the_running_mean_off_the_gradient():
    seen, algorithm, _ = train(ParameterSmoothing(direction="friendly", decay=0.6, sigma=0.7))
    check(seen, by_hand(lambda net, number, state: (scaled(friendly(net, number, state)), lambda second: second)))
    assert algorithm.asked == [At.FIRST, At.SECOND] * UPDATES


def test_friendly_directions_are_reused_too():
    def rule(net, number, state):
        if number % 2 == 0:
            state["d"] = friendly(net, number, state)
        return scaled(state["d"]), lambda second: second

    seen, _, ascent = train(ParameterSmoothing(direction="friendly", decay=0.6, sigma=0.7, reuse=2))
    check(seen, by_hand(rule))
    assert set(ascent.kept) == {"gradient_mean", "direction"}


def test_gsam_takes_off_what_is_orthogonal_to_the_second_gradient():
    def rule(net, number, state):
        first = gradients(net, number)

        def change(second):
            a, b = (torch.cat([g[name].flatten() for name in first]) for g in (first, second))
            orthogonal = a - (a @ b) / (b @ b) * b
            parts = (b - 0.4 * orthogonal).split([g.numel() for g in first.values()])
            return {name: part.view_as(g) for (name, g), part in zip(first.items(), parts)}

        return scaled(first), change

    seen, _, ascent = train(ParameterSmoothing(direction="gsam", alpha=0.4))
    check(seen, by_hand(rule))
    assert not ascent.kept


def steepest(net, number):
    """Of the whole weights: the gradient by them, projected onto A's rows, of length rho; and the B that makes it."""
    weights = {layer: net.weight(layer).detach().requires_grad_(True) for layer in ("first", "second")}
    hidden = torch.tanh(INPUTS[number] @ weights["first"].T)
    value = (hidden @ weights["second"].T).sin().mean()
    found, rows = {}, {}
    for layer, g in zip(weights, torch.autograd.grad(value, list(weights.values()))):
        rows[layer] = getattr(net, f"{layer}_factors")["lora_A"]["weight"].detach()
        found[layer] = g @ torch.linalg.pinv(rows[layer]) @ rows[layer]
    change = scaled(found)
    return change, {layer: change[layer] @ torch.linalg.pinv(rows[layer]) / 2 for layer in change}


def test_full_space_is_the_steepest_change_of_the_weight_within_as_rows():
    def rule(net, number, state):
        _, change_of_b = steepest(net, number)
        eps = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        eps |= {f"{layer}_factors.lora_B.weight": change for layer, change in change_of_b.items()}
        return eps, lambda second: second

    seen, algorithm, _ = train(ParameterSmoothing(space="full", rho=RHO))
    check(seen, by_hand(rule))
    assert algorithm.asked == [At.FIRST, At.SECOND] * UPDATES
    # rho is the length of the change of the weights themselves.
    change, _ = steepest(LowRank(), 0)
    assert sum(c.square().sum() for c in change.values()).sqrt().item() == pytest.approx(RHO, rel=1e-12)


def transferred(net, number):
    """FMLoRA's eqs. 10 to 15 with the weight's own size: the change of B, for s = 2."""
    gradient, estimate, factors = gradients(net, number), {}, {}
    for layer in ("first", "second"):
        a, b = (getattr(net, f"{layer}_factors")[name]["weight"].detach() for name in ("lora_A", "lora_B"))
        g_a, g_b = (gradient[f"{layer}_factors.{name}.weight"] for name in ("lora_A", "lora_B"))
        estimate[layer] = 0.5 * (g_b @ torch.linalg.pinv(a.T) / 2 + torch.linalg.pinv(b.T) @ g_a / 2)
        factors[layer] = a
    wanted = scaled(estimate)
    assert sum(w.square().sum() for w in wanted.values()).sqrt().item() == pytest.approx(RHO, rel=1e-12)
    return {f"{layer}_factors.lora_B.weight": wanted[layer] @ torch.linalg.pinv(factors[layer]) / 2 for layer in wanted}


def test_transferred_is_the_estimate_of_both_factors_carried_over_to_b():
    def rule(net, number, state):
        eps = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        return eps | transferred(net, number), lambda second: second

    seen, algorithm, _ = train(ParameterSmoothing(space="transferred", rho=RHO))
    check(seen, by_hand(rule))
    assert algorithm.asked == [At.FIRST, At.SECOND] * UPDATES


def test_transferred_starts_from_a_b_of_zero_as_full_does():
    """Nothing is known of G through B then: half of what A's rows see is the estimate, of the same direction."""
    moved = {}
    for space in ("full", "transferred"):
        net = LowRank()
        with torch.no_grad():
            for layer in ("first", "second"):
                getattr(net, f"{layer}_factors")["lora_B"]["weight"].zero_()
        moved[space] = train(ParameterSmoothing(space=space, rho=RHO), net, range(1))[0]
    check(moved["full"], moved["transferred"])


def test_the_optimizers_radii_are_put_back(monkeypatch):
    net = LowRank()
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    rhos = []
    monkeypatch.setattr(optimizer, "perturb", lambda zero_grad: rhos.append(optimizer.param_groups[0]["rho"]))
    ascent = Ascent(ParameterSmoothing(space="full"), dict(net.named_parameters()), lora_scale=2.0)
    net.loss(INPUTS[0]).backward()
    ascent.turn()
    with ascent.scaled(optimizer):
        optimizer.perturb(zero_grad=True)
    assert rhos != [RHO] and optimizer.param_groups[0]["rho"] == RHO


VARIANTS = [
    {"direction": "momentum"},
    {"direction": "momentum", "space": "full"},
    {"reuse": 3},
    {"reuse": 3, "space": "full"},
    {"space": "transferred"},
    {"direction": "momentum", "space": "transferred"},
    {"direction": "friendly", "reuse": 2},
    {"direction": "gsam"},
]


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_weights_come_back_to_the_bit_and_a_resumed_run_repeats(keys):
    """With the fused optimizer in float32; resumed at an update that makes no first pass."""
    settings, inputs = ParameterSmoothing(rho=RHO, **keys), INPUTS.float()
    nets = [LowRank().float() for _ in range(2)]
    optimizers = [SAMAdamW(net.parameters(), lr=LR, rho=RHO) for net in nets]
    ascents = [Ascent(settings, dict(net.named_parameters()), 2.0) for net in nets]
    train(settings, nets[0], range(4), ascents[0], optimizers[0], inputs)
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for name, tensors in ascents[0].kept.items():
        for key, tensor in tensors.items():
            ascents[1].kept[name][key].copy_(tensor)
    for net, ascent, optimizer in zip(nets, ascents, optimizers):
        train(settings, net, range(4, UPDATES), ascent, optimizer, inputs)
    for one, other in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.equal(one, other)

    class Broken(Descent):
        def backward(self, part, at, check=lambda *tensors: None):
            if at is not At.FIRST:
                moved.extend(p.detach().clone() for p in self.net.parameters())
                raise KeyError("at theta + eps")
            return super().backward(part, at, check)

    before, moved = [p.detach().clone() for p in nets[0].parameters()], []
    with pytest.raises(KeyError):
        update(Broken(nets[0], inputs), optimizers[0], [0], perturbs=True, ascent=ascents[0], number=UPDATES)
    assert any(not torch.equal(p, m) for p, m in zip(before, moved))
    assert all(torch.equal(p, now) for p, now in zip(before, nets[0].parameters()))


@pytest.mark.parametrize("keys", [{"direction": "momentum"}, {"direction": "friendly", "reuse": 2}], ids=str)
def test_a_gradient_that_is_not_finite_leaves_no_trace(keys):
    settings = ParameterSmoothing(rho=RHO, **keys)
    net = LowRank()
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    _, _, ascent = train(settings, net, range(2), optimizer=optimizer)
    kept = copy.deepcopy(ascent.kept)
    weights = [p.detach().clone() for p in net.parameters()]
    spoilt = INPUTS.clone()
    spoilt[2, 0, 0] = float("nan")
    train(settings, net, [2], ascent, optimizer, spoilt)
    assert int(optimizer.skipped) == 1
    assert all(torch.equal(p, before) for p, before in zip(net.parameters(), weights))
    for name in kept:
        assert all(torch.equal(kept[name][key], tensor) for key, tensor in ascent.kept[name].items())


def test_what_needs_an_ascent():
    assert not needs_ascent(None) and not needs_ascent(ParameterSmoothing())
    assert all(needs_ascent(ParameterSmoothing(**keys)) for keys in VARIANTS)
    with pytest.raises(UserError, match=says("smoothing.parameters.space", "weight", "lora")):
        Ascent(ParameterSmoothing(space="full"), dict(torch.nn.Linear(2, 2).named_parameters()))


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"sigma": 0.5}, ("sigma", "friendly", "gradient")),
        ({"alpha": 0.5, "direction": "friendly"}, ("alpha", "gsam", "friendly")),
        ({"decay": 0.5, "direction": "gsam"}, ("decay", "momentum", "friendly", "gsam")),
        ({"reuse": 2, "direction": "momentum"}, ("reuse", 2, "momentum")),
        ({"reuse": 2, "direction": "gsam"}, ("reuse", 2, "gsam")),
        ({"space": "full", "adaptive": True}, ("space full", "adaptive")),
        ({"space": "transferred", "adaptive": True}, ("space transferred", "adaptive")),
        ({"space": "transferred", "reuse": 2}, ("reuse", 2, "space transferred")),
        ({"direction": "bi_lora", "reuse": 2}, ("reuse", 2, "bi_lora", "first pass")),
        ({"direction": "bi_lora", "space": "full"}, ("bi_lora", "space")),
        ({"auxiliary_lr": 0.1}, ("auxiliary_lr", "bi_lora", "gradient")),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, said):
    with pytest.raises(ValidationError, match=says(*said)):
        ParameterSmoothing(**keys)
