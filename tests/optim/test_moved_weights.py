"""Weights that change layout, dtype or place under an optimizer: training goes on to the values it would have had."""

import copy
import pickle

import pytest
import torch
from builders.messages import says

from optim.networks import batches, loss_of, network, train, weights
from rsaft_fast.abi.table import WeightsChangedError
from rsaft_fast.ops import GradientNorm, TensorTable, sam_perturb_
from rsaft_fast.optim import SAM, SAMAdamW, offload

BF16 = torch.bfloat16
LAST, FIRST = torch.channels_last, torch.contiguous_format
EIGHT = dict(state_bits=8, min_8bit_size=100)
KINDS = {
    "SAM": (torch.float32, None),
    "float32": (torch.float32, {}),
    "adaptive, clipped": (torch.float32, dict(adaptive=True, max_grad_norm=0.1)),
    "static": (torch.float32, dict(static_gradients=True)),
    "released": (torch.float32, dict(release_gradients=True)),
    "in gradients": (torch.float32, dict(backup="gradient")),
    "on the host": (torch.float32, dict(offload="state")),
    "8 bits": (torch.float32, EIGHT),
    "master": (BF16, {}),
    "master, on the host, 8 bits": (BF16, dict(offload="state", **EIGHT)),
    "master, released": (BF16, dict(release_gradients=True)),
    "stochastic": (BF16, dict(stochastic_rounding=True)),
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(offload, "PART", 3000)


class Convolution(torch.nn.Conv2d):
    """A convolution with the same roundings whatever the layout of its weights: some CPUs have a kernel for each."""

    def forward(self, x):
        return torch.nn.functional.conv2d(x.contiguous(), self.weight.contiguous(), self.bias)


def convolutions(dtype=torch.float32, seed=0, device="cpu") -> torch.nn.Sequential:
    torch.manual_seed(seed)
    layers = (Convolution(3, 7, 3), torch.nn.Tanh(), Convolution(7, 5, 2), Convolution(5, 2, 1))
    return torch.nn.Sequential(*layers).to(device, dtype)


def pictures(count, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    return [(draw(2, 3, 6, 6), draw(2, 2, 3, 3)) for _ in range(count)]


def optimizer(kind: str, params, **options):
    dtype, own = KINDS[kind]
    if own is None:
        return SAM(params, torch.optim.AdamW, **{"lr": 0.01, "rho": 0.1, **options})
    return SAMAdamW(params, **{"lr": 0.01, "rho": 0.1, **own, **options})


def resumed(kind, model, opt):
    """Another process: model and optimizer from a checkpoint, in which strides are lost."""
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    for state in saved[1]["state"].values():
        state.update({name: v.contiguous() for name, v in state.items() if isinstance(v, torch.Tensor)})
    model = convolutions(next(model.parameters()).dtype, seed=4, device=next(model.parameters()).device)
    opt = optimizer(kind, model.parameters(), lr=0.5)
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    return model, opt


def after_a_step(kind, model, opt, data):
    train(model, opt, data[:2])
    model.to(memory_format=LAST)
    train(model, opt, data[2:4])
    model.to(memory_format=FIRST)
    train(model, opt, data[4:])
    return model, opt


def after_loading(kind, model, opt, data):
    train(model, opt, data[:2])
    model, opt = resumed(kind, model, opt)
    model.to(memory_format=LAST)
    train(model, opt, data[2:4])
    model, opt = resumed(kind, model, opt)
    train(model, opt, data[4:])
    return model, opt


def before_the_second_pass(kind, model, opt, data):
    for batch, layout in zip(data, (LAST, FIRST) * len(data)):
        opt.zero_grad()
        loss_of(model, batch).backward()
        opt.perturb(zero_grad=True)
        model.to(memory_format=layout)
        loss_of(model, batch).backward()
        opt.step()
    return model, opt


def after_the_second_pass(kind, model, opt, data):
    for batch, layout in zip(data, (LAST, FIRST) * len(data)):
        opt.zero_grad()
        loss_of(model, batch).backward()
        opt.perturb(zero_grad=True)
        loss_of(model, batch).backward()
        model.to(memory_format=layout)
        opt.step()
    return model, opt


def elsewhere(kind, model, opt, data):
    for batch in data:
        train(model, opt, [batch])
        for p in model.parameters():
            p.data = p.data.clone()
    return model, opt


MOVES = (after_a_step, after_loading, before_the_second_pass, after_the_second_pass, elsewhere)


def trained(kind, move, device="cpu"):
    dtype, _ = KINDS[kind]
    model, data = convolutions(dtype, device=device), pictures(6, dtype, device)
    opt = optimizer(kind, model.parameters())
    if move is not None:
        return move(kind, model, opt, data)
    train(model, opt, data)
    return model, opt


CASES = [(kind, move) for kind in KINDS for move in MOVES if ("released" in kind) * (move is MOVES[2]) == 0]


@pytest.mark.parametrize(("kind", "move"), CASES, ids=[f"{kind}-{move.__name__}" for kind, move in CASES])
def test_weights_that_moved_train_to_the_same_values(kind, move):
    dtype, options = KINDS[kind]
    (still, _), (model, _) = trained(kind, None), trained(kind, move)
    moved = (weights(still) - weights(convolutions(dtype))).norm()
    # Blocks of 8-bit state and the bits that round follow memory order: there the values differ by their noise.
    noisy = move is not elsewhere and (options or {}).keys() & {"state_bits", "stochastic_rounding"}
    assert (weights(model) - weights(still)).norm() < (0.05 if noisy else 2e-6) * moved


def test_weights_that_moved_train_to_the_same_values_on_every_backend(backend):
    for kind in ("8 bits", "float32") if backend.type == "cpu" else KINDS:
        (still, _), (model, _) = trained(kind, None, backend), trained(kind, before_the_second_pass, backend)
        moved = (weights(still) - weights(convolutions())).norm()
        assert (weights(model) - weights(still)).norm() < (0.05 if kind == "8 bits" else 1e-5) * moved


def test_it_follows_torch_sgd_exactly_and_adamw_to_rounding():
    """Against torch alone, in float64: what `SAM` and `SAMAdamW` do when a plain step follows a move."""
    for ours, theirs in (
        (lambda p: SAMAdamW(p, lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01)),
        (lambda p: SAM(p, torch.optim.SGD, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    ):
        left, right = convolutions(torch.float64), convolutions(torch.float64)
        pairs = ((left, ours(left.parameters())), (right, theirs(right.parameters())))
        for batch, layout in zip(pictures(4, torch.float64), (FIRST, LAST, LAST, FIRST)):
            for model, opt in pairs:
                model.to(memory_format=layout)
                train(model, opt, [batch], sharp=False)
        torch.testing.assert_close(weights(left), weights(right), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["SAM", "float32", "in gradients", "released", "on the host"])
@pytest.mark.parametrize("layout", [LAST, FIRST])
def test_a_gradient_in_another_layout_than_its_weight(kind, layout):
    results = []
    for arranged in (False, True):
        model = convolutions().to(memory_format=layout)
        opt = optimizer(kind, model.parameters())
        for batch in pictures(3):
            for last in (False, True):
                opt.zero_grad()
                if arranged and not (last and kind == "released"):
                    grads = torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
                    for p, g in zip(model.parameters(), grads):
                        p.grad = g.clone(memory_format=torch.contiguous_format).to(
                            memory_format=FIRST if layout is LAST or g.dim() != 4 else LAST
                        )
                else:
                    loss_of(model, batch).backward()
                opt.step() if last else opt.perturb()
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_an_expanded_gradient_is_taken():
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    opt = SAMAdamW([weight], lr=0.1, weight_decay=0.0)
    weight.grad = torch.ones(1).expand(3, 4)
    opt.step(plain=True)
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), -0.1))


# -- dtypes ------------------------------------------------------------------------------------------------------------


CASTS = [(kind, to) for kind in KINDS for to in (torch.float64, BF16, torch.float32) if to is not KINDS[kind][0]]


@pytest.mark.parametrize(("kind", "second"), CASTS)
def test_weights_cast_while_perturbed_come_back_cast(kind, second):
    model, data = convolutions(KINDS[kind][0]), pictures(1, KINDS[kind][0])
    opt = optimizer(kind, model.parameters())
    loss_of(model, data[0]).backward()
    expected = weights(copy.deepcopy(model).to(second))
    opt.perturb()
    model.to(second)
    assert not torch.equal(weights(model), expected)
    opt.restore()
    assert torch.equal(weights(model), expected) and next(model.parameters()).dtype is second


@pytest.mark.parametrize(("kind", "second"), [case for case in CASTS if case[0] not in ("SAM", "static", "stochastic")])
def test_weights_cast_train_on_from_their_moments(kind, second):
    """As an optimizer that begins with the cast weights and these moments; torch's own AdamW refuses mixed dtypes."""
    first, options = KINDS[kind]
    model, data = convolutions(first), pictures(4, first)
    opt = optimizer(kind, model.parameters())
    train(model, opt, data[:2])
    model.to(second)
    other = convolutions(second)
    other.load_state_dict(model.state_dict())
    reference = SAMAdamW(other.parameters(), lr=0.01, rho=0.1)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state.pop("master", None)
    reference.load_state_dict(saved)
    reference.param_groups[0]["adaptive"] = opt.param_groups[0]["adaptive"]
    reference.max_grad_norm = opt.max_grad_norm
    train(model, opt, pictures(2, second))
    train(other, reference, pictures(2, second))
    moved = (weights(other) - weights(convolutions(first).to(second))).norm()
    bound = 0.05 if "state_bits" in options else 1e-3 if "release" in str(options) else 1e-6
    assert (weights(model) - weights(other)).norm() <= bound * moved
    assert ("master" in opt.state[next(model.parameters())]) is (second is BF16)


# -- what else a table knows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "static", "8 bits", "master", "on the host", "released"])
def test_state_that_others_cleared_begins_anew(kind):
    model, data = convolutions(KINDS[kind][0]), pictures(4, KINDS[kind][0])
    opt = optimizer(kind, model.parameters())
    train(model, opt, data[:2])
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.grad = None
    opt.state.clear()
    fresh = optimizer(kind, other.parameters())
    for net, o in ((model, opt), (other, fresh)):
        train(net, o, data[2:])
    assert torch.equal(weights(model), weights(other))
    assert all(state["step"] == 2 for state in opt.state_dict()["state"].values())


def test_moments_that_others_set_are_the_ones_used():
    model, data = convolutions(), pictures(3)
    opt = SAMAdamW(model.parameters(), lr=0.01)
    train(model, opt, data[:2])
    twin, twin_opt = copy.deepcopy((model, opt))
    for p, q in zip(model.parameters(), twin.parameters()):
        opt.state[p]["exp_avg"] = torch.zeros_like(p)
        twin_opt.state[q]["exp_avg"].zero_()
    train(model, opt, data[2:])
    train(twin, twin_opt, data[2:])
    assert torch.equal(weights(model), weights(twin))


def test_a_master_that_others_take_away_in_pass_2_still_brings_the_weights_back():
    model, (first, second) = convolutions(BF16), pictures(2, BF16)
    opt = SAMAdamW(model.parameters(), rho=1.0)
    train(model, opt, [first])
    before = weights(model)
    opt.perturb()
    opt.state.clear()
    loss_of(model, second).backward()
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("kind", ["SAM", "float32", "static"])
def test_groups_edited_by_hand_are_followed(kind):
    model, data = network(), batches(3)
    opt = optimizer(kind, model.parameters())
    train(model, opt, data[:1])
    old = model[0].weight
    model[0].weight = torch.nn.Parameter(old.detach().clone())
    params = opt.param_groups[0]["params"]
    params[0] = model[0].weight
    before, kept = weights(model), old.detach().clone()
    train(model, opt, data[1:])
    assert (weights(model) != before)[: old.numel()].all() and torch.equal(old, kept)


def test_adaptive_switched_on_later_is_followed():
    results = []
    for late in (False, True):
        model = network()
        opt = SAMAdamW(model.parameters(), lr=0.01, rho=0.5, adaptive=not late)
        opt.param_groups[0]["adaptive"] = not late
        if late:
            opt.perturb()  # no gradients yet: tables, and nothing else
            opt.restore()
            opt.param_groups[0]["adaptive"] = True
        train(model, opt, batches(2))
        results.append(weights(model))
    assert torch.equal(*results)


def test_what_the_first_pass_found_survives_a_rebuild():
    model = convolutions()
    opt = SAMAdamW(model.parameters(), lr=0.01)
    loss_of(model, pictures(1)[0]).backward()
    model[0].weight.grad[0, 0] = float("nan")
    before = weights(model)
    with opt.perturbed(zero_grad=True):
        loss_of(model, pictures(1)[0]).backward()
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    model.to(memory_format=LAST)
    opt.step()
    assert torch.equal(weights(model), before) and int(opt.skipped) == 1


def test_statistics_survive_a_rebuild():
    model = convolutions()
    opt = SAMAdamW(model.parameters(), lr=0.01)
    train(model, opt, pictures(1))
    before = opt.stats()
    model.to(memory_format=LAST)
    opt.perturb()
    opt.restore()
    train(model, opt, pictures(1))
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    after = opt.stats()
    opt._rebuild()
    assert opt.stats() == pytest.approx(after) and after["eps_norm"] == pytest.approx(before["eps_norm"], rel=1e-4)


def test_a_copy_knows_of_a_half_done_step():
    opt = SAMAdamW([torch.nn.Parameter(torch.ones(2))])
    opt._half_stepped = True
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        with pytest.raises(RuntimeError, match=says("last step", "last checkpoint")):
            twin.perturb()


@pytest.mark.parametrize("how", [lambda p: p.data.t().contiguous(), lambda p: p.data.reshape(-1)])
def test_state_of_another_shape_is_an_error_and_weights_stay(how):
    weight = torch.nn.Parameter(torch.randn(3, 4))
    opt = SAMAdamW([weight])
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        opt.step(plain=True)
        weight.grad = None
    weight.data = how(weight)
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=says("exp_avg", "(3, 4)", str(tuple(weight.shape)), "optimizer.state.pop(")
        ):
            opt.step(plain=True)
    assert torch.equal(weight, before)
    opt.state.pop(weight)
    opt.step(plain=True)
    assert not torch.equal(weight, before)


