"""Restore is exact to the bit, whatever happens between the two passes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optim.networks import batches, bits, loss_of, network
from rsaft_fast.optim import SAM, SAMAdamW

pytestmark = pytest.mark.filterwarnings("ignore:.*without a float32 master")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sgd_sam(params, **options):
    return SAM(params, torch.optim.SGD, lr=0.1, **options)


MAKERS = {
    "SAM": sgd_sam,
    "SAMAdamW": SAMAdamW,
    "SAMAdamW without master": lambda p, **o: SAMAdamW(p, master_weights=False, **o),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def random_gradients(model, generator):
    for p in model.parameters():
        scale = 10.0 ** torch.randint(-4, 3, (), generator=generator).item()
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_cycles(dtype, make):
    model = network(dtype)
    before = bits(model)
    storage = [p.data_ptr() for p in model.parameters()]
    opt = make(model.parameters(), rho=0.5)
    generator = torch.Generator().manual_seed(3)
    moved = 0
    for cycle in range(1000):
        random_gradients(model, generator)
        if cycle % 7 == 3:
            next(model.parameters()).grad[0, 0] = float("nan")
        opt.perturb(zero_grad=True)
        moved += not torch.equal(bits(model), before)
        opt.restore()
        assert torch.equal(bits(model), before), cycle
    assert moved == 1000 - 143
    assert [p.data_ptr() for p in model.parameters()] == storage


@pytest.mark.parametrize("dtype", DTYPES)
def test_cycles_on_every_backend(backend, dtype, make):
    model = network(dtype, device=backend)
    before = bits(model)
    opt = make(model.parameters(), rho=0.5)
    generator = torch.Generator().manual_seed(4)
    for _ in range(2):
        random_gradients(model, generator)
        opt.perturb()
        assert not torch.equal(bits(model), before)
        opt.restore()
        assert torch.equal(bits(model), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", DTYPES)
def test_when_the_second_forward_raises(dtype, make, error):
    model = network(dtype)
    opt = make(model.parameters(), rho=1.0)
    loss_of(model, batches(1, dtype)[0]).backward()
    before = bits(model)
    with pytest.raises(error), opt.perturbed(zero_grad=True):
        assert not torch.equal(bits(model), before)
        raise error
    assert torch.equal(bits(model), before) and not opt.is_perturbed
    with opt.perturbed():  # and the optimizer goes on
        opt.step()


def test_when_a_closure_raises_in_the_second_pass(make):
    model = network()
    opt = make(model.parameters(), rho=1.0)
    before, calls = bits(model), []

    def closure():
        calls.append(bits(model))
        if len(calls) == 2:
            raise ValueError("no second loss")
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="no second loss"):
        opt.step(closure)
    assert not torch.equal(calls[1], before)
    assert torch.equal(bits(model), before) and not opt.is_perturbed


@pytest.mark.parametrize(("bad_pass", "bad"), [(1, float("nan")), (2, float("inf"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_gradient_skips_the_step_and_is_counted(backend, dtype, make, bad_pass, bad):
    model, batch = network(dtype, device=backend), batches(1, dtype, device=backend)[0]
    opt = make(model.parameters(), rho=1.0)

    def step(poisoned_pass):
        for number in (1, 2):
            opt.zero_grad()
            loss_of(model, batch).backward()
            if number == poisoned_pass:
                model[3].weight.grad[1, 2] = bad
            if number == 1:
                opt.perturb()
        opt.step()

    step(None)
    before = bits(model)
    moments = {p: {k: v.clone() for k, v in s.items() if torch.is_tensor(v)} for p, s in opt.state.items()}
    step(bad_pass)
    assert torch.equal(bits(model), before)
    assert all(torch.equal(opt.state[p][k], v) for p, s in moments.items() for k, v in s.items())
    assert int(opt.skipped) == opt.stats()["skipped"] == 1
    step(None)
    assert not torch.equal(bits(model), before)
    assert int(opt.skipped) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_without_a_gradient_in_one_pass(backend, dtype, make):
    model, batch = network(dtype, device=backend), batches(1, dtype, device=backend)[0]
    opt = make(model.parameters(), rho=1.0)
    loss_of(model, batch).backward()
    model[0].bias.grad = None
    before = bits(model)
    first_bias, last_weight = (t.detach().clone() for t in (model[0].bias, model[3].weight))
    opt.perturb(zero_grad=True)
    assert torch.equal(model[0].bias, first_bias)  # no first gradient: not moved
    assert not torch.equal(model[3].weight, last_weight)
    loss_of(model, batch).backward()
    model[3].weight.grad = None
    opt.restore()
    assert torch.equal(bits(model), before)
    loss_of(model, batch).backward()
    opt.perturb(zero_grad=True)
    loss_of(model, batch).backward()
    model[3].weight.grad = None
    opt.step()
    assert torch.equal(model[3].weight, last_weight)  # no second gradient: restored, not updated
    assert not torch.equal(model[0].bias, first_bias)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=4), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from([*DTYPES, torch.float64]), min_size=5, max_size=5),
    channels_last=st.booleans(),
    rho=st.floats(1e-6, 1e3),
    adaptive=st.booleans(),
    master=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_mixture_of_parameters(shapes, dtypes, channels_last, rho, adaptive, master, seed):
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape, dtype in zip(shapes, dtypes):
        value = torch.randn(shape, generator=generator).to(dtype)
        if channels_last and value.dim() == 4:
            value = value.to(memory_format=torch.channels_last)
        params.append(torch.nn.Parameter(value))
    before = [p.detach().clone() for p in params]
    opt = SAMAdamW(params, rho=rho, adaptive=adaptive, master_weights=master)
    for p in params:
        if torch.rand((), generator=generator) < 0.8:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
    opt.perturb()
    opt.restore()
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    opt.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before) if p.grad is None)
    assert all(p.isfinite().all() for p in params)
