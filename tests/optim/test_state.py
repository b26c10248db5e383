"""Checkpoints: bitwise resume, in place, across optimizers; and the diagnostics."""

import io
import pickle

import pytest
import torch
from builders.messages import says

from optim.networks import batches, bits, loss_of, network, train
from rsaft_fast.optim import SAM, SAMAdamW

MAKERS = {
    "SAM": lambda p, **o: SAM(p, torch.optim.AdamW, **{"lr": 0.01, **o}),
    "SAMAdamW": lambda p, **o: SAMAdamW(p, **{"lr": 0.01, **o}),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*without a float32 master")
@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_repeats_every_bit(dtype, make, model_first):
    data = batches(12, dtype)
    whole = network(dtype)
    opt = make(whole.parameters(), rho=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12)
    train(whole, opt, data[:5], each=scheduler.step)
    saved = through_disk({"model": whole.state_dict(), "opt": opt.state_dict(), "lr": scheduler.state_dict()})
    train(whole, opt, data[5:], each=scheduler.step)

    resumed = network(dtype, seed=9)
    opt = make(resumed.parameters(), lr=0.77, rho=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12)
    for load in ((resumed, "model"), (opt, "opt"))[:: 1 if model_first else -1]:
        load[0].load_state_dict(saved[load[1]])
    scheduler.load_state_dict(saved["lr"])
    train(resumed, opt, data[5:], each=scheduler.step)
    assert torch.equal(bits(resumed), bits(whole))


def test_loading_into_a_used_optimizer_keeps_its_storage():
    model, data = network(torch.bfloat16), batches(4, torch.bfloat16)
    opt = SAMAdamW(model.parameters(), rho=0.3)
    train(model, opt, data[:2])
    saved = through_disk({"model": model.state_dict(), "opt": opt.state_dict()})
    train(model, opt, data[2:])
    after = bits(model)
    addresses = {(p, k): v.data_ptr() for p, s in opt.state.items() for k, v in s.items()}
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    assert {(p, k): v.data_ptr() for p, s in opt.state.items() for k, v in s.items()} == addresses
    train(model, opt, data[2:])
    assert torch.equal(bits(model), after)


def test_the_count_of_skipped_steps_survives(make):
    model = network()
    opt = make(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    opt.step(plain=True)
    saved = through_disk(opt.state_dict())
    fresh = make(network().parameters())
    fresh.load_state_dict(saved)
    assert int(fresh.skipped) == 1
    copied = pickle.loads(pickle.dumps(opt))
    assert int(copied.skipped) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_torch_adamw_is_taken(dtype):
    model, data = network(dtype), batches(5, dtype)
    theirs = torch.optim.AdamW(model.parameters(), lr=0.03)
    train(model, theirs, data[:3], sharp=False)
    twin = network(dtype)
    twin.load_state_dict(model.state_dict())
    ours = SAMAdamW(twin.parameters(), rho=0.4)
    ours.load_state_dict(through_disk(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == 0.03 and ours.param_groups[0]["rho"] == 0.4
    assert all(ours.state[p]["step"] == 3 for p in twin.parameters())
    if dtype is torch.bfloat16:
        assert all(torch.equal(ours.state[p]["master"], p.float()) for p in twin.parameters())
    else:
        train(model, theirs, data[3:], sharp=False)
        train(twin, ours, data[3:], sharp=False)
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_saving_or_loading_while_perturbed_is_refused(make):
    model = network()
    opt = make(model.parameters())
    loss_of(model, batches(1)[0]).backward()
    saved = opt.state_dict()
    opt.perturb()
    perturbed = bits(model)
    for refused in (opt.state_dict, lambda: opt.load_state_dict(saved), lambda: pickle.dumps(opt)):
        with pytest.raises(RuntimeError, match=says("perturbed", "step()", "restore()")):
            refused()
    assert torch.equal(bits(model), perturbed)


def test_tensors_of_the_checkpoint_share_no_memory():
    model = network(torch.bfloat16)
    opt = SAMAdamW(model.parameters())
    train(model, opt, batches(1, torch.bfloat16))
    tensors = [v for state in opt.state_dict()["state"].values() for v in state.values()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_a_checkpoint_of_other_groups_is_refused_and_nothing_changes(make):
    model = network()
    opt = make(model.parameters())
    train(model, opt, batches(1))
    saved = make([torch.nn.Parameter(torch.ones(2))]).state_dict()
    before = {p: s["exp_avg"].clone() for p, s in opt.state.items()}
    with pytest.raises(ValueError, match="size of optimizer's group"):
        opt.load_state_dict(saved)
    assert all(torch.equal(opt.state[p]["exp_avg"], m) for p, m in before.items())
    train(model, opt, batches(1))


# -- diagnostics -------------------------------------------------------------------------------------------------------


def test_statistics_in_float64(make):
    model, (first, second) = network(torch.float64), batches(2, torch.float64)
    opt = make(model.parameters(), rho=0.25)
    loss_of(model, first).backward()
    norms = [torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm().item()]
    opt.perturb(zero_grad=True)
    loss_of(model, second).backward()
    norms.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm().item())
    opt.step()
    stats = opt.stats()
    assert [stats["grad_norm"], stats["second_grad_norm"]] == pytest.approx(norms, rel=1e-12)
    assert stats["eps_norm"] == pytest.approx(0.25, rel=1e-9)
    for name in ("projection", "cosine", "applied_over_rho"):
        assert stats[name] == pytest.approx(1.0, rel=1e-9)
    assert stats["skipped"] == 0


@pytest.mark.filterwarnings("ignore:.*without a float32 master")
def test_statistics_show_what_low_precision_does():
    """The numbers that the docstring argues with: bf16 alone holds next to nothing, a master is unbiased but noisy."""
    results = {}
    for master in (True, False):
        weight = torch.nn.Parameter((torch.randn(400_000) * 0.02).bfloat16())
        opt = SAMAdamW([weight], rho=5e-4, master_weights=master)  # e_rms 8e-7, as rho 0.05 at 4e9 parameters
        weight.grad = torch.randn(400_000).bfloat16()
        opt.step(plain=True)  # the master leaves the bf16 grid
        before = weight.detach().clone()
        opt.perturb()
        applied = (weight.double() - before.double()).norm().item()
        results[master] = opt.stats()
        assert results[master]["eps_norm"] == pytest.approx(applied, rel=1e-5)
    assert results[True]["projection"] == pytest.approx(1.0, abs=0.25)
    assert results[True]["applied_over_rho"] > 3 and results[True]["cosine"] < 0.3
    assert results[False]["projection"] < 0.1 and results[False]["applied_over_rho"] < 0.4


def test_no_statistics_before_the_first_pass(make):
    with pytest.raises(RuntimeError, match=says("statistics", "perturb()", "step()")):
        make(network().parameters()).stats()


def test_statistics_of_a_zero_gradient_are_zero(make):
    model = network()
    opt = make(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.perturb()
    stats = opt.stats()
    assert set(stats.values()) == {0}
