"""What the optimizers promise besides the arithmetic: phases, closures, schedulers, scalers, groups, masters."""

import copy
import gc
import weakref

import pytest
import torch
from builders.messages import says

from optim.networks import batches, bits, loss_of, network, train, weights
from rsaft_fast.optim import SAM, SAMAdamW

MAKERS = {
    "SAM": lambda p, **o: SAM(p, torch.optim.AdamW, lr=0.01, **o),
    "SAMAdamW": lambda p, **o: SAMAdamW(p, lr=0.01, **o),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def ready(make, dtype=torch.float32, **options):
    """A network with gradients, and its optimizer."""
    model = network(dtype)
    opt = make(model.parameters(), **options)
    loss_of(model, batches(1, dtype)[0]).backward()
    return model, opt


# -- phases ------------------------------------------------------------------------------------------------------------


def test_every_spelling_gives_the_same_bits(make):
    data = batches(3)

    def by_methods(model, opt, batch):
        opt.perturb()
        opt.zero_grad()
        loss_of(model, batch).backward()
        opt.step()

    def by_aliases(model, opt, batch):
        opt.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        opt.second_step(zero_grad=True)

    def step_inside(model, opt, batch):
        with opt.perturbed(zero_grad=True):
            loss_of(model, batch).backward()
            opt.step()

    def step_after(model, opt, batch):
        before = bits(model)
        with opt.perturbed(zero_grad=True):
            loss_of(model, batch).backward()
        assert torch.equal(bits(model), before)
        opt.step()

    def by_hand(model, opt, batch):
        opt.perturb(zero_grad=True)
        loss_of(model, batch).backward()
        opt.restore()
        opt.step()

    results = []
    for spelling in (by_methods, by_aliases, step_inside, step_after, by_hand, None):
        model = network()
        opt = make(model.parameters(), rho=0.5)
        for batch in data:
            opt.zero_grad()
            if spelling is None:
                assert closure_step(model, opt, batch) == 2
            else:
                loss_of(model, batch).backward()
                spelling(model, opt, batch)
        results.append(bits(model))
    assert all(torch.equal(r, results[0]) for r in results)


def closure_step(model, opt, batch) -> int:
    losses = []

    def closure():
        loss = loss_of(model, batch)  # clears no gradients: step() does
        loss.backward()
        losses.append(loss.item())
        return loss

    returned = opt.step(closure)
    assert returned.item() == losses[0] != losses[1]
    return len(losses)


def test_a_closure_runs_once_when_already_perturbed(make):
    model, opt = ready(make)
    opt.perturb()
    calls = []

    def closure():
        calls.append(opt.is_perturbed)
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        return loss

    opt.step(closure)
    assert calls == [True] and not opt.is_perturbed


def test_a_step_without_any_gradient_restores_and_changes_nothing(make):
    model, opt = ready(make)
    before = bits(model)
    opt.perturb(zero_grad=True)
    opt.step()
    assert torch.equal(bits(model), before)
    opt.step(plain=True)
    assert torch.equal(bits(model), before)
    assert int(opt.skipped) == 0


def test_a_bad_first_pass_is_remembered_across_restore(make):
    model, opt = ready(make)
    before = bits(model)
    model[0].weight.grad[0, 0] = float("nan")
    with opt.perturbed(zero_grad=True):
        loss_of(model, batches(1)[0]).backward()
    opt.step()
    assert torch.equal(bits(model), before) and int(opt.skipped) == 1


# -- torch's own conventions -------------------------------------------------------------------------------------------


def test_a_scheduler_drives_the_update(make):
    model, opt = ready(make)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.0)
    opt.step(plain=True)
    scheduler.step()
    before = bits(model)
    opt.step(plain=True)
    assert torch.equal(bits(model), before)  # lr is 0 now; decoupled decay goes with it
    assert [group["lr"] for group in opt.param_groups] == [0.0]


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_lr_may_be_a_tensor(kind):
    model, other = network(), network()
    data = batches(4)
    ours = SAMAdamW(model.parameters(), lr=kind(0.02), rho=0.1)
    train(model, ours, data)
    if kind is torch.tensor:
        ours.param_groups[0]["lr"].fill_(0.5)
    else:
        ours.param_groups[0]["lr"] = 0.5
    train(model, ours, data)
    theirs = SAMAdamW(other.parameters(), lr=float(kind(0.02)), rho=0.1)  # 0.02 as the tensor holds it
    train(other, theirs, data)
    theirs.param_groups[0]["lr"] = 0.5
    train(other, theirs, data)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-6, atol=1e-7)


