"""The memory options of SAMAdamW: 8-bit moments, stochastic rounding, backup in gradients, released gradients."""

import copy
import gc
import weakref

import pytest
import torch
from builders.messages import says

from optim.networks import batches, bits, loss_of, network, train, weights
from rsaft_fast.abi.quantize import blocks, dequantize_blocks
from rsaft_fast.optim import SAMAdamW

BF16 = torch.bfloat16
LOW = dict(lr=1e-3, rho=0.05, state_bits=8, min_8bit_size=64, stochastic_rounding=True)
MODES = {
    "own": {},
    "gradient": dict(backup="gradient"),
    "released": dict(release_gradients=True),
}


def wide_network(dtype=BF16, seed=0):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(6, 80), torch.nn.Tanh(), torch.nn.Linear(80, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)]
    return torch.nn.Sequential(*layers).to(dtype)


def data(count, dtype=BF16):
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randn(8, n, generator=generator).to(dtype) for n in (6, 1)) for _ in range(count)]


# -- 8-bit moments -----------------------------------------------------------------------------------------------------


def test_small_parameters_keep_float32_moments():
    model = wide_network()
    opt = SAMAdamW(model.parameters(), **{**LOW, "min_8bit_size": 81})
    train(model, opt, data(1))
    for p in model.parameters():
        state, eight = opt.state[p], p.numel() >= 81
        assert state["exp_avg"].dtype is (torch.uint8 if eight else torch.float32)
        assert ("exp_avg_absmax" in state) == eight
        if eight:
            assert state["exp_avg_sq_absmax"].shape == (blocks(p.numel()),)


def test_eight_bits_train_as_well_as_32():
    """Not the same path, the same loss: within a tenth after 200 steps, over three beginnings."""
    final, sets = {8: 0.0, 32: 0.0}, data(4, torch.float32)
    for seed in range(3):
        for state_bits in final:
            model = wide_network(torch.float32, seed)
            opt = SAMAdamW(model.parameters(), lr=5e-3, rho=0.02, state_bits=state_bits, min_8bit_size=64)
            train(model, opt, sets * 50)
            final[state_bits] += sum(float(loss_of(model, batch).detach()) for batch in sets)
    assert final[8] < 1.1 * final[32] < 0.2


@pytest.mark.parametrize("first_bits", [8, 32])
@pytest.mark.parametrize("second_bits", [8, 32])
def test_checkpoints_of_either_width_load_into_either(first_bits, second_bits):
    model = wide_network(torch.float32)
    opt = SAMAdamW(model.parameters(), **{**LOW, "stochastic_rounding": False, "state_bits": first_bits})
    train(model, opt, data(3, torch.float32))
    other = wide_network(torch.float32)
    other.load_state_dict(model.state_dict())
    second = SAMAdamW(other.parameters(), **{**LOW, "stochastic_rounding": False, "state_bits": second_bits})
    second.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, q in zip(model.parameters(), other.parameters()):
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            ours, theirs = values(opt.state[p], name, signed), values(second.state[q], name, signed)
            step = 0.0 if first_bits == second_bits else 0.9 / (64 if signed else 128)
            assert ((ours - theirs).abs() <= 0.51 * step * ours.abs().max()).all()
    train(other, second, data(1, torch.float32))
    assert int(second.state[next(other.parameters())]["step"]) == 4


def values(state, name, signed):
    if state[name].dtype is not torch.uint8:
        return state[name].flatten()
    return dequantize_blocks(state[name].flatten(), state[name + "_absmax"], signed)


