"""Trajectories against independent implementations: torch's AdamW, pytorch_optimizer's SAM, SAM from its equations."""

import os

import pytest
import torch

from optim.networks import batches, loss_of, network, train, weights
from rsaft_fast.optim import SAM, SAMAdamW

ADAMW = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.05)


def textbook_sam(model, base, data, rho, adaptive=False, max_norm=None, rho_of=None):
    """SAM and ASAM written down from their papers: arXiv 2010.01412 eq. 2, arXiv 2102.11600 eq. 5."""
    params = [p for p in model.parameters() if p.requires_grad]
    for batch in data:
        grads = torch.autograd.grad(loss_of(model, batch), params)
        lengths = [(p.detach().abs() * g if adaptive else g).pow(2).sum() for p, g in zip(params, grads)]
        norm = torch.stack(lengths).sum().sqrt()
        old = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, grads):
                radius = rho if rho_of is None else rho_of[p]
                p += radius * (p**2 * g if adaptive else g) / norm
        grads = torch.autograd.grad(loss_of(model, batch), params)
        with torch.no_grad():
            for p, g, w in zip(params, grads, old):
                p.copy_(w)
                p.grad = g
        if max_norm:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        base.step()


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_follows_pytorch_optimizer(adaptive):
    theirs_module = pytest.importorskip("pytorch_optimizer")
    data = batches(50)
    ours, theirs = network(), network()
    train(ours, SAM(ours.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.05, momentum=0.9), data)
    opt = theirs_module.SAM(theirs.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.05, momentum=0.9)
    for batch in data:
        opt.zero_grad()
        loss_of(theirs, batch).backward()
        opt.first_step(zero_grad=True)
        loss_of(theirs, batch).backward()
        opt.second_step()
    moved = (weights(theirs) - weights(network())).norm()
    assert moved > 0.1
    assert (weights(ours) - weights(theirs)).norm() < 1e-5 * moved


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_adamw_equals_the_equations_in_float64(adaptive, max_norm):
    data = batches(20, torch.float64)
    ours, theirs = network(torch.float64), network(torch.float64)
    train(ours, SAMAdamW(ours.parameters(), rho=0.3, adaptive=adaptive, max_grad_norm=max_norm, **ADAMW), data)
    textbook_sam(theirs, torch.optim.AdamW(theirs.parameters(), **ADAMW), data, 0.3, adaptive, max_norm)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("base", ["class", "instance"])
def test_sam_around_adamw_equals_the_equations_in_float64(base):
    data = batches(20, torch.float64)
    ours, theirs = network(torch.float64), network(torch.float64)
    if base == "class":
        opt = SAM(ours.parameters(), torch.optim.AdamW, rho=0.2, **ADAMW)
    else:
        opt = SAM(torch.optim.AdamW(ours.parameters(), **ADAMW), rho=0.2)
    train(ours, opt, data)
    textbook_sam(theirs, torch.optim.AdamW(theirs.parameters(), **ADAMW), data, 0.2)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-12, atol=1e-13)


def test_without_perturb_it_is_adamw(backend):
    dtype = torch.float64 if os.environ["RSAFT_BACKEND"] == "torch" else torch.float32  # kernels take no float64
    data = batches(10, dtype, device=backend)
    ours, theirs = network(dtype, device=backend), network(dtype, device=backend)
    train(ours, SAMAdamW(ours.parameters(), **ADAMW), data, sharp=False)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **ADAMW), data, sharp=False)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-13
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=tolerance, atol=tolerance)


def test_with_perturb_it_is_sam_around_adamw(backend):
    data = batches(5, device=backend)
    ours, theirs = network(device=backend), network(device=backend)
    train(ours, SAMAdamW(ours.parameters(), rho=0.1, **ADAMW), data)
    train(theirs, SAM(theirs.parameters(), torch.optim.AdamW, rho=0.1, **ADAMW), data)
    assert (weights(ours) - weights(theirs)).norm() < 1e-4 * (weights(theirs) - weights(network())).norm()


def test_each_group_keeps_its_own_radius_rate_and_decay():
    data = batches(12, torch.float64)
    ours, theirs = network(torch.float64), network(torch.float64)

    def groups(model):
        options = [dict(lr=0.01, weight_decay=0.3), dict(lr=0.03, betas=(0.5, 0.9))]
        return [{"params": list(part.parameters()), **o} for part, o in zip((model[0], model[2:]), options)]

    for opt_type in (SAMAdamW, lambda p: SAM(p, torch.optim.AdamW)):
        ours = network(torch.float64)
        train(ours, opt_type([{**g, "rho": r} for g, r in zip(groups(ours), (0.02, 0.5))]), data)
        theirs = network(torch.float64)
        rho_of = {p: (0.02 if p in set(theirs[0].parameters()) else 0.5) for p in theirs.parameters()}
        textbook_sam(theirs, torch.optim.AdamW(groups(theirs)), data, None, rho_of=rho_of)
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-11)


def test_gradient_accumulation_equals_one_batch():
    whole, parts = network(torch.float64), network(torch.float64)
    first, second = SAMAdamW(whole.parameters(), rho=0.3), SAMAdamW(parts.parameters(), rho=0.3)
    for x, y in batches(5, torch.float64):
        train(whole, first, [(x, y)])
        second.zero_grad()
        for micro in zip(x.chunk(4), y.chunk(4)):
            (loss_of(parts, micro) / 4).backward()
        with second.perturbed(zero_grad=True):
            for micro in zip(x.chunk(4), y.chunk(4)):
                (loss_of(parts, micro) / 4).backward()
            second.step()
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_keep_what_low_precision_loses(backend, dtype):
    """Against the run in float64 from the same start: closer than torch's AdamW on the low-precision weights."""
    data = batches(15, dtype, device=backend)
    exact = network(dtype).double()
    exact_data = [(x.cpu().double(), y.cpu().double()) for x, y in data]
    train(exact, torch.optim.AdamW(exact.parameters(), lr=1e-4, eps=1e-4), exact_data, sharp=False)
    ours, plain = network(dtype, device=backend), network(dtype, device=backend)
    opt = SAMAdamW(ours.parameters(), lr=1e-4, eps=1e-4)  # fp16 holds no smaller eps
    train(ours, opt, data, sharp=False)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-4, eps=1e-4), data, sharp=False)
    masters = torch.cat([opt.state[p]["master"].double().cpu().reshape(-1) for p in ours.parameters()])
    assert (masters - weights(exact)).norm() < 0.5 * (weights(plain) - weights(exact)).norm()