def test_a_checkpoint_of_another_shape_is_an_error_and_nothing_is_loaded():
    model, other = network(), network()
    opt, theirs = SAMAdamW(model.parameters()), SAMAdamW(other.parameters())
    for net, o in ((model, opt), (other, theirs)):
        train(net, o, batches(1))
    saved = theirs.state_dict()
    saved["state"][5]["exp_avg"] = torch.ones(1)
    before = {p: state["exp_avg"].clone() for p, state in opt.state.items()}
    with pytest.raises(ValueError, match=says("exp_avg", "(1,)", "(3,)", "optimizer.state.pop(")):
        opt.load_state_dict(saved)
    assert all(torch.equal(opt.state[p]["exp_avg"], m) for p, m in before.items())


def test_released_gradients_are_not_applied_where_a_weight_was():
    model, (batch,) = convolutions(), pictures(1)
    opt = SAMAdamW(model.parameters(), release_gradients=True)
    loss_of(model, batch).backward()
    before = weights(model)
    with (
        pytest.raises(RuntimeError, match=says("parameter 4", "(2, 5, 1, 1)", "perturb()", "release_gradients=True")),
        opt.perturbed(),
    ):
        model.to(memory_format=LAST)
        loss_of(model, batch).backward()
    assert torch.equal(weights(model), before) and not opt.half_stepped
    train(model, opt, [batch])