def test_a_checkpoint_of_bitsandbytes_is_taken():
    bnb = pytest.importorskip("bitsandbytes")
    model = wide_network(torch.float32)
    theirs = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3, min_8bit_size=64)
    theirs.fill_qmap()
    saved, codes = theirs.state_dict(), {}
    for index, p in enumerate(model.parameters()):
        # Its step needs a GPU: the state is what its step would leave, in its own layout.
        codes[index] = torch.randint(0, 256, p.shape, dtype=torch.uint8)
        saved["state"][index] = {
            "step": 7,
            "state1": codes[index],
            "state2": codes[index].clone(),
            "qmap1": theirs.name2qmap["dynamic"],
            "qmap2": theirs.name2qmap["udynamic"],
            "absmax1": torch.rand(blocks(p.numel())),
            "absmax2": torch.rand(blocks(p.numel())),
        }
    opt = SAMAdamW(model.parameters(), lr=1e-3, rho=0.05, state_bits=8, min_8bit_size=1)
    opt.load_state_dict(saved)
    for index, p in enumerate(model.parameters()):
        state = opt.state[p]
        assert torch.equal(state["exp_avg"], codes[index]) and int(state["step"]) == 7
        assert torch.equal(state["exp_avg_sq_absmax"], saved["state"][index]["absmax2"])
    train(model, opt, data(1, torch.float32))


@pytest.mark.parametrize("mode", MODES)
def test_resume_repeats_every_bit(mode):
    """Codes, absmax and the draws of stochastic rounding."""
    sets, whole = data(8), wide_network()
    opt = SAMAdamW(whole.parameters(), **LOW, **MODES[mode])
    train(whole, opt, sets[:3])
    model_state, opt_state = copy.deepcopy(whole.state_dict()), copy.deepcopy(opt.state_dict())
    train(whole, opt, sets[3:])
    resumed = wide_network(seed=9)
    opt = SAMAdamW(resumed.parameters(), **LOW, **MODES[mode])
    resumed.load_state_dict(model_state)
    opt.load_state_dict(opt_state)
    train(resumed, opt, sets[3:])
    assert torch.equal(bits(resumed), bits(whole))


# -- stochastic rounding -----------------------------------------------------------------------------------------------


def test_without_a_master_the_perturbation_arrives_only_by_stochastic_rounding():
    projection = {}
    for rounding in (False, True):
        torch.manual_seed(0)
        w = torch.nn.Parameter((torch.randn(300_000) * 0.5).to(BF16))
        opt = SAMAdamW([w], rho=0.02, master_weights=False, stochastic_rounding=rounding)
        w.grad = torch.randn_like(w)
        if rounding:
            opt.perturb()
        else:
            with pytest.warns(UserWarning, match="stochastic_rounding"):
                opt.perturb()
        projection[rounding] = opt.stats()["projection"]
        opt.restore()
    assert projection[False] < 0.1 < 0.8 < projection[True] < 1.2


def test_small_updates_add_up():
    w = torch.nn.Parameter(torch.ones(20_000, dtype=BF16))
    opt = SAMAdamW([w], lr=1e-4, weight_decay=0.0, stochastic_rounding=True)
    for _ in range(20):
        w.grad = torch.ones_like(w)
        opt.step(plain=True)
    # Each step is a fortieth of a unit in the last place below 1.
    assert abs(float(w.detach().double().mean()) - (1 - 20e-4)) < 2e-4


def test_the_seed_decides_the_bits():
    results = []
    for seed in (1, 1, 2):
        model = wide_network()
        train(model, SAMAdamW(model.parameters(), **LOW, seed=seed), data(3))
        results.append(bits(model))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# -- backup in gradients, released gradients ---------------------------------------------------------------------------


def test_every_place_of_the_backup_trains_to_the_same_bits():
    """Released too, without clipping: only then does it need what it does not know."""
    results = []
    for options in MODES.values():
        model = wide_network()
        train(model, SAMAdamW(model.parameters(), **LOW, **options), data(6))
        results.append(bits(model))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_released_with_a_master_or_in_float32(dtype):
    results = []
    for release in (False, True):
        model = wide_network(dtype)
        opt = SAMAdamW(model.parameters(), lr=1e-3, rho=0.05, release_gradients=release)
        train(model, opt, data(5, dtype))
        results.append(bits(model))
        assert {int(s["step"]) for s in opt.state.values()} == {5}
    assert torch.equal(*results)