def scaled_training(model, opt, data, scaler, unscale=False):
    for batch in data:
        for number in (1, 2):
            opt.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            if number == 1:
                opt.perturb()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()


@pytest.mark.parametrize("base", ["SAMAdamW", "SAM", "SAM fused"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_changes_nothing(base, unscale):
    def make(params):
        if base == "SAMAdamW":
            return SAMAdamW(params, lr=0.01, rho=0.2, max_grad_norm=0.3)
        return SAM(params, torch.optim.AdamW, rho=0.2, lr=0.01, fused=base == "SAM fused")

    plain, scaled = network(), network()
    plain_opt = make(plain.parameters())
    train(plain, plain_opt, batches(6))
    opt = make(scaled.parameters())
    scaled_training(scaled, opt, batches(6), torch.amp.GradScaler("cpu", init_scale=4096.0), unscale)
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-5, atol=1e-6)
    seen, unscaled = (o.stats()["second_grad_norm"] for o in (opt, plain_opt))
    assert seen == pytest.approx(unscaled, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_backs_off_and_the_step_is_skipped(make, fused):
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, fused=True) if fused else make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = bits(model)
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    opt.perturb()
    model[0].weight.grad[0, 0] = float("inf")
    scaler.step(opt)
    scaler.update()
    assert torch.equal(bits(model), before)
    assert scaler.get_scale() == 512.0 and int(opt.skipped) == 1


def test_zero_grad_frees_the_gradients(make):
    model, opt = ready(make)
    gone = weakref.ref(model[0].weight.grad)
    opt.perturb(zero_grad=True)
    gc.collect()
    assert gone() is None and model[0].weight.grad is None


def test_hooks_run(make):
    _, opt = ready(make)
    calls = []
    opt.register_step_pre_hook(lambda *a: calls.append("before"))
    opt.register_step_post_hook(lambda *a: calls.append("after"))
    opt.perturb()
    opt.step()
    assert calls == ["before", "after"]


def test_it_copies_with_its_model(make):
    model, opt = ready(make)
    opt.perturb()
    opt.step()
    twin, twin_opt = copy.deepcopy((model, opt))
    for net, optimizer in ((model, opt), (twin, twin_opt)):
        train(net, optimizer, batches(2))
    assert torch.equal(bits(model), bits(twin))


# -- parameters --------------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_and_cost_no_state():
    model, opt = network(), None
    model[0].requires_grad_(False)
    opt = SAMAdamW(model.parameters())
    frozen = model[0].weight.detach().clone()
    train(model, opt, batches(2))
    assert torch.equal(model[0].weight, frozen) and model[0].weight not in opt.state
    model[0].requires_grad_(True)  # thawed later, it joins
    train(model, opt, batches(1))
    assert not torch.equal(model[0].weight, frozen)
    assert opt.state[model[0].weight]["step"] == 1 and opt.state[model[3].weight]["step"] == 3


def test_a_parameter_thawed_between_the_passes_waits_for_the_next_step():
    model = network()
    model[0].requires_grad_(False)
    opt = SAMAdamW(model.parameters(), rho=1.0)
    loss_of(model, batches(1)[0]).backward()
    before = bits(model)
    opt.perturb(zero_grad=True)
    model[0].requires_grad_(True)
    loss_of(model, batches(1)[0]).backward()
    opt.restore()
    assert torch.equal(bits(model), before)


def test_no_parameter_joins_an_optimizer_that_a_graph_owns(make):
    model, opt = ready(make)
    opt.step(plain=True)
    before = bits(model)
    opt._buckets[0].table.captured = True  # what a capture leaves behind
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match=says("parameters", "CUDA graph", "new optimizer")):
        opt.perturb()
    assert torch.equal(bits(model), before)