# -- shared memory -----------------------------------------------------------------------------------------------------


def test_one_gradient_for_two_weights_cannot_hold_both_backups():
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    for backup, alike in (("gradient", True), ("own", True), ("gradient", False)):
        opt = SAMAdamW(params, backup=backup, rho=0.5)
        params[0].grad = torch.ones(4)
        params[1].grad = params[0].grad if alike else params[1].data
        if backup == "own":
            opt.perturb()
            opt.restore()
        else:
            with pytest.raises(ValueError, match=says("backup", 1, "overlap")):
                opt.perturb()
        assert all(torch.equal(p, w) for p, w in zip(params, before)) and not opt.is_perturbed


def test_weights_of_two_tables_that_share_memory():
    memory = torch.randn(8)
    groups = [{"params": [torch.nn.Parameter(memory[:5])], "adaptive": True}]
    groups += [{"params": [torch.nn.Parameter(memory[3:])]}]
    with pytest.raises(ValueError, match=says("weights 0 and 1", "overlap")):
        SAMAdamW(groups).perturb()
    weight, other = (torch.nn.Parameter(torch.randn(4)) for _ in range(2))
    opt = SAMAdamW([{"params": [weight], "adaptive": True}, {"params": [other]}])
    opt.perturb()
    opt.restore()
    other.data = weight.data
    with pytest.raises(ValueError, match=says("weights 0 and 1", "overlap")):
        opt.perturb()


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        lambda w: w.data.view(4, 3),
        lambda w: w.data.view(torch.int32).view(torch.float32).as_strided((3, 4), (1, 3)),
        lambda w: w.data.view(torch.bfloat16)[:, :4],
        lambda w: w.data.view(torch.bfloat16),
        lambda w: torch.empty(3, 4, device="meta"),
    ],
    ids=["shape", "strides", "half", "dtype", "device"],
)
@pytest.mark.parametrize("name", ["weight", "grad", "exp_avg", "backup"])
def test_a_table_sees_another_look_at_the_same_address(name, other):
    lists = {name: [torch.randn(3, 4), torch.randn(3)] for name in ("weight", "grad", "exp_avg", "backup")}
    table = TensorTable(lists["weight"])
    table.bind(**lists)
    known = table.addresses.clone()
    with pytest.raises(WeightsChangedError if name == "weight" else (ValueError, TypeError), match=f"{name} 0"):
        table.bind(**{name: [other(lists[name][0]), lists[name][1]]})
    assert torch.equal(table.addresses, known) and table[name][0] is lists[name][0]


@pytest.mark.parametrize("name", ["backup", "exp_avg", "weight"])
def test_a_table_refuses_lists_that_are_written_into_shared_memory(name):
    memory = torch.randn(7)
    table = TensorTable([torch.randn(4), torch.randn(4)])
    with pytest.raises(ValueError, match=says(f"{name}s 0 and 1", "overlap")):
        table.bind(**{name: [memory[:4], memory[3:]]})
    gradient = torch.randn(4)
    table.bind(grad=[gradient, gradient], backup=[torch.randn(4), torch.randn(4)])  # read only: no harm
    sam_perturb_(table, GradientNorm("cpu"))