def test_released_clipping_uses_the_first_norm():
    model, plain = wide_network(torch.float32), wide_network(torch.float32)
    batch = data(1, torch.float32)[0]
    opt = SAMAdamW(model.parameters(), lr=1e-2, rho=0.5, eps=1.0, max_grad_norm=1e-3, release_gradients=True)
    train(model, opt, [batch])
    # By hand: the second gradient at w + e, times limit over the first one's norm, then AdamW.
    reference = SAMAdamW(plain.parameters(), lr=1e-2, rho=0.5, eps=1.0)
    loss_of(plain, batch).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    with reference.perturbed(zero_grad=True):
        loss_of(plain, batch).backward()
        for p in plain.parameters():
            p.grad.mul_(1e-3 / (norm + 1e-6))
        reference.step()
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-6, atol=1e-8)
    assert opt.stats()["second_grad_norm"] != opt.stats()["second_grad_norm"]  # NaN: never known


@pytest.mark.parametrize("mode", ["gradient", "released"])
def test_no_gradient_and_no_copy_outlives_its_use(mode):
    model, batch = wide_network(), data(1)[0]
    opt = SAMAdamW(model.parameters(), **LOW, **MODES[mode])
    loss_of(model, batch).backward()
    first = [weakref.ref(p.grad) for p in model.parameters()]
    addresses = {p.grad.data_ptr() for p in model.parameters()}
    opt.perturb()
    assert all(p.grad is None for p in model.parameters()) and all(ref() is not None for ref in first)
    assert {t.data_ptr() for bucket in opt._buckets for t in bucket.table["backup"]} == addresses
    loss_of(model, batch).backward()
    gc.collect()
    if mode == "released":
        assert all(p.grad is None for p in model.parameters()) and all(ref() is None for ref in first)
    opt.step()
    gc.collect()
    assert all(ref() is None for ref in first)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["restore", "exception", "non-finite first"])
def test_the_weights_come_back_to_the_bit(mode, how):
    model, batch = wide_network(), data(1)[0]
    opt = SAMAdamW(model.parameters(), **LOW, **MODES[mode])
    before = bits(model)
    loss_of(model, batch).backward()
    if how == "non-finite first":
        next(model.parameters()).grad[0, 0] = float("nan")
        opt.perturb(zero_grad=True)
        assert torch.equal(bits(model), before)
        loss_of(model, batch).backward()
        opt.step()
        assert int(opt.skipped) == 1 and not any(int(s["step"]) for s in opt.state.values())
    elif how == "restore":
        opt.perturb()
        assert not torch.equal(bits(model), before)
        opt.restore()
    else:
        with pytest.raises(ZeroDivisionError), opt.perturbed(zero_grad=True):
            raise ZeroDivisionError
    assert torch.equal(bits(model), before) and not opt.half_stepped
    train(model, opt, data(2))  # and it goes on


def test_parameters_without_a_second_gradient_are_restored_and_not_counted():
    model, batch = wide_network(), data(1)[0]
    opt = SAMAdamW(model.parameters(), **LOW, release_gradients=True)
    last = model[4].weight.detach().clone()
    loss_of(model, batch).backward()
    with opt.perturbed():
        model[2](model[1](model[0](batch[0]))).float().mean().backward()
        opt.step()
    assert torch.equal(model[4].weight, last)
    assert [int(opt.state[p]["step"]) for p in model.parameters()] == [1, 1, 1, 1, 0, 0]


def test_check_finite_skips_the_whole_released_step():
    model, batch = wide_network(), data(1)[0]
    opt = SAMAdamW(model.parameters(), **LOW, release_gradients=True)
    before = bits(model)
    loss_of(model, batch).backward()
    with opt.perturbed():
        loss = loss_of(model, batch) * float("inf")
        opt.check_finite(loss, torch.zeros(3))
        loss.backward()
        opt.step()
    assert torch.equal(bits(model), before) and int(opt.skipped) == 1
    with pytest.raises(RuntimeError, match=says("check_finite()", "not perturbed", "perturb()")):
        opt.check_finite(torch.zeros(1))
    train(model, opt, [batch])
    assert int(opt.skipped) == 1 and {int(s["step"]) for s in opt.state.values()} == {1}