def test_a_tied_parameter_is_perturbed_once(make):
    shared = torch.nn.Parameter(torch.randn(4, 4))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = make([shared, shared], rho=0.5)
    (shared**2).sum().backward()
    before = shared.detach().clone()
    opt.perturb()
    assert (shared - before).norm().item() == pytest.approx(0.5, rel=1e-5)
    opt.restore()
    assert torch.equal(shared, before)


def test_groups_can_be_added(make):
    model, extra = network(), torch.nn.Parameter(torch.ones(3))
    opt = make(model.parameters(), rho=0.1)
    train(model, opt, batches(1))
    opt.add_param_group({"params": [extra], "lr": 0.5, "rho": 0.9})
    opt.zero_grad()
    (loss_of(model, batches(1)[0]) + extra.sum()).backward()
    opt.perturb()
    assert extra[0] > 1
    opt.step()
    assert (extra < 1).all() and opt.param_groups[1]["rho"] == 0.9 and opt.param_groups[1]["adaptive"] is False


def test_moved_storage_is_followed(make):
    model, opt = ready(make)
    train(model, opt, batches(2))
    for p in model.parameters():
        p.data = p.data.clone()
    twin = network()
    twin.load_state_dict(model.state_dict())
    train(model, opt, batches(2))
    assert not torch.equal(bits(model), bits(twin))


# -- masters -----------------------------------------------------------------------------------------------------------


def test_masters_are_the_default_for_low_precision_only():
    for dtype, expected in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, True)):
        _, opt = ready(MAKERS["SAMAdamW"], dtype)
        opt.step(plain=True)
        state = next(iter(opt.state.values()))
        assert ("master" in state) is expected
        assert all(state[name].dtype == torch.float32 for name in state)
    _, opt = ready(lambda p: SAMAdamW(p, master_weights=False), torch.bfloat16)
    opt.step(plain=True)
    assert "master" not in next(iter(opt.state.values()))


def test_a_weight_changed_by_others_reaches_its_master():
    model, opt = ready(MAKERS["SAMAdamW"], torch.bfloat16)
    for _ in range(3):
        opt.step(plain=True)
    masters = {p: opt.state[p]["master"].clone() for p in model.parameters()}
    with torch.no_grad():
        model[3].bias[1] = 7.0
    opt.perturb()
    opt.restore()
    assert model[3].bias[1] == 7.0
    for p in model.parameters():
        same = torch.ones(p.shape, dtype=torch.bool)
        if p is model[3].bias:
            same[1] = False
        # What others left alone keeps the bits that bf16 does not hold.
        assert torch.equal(opt.state[p]["master"][same], masters[p][same])
    assert any((m != p.float()).any() for p, m in masters.items())


def test_weights_loaded_after_the_optimizer_win_over_its_masters():
    model, opt = ready(MAKERS["SAMAdamW"], torch.bfloat16)
    opt.step(plain=True)
    saved = opt.state_dict()
    model, other = network(torch.bfloat16), network(torch.bfloat16, seed=5)
    opt = SAMAdamW(model.parameters())
    opt.load_state_dict(saved)
    model.load_state_dict(other.state_dict())
    loss_of(model, batches(1, torch.bfloat16)[0]).backward()
    opt.perturb()
    opt.restore()
    assert torch.equal(bits(model), bits(other))


def test_a_perturbation_of_bare_low_precision_weights_warns():
    for make in (lambda p: SAMAdamW(p, master_weights=False), MAKERS["SAM"]):
        _, opt = ready(make, torch.bfloat16)
        opt.step(plain=True)  # no perturbation, no warning
        with pytest.warns(UserWarning, match=says("bfloat16", "master", "projection")):
            opt.perturb()


def test_small_updates_add_up_in_the_master():
    weight = torch.nn.Parameter(torch.full((4,), 100.0, dtype=torch.bfloat16))
    opt = SAMAdamW([weight], lr=0.01, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        opt.step(plain=True)
    assert weight.float().mean().item() == pytest.approx(99.0, abs=0.25)  # one step of 0.01 alone rounds away