def test_an_error_inside_the_released_backward_is_called_a_half_step():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("out of memory")

    model, batch = wide_network(), data(1)[0]
    opt = SAMAdamW(model.parameters(), **LOW, release_gradients=True)
    train(model, opt, data(2))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    before = bits(model)
    loss_of(model, batch).backward()
    with pytest.raises(torch.OutOfMemoryError) as caught, opt.perturbed():
        hidden = Fails.apply(model[1](model[0](batch[0])))
        (model[4](model[3](model[2](hidden))) - batch[1]).pow(2).mean().backward()
    assert opt.half_stepped and not opt.is_perturbed
    assert "half done" in getattr(caught.value, "__notes__", ["half done"])[0]
    assert not torch.equal(bits(model), before)
    loss_of(model, batch).backward()
    with pytest.raises(RuntimeError, match="last checkpoint"):
        opt.perturb()
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    assert torch.equal(bits(model), before)
    train(model, opt, data(1))


def test_a_second_backward_in_pass_two_is_refused():
    model, batch = wide_network(), data(1)[0]
    opt = SAMAdamW(model.parameters(), **LOW, release_gradients=True)
    loss_of(model, batch).backward()
    with (
        pytest.raises(RuntimeError, match=says("parameter 2", "(1,)", "pass 2", "release_gradients=True")),
        opt.perturbed(),
    ):
        loss_of(model, batch).backward()
        loss_of(model, batch).backward()
    assert opt.half_stepped


def test_released_gradients_refuse_a_scaler():
    model, batch = wide_network(torch.float32), data(1, torch.float32)[0]
    opt, scaler = SAMAdamW(model.parameters(), rho=0.05, release_gradients=True), torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batch)).backward()
    opt.perturb()
    scaler.scale(loss_of(model, batch)).backward()
    with pytest.raises(RuntimeError, match=says("release_gradients", "GradScaler")):
        scaler.step(opt)


def test_gradients_that_cannot_hold_weights_are_refused():
    w = torch.nn.Parameter(torch.randn(5))
    opt = SAMAdamW([w], rho=0.05, backup="gradient")
    buffer = torch.zeros(50)
    w.grad = buffer[10:15]
    before = w.detach().clone()
    with pytest.raises(ValueError, match=says("gradient 0", "gradient_as_bucket_view", 'backup="own"')):
        opt.perturb()
    assert torch.equal(w, before) and not opt.is_perturbed and torch.equal(buffer, torch.zeros(50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(state_bits=4), says("state_bits=4", 32, 8)),
        (dict(backup="disk"), says("backup='disk'", '"own"', '"gradient"')),
        (dict(seed=-1), says("seed=-1", "2**64 - 1")),
        (dict(stochastic_rounding=True, master_weights=True), says("stochastic_rounding", "master_weights")),
        (
            dict(static_gradients=True, release_gradients=True),
            says("static_gradients", "release_gradients", 'backup="gradient"'),
        ),
        (dict(release_gradients=True, replicas=True), says("release_gradients", "other workers")),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SAMAdamW([torch.nn.Parameter(torch.ones(2))], **options)


# -- static gradients --------------------------------------------------------------------------------------------------


def test_static_gradients_train_to_the_same_bits_and_stay():
    results = []
    for static in (False, True):
        model = network(torch.float32)
        opt = SAMAdamW(model.parameters(), lr=0.01, rho=0.1, static_gradients=static)
        train(model, opt, batches(4, torch.float32))
        results.append(bits(model))
    assert torch.equal(*results)
    addresses = [p.grad.data_ptr() for p in model.parameters()]
    opt.zero_grad(set_to_none=True)
    assert [p.grad.data_ptr() for p in model.parameters()] == addresses
    assert all(not p.grad.any() for p in model.parameters())


def test_a_broken_promise_of_static_gradients_is_an_error():
    model, sets = network(torch.float32), batches(3, torch.float32)
    opt = SAMAdamW(model.parameters(), lr=0.01, rho=0.1, static_gradients=True)
    train(model, opt, sets[:1])
    before = bits(model)
    model.zero_grad(set_to_none=True)
    kept = [p.grad for p in model.parameters()]
    loss_of(model, sets[1]).backward()
    with pytest.raises(
        RuntimeError, match=says("parameter 0", "static_gradients=True", "zero_grad(set_to_none=False)")
    ):
        opt.perturb()
    assert torch.equal(bits(model), before) and kept[0] is None and not opt.is_perturbed
