"""On a real device: 8-bit moments, stochastic rounding, backups in gradients, single tensors, groups of images."""

import pytest
import torch
from ops.tables import bits as bits_of
from ops.tables import random_table, same_bits
from triton_kernels.test_gpu import (  # noqa: F401
    bits,
    forced,
    give,
    gradients,
    no_synchronisation,
    parameters,
    replayed_and_eager,
    sharp_step,
)

from rsaft_fast import ops
from rsaft_fast.abi.quantize import blocks
from rsaft_fast.ops import StepInputs
from rsaft_fast.optim import SAMAdamW

pytestmark = pytest.mark.gpu

STATE = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
LOW = dict(state_bits=8, master_weights=False)
OPTIONS = {
    "8-bit": dict(state_bits=8),
    "8-bit, no master": LOW,
    "stochastic": dict(stochastic_rounding=True),
    "8-bit, stochastic": dict(state_bits=8, stochastic_rounding=True),
    "8-bit, stochastic, backup in gradients": dict(state_bits=8, stochastic_rounding=True, backup="gradient"),
}


def state_of(opt, params):
    found = [opt.state[p][name] for p in params for name in sorted(opt.state[p]) if name != "step"]
    return bits_of(found)


@pytest.mark.filterwarnings("ignore:.*without a float32 master")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_never_waits_for_the_device(options):
    params = parameters(torch.bfloat16)
    opt = SAMAdamW(params, rho=0.1, max_grad_norm=1.0, **options)
    passes = [(gradients(params, 2 * i), gradients(params, 2 * i + 1)) for i in range(5)]
    sharp_step(opt, params, *passes[0])  # compiles
    with no_synchronisation():
        for first, second in passes[1:]:
            sharp_step(opt, params, first, second)
    assert int(opt.skipped) == 0


@pytest.mark.filterwarnings("ignore:.*without a float32 master")
@pytest.mark.parametrize("name", ["8-bit", "8-bit, no master", "stochastic", "8-bit, stochastic"])
def test_replays_of_a_graph_equal_eager_steps(name):
    """Random bits follow the device's step count: a replay draws anew, and what an eager step would have drawn."""

    def prepare():
        params = parameters(torch.bfloat16)
        give(params, gradients(params, 0))
        return params, SAMAdamW(params, lr=1e-3, rho=0.1, max_grad_norm=1.0, **OPTIONS[name])

    params, opt, eager_params, eager = replayed_and_eager(prepare)
    assert torch.equal(bits(params), bits(eager_params))
    assert same_bits(state_of(opt, params), state_of(eager, eager_params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_host(dtype, monkeypatch):
    """To the bit, over twenty steps: moments follow from gradients alone, without a root or a quotient."""
    sizes = ((1,), (255,), (300, 301), (ops.CHUNK + 257,))
    results = []
    for where in ("cuda", "cpu"):
        with monkeypatch.context() as context:
            if where == "cpu":
                context.setenv("RSAFT_BACKEND", "torch")
            table, _ = random_table(where, dtype, torch.Generator().manual_seed(3), sizes, state_bits=8)
            norm, scalars = ops.GradientNorm(where), ops.StepScalars(where)
            norm.norm.fill_(1.0)
            scalars.hyper.copy_(torch.tensor([1e-3, 0.9, 0.999, 1e-8, 0.01, float("inf")], dtype=torch.float64))
            generator, moments = torch.Generator().manual_seed(4), []
            for _ in range(20):
                table.bind(grad=[torch.randn(size, generator=generator).to(dtype).to(where) for size in sizes])
                ops.adamw_coefficients_(table, norm, StepInputs(scalars))
                ops.sam_adamw_step_(table, scalars)
                moments += bits_of([t for name in STATE for t in table[name]])
            results.append((moments, [w.cpu().float() for w in table["weight"]]))
    assert same_bits(results[0][0], results[1][0])
    for ours, theirs in zip(results[0][1], results[1][1]):
        # Roots and quotients may be off by a unit in the last place, which may tip a rounding.
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("seed", [None, 5])
def test_more_elements_than_an_int32_counts(seed):
    size = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 7 * size:
        pytest.skip(f"needs {7 * size / 2**30:.0f} GiB of free device memory")
    weight, grad = (torch.zeros(size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    places = [0, 2**30, 2**31 - 1, 2**31, size - 1]
    grad[places] = 3.0
    table = ops.TensorTable([weight], rounding_seed=seed)
    m = torch.full((size,), 127, dtype=torch.uint8, device="cuda")
    v = torch.zeros(size, dtype=torch.uint8, device="cuda")
    absmax, absmax_sq = (torch.zeros(blocks(size), device="cuda") for _ in range(2))
    table.bind(grad=[grad], exp_avg=[m], exp_avg_sq=[v], exp_avg_absmax=[absmax], exp_avg_sq_absmax=[absmax_sq])
    scalars = ops.StepScalars("cuda")
    scalars.hyper.copy_(torch.tensor([0.5, 0.9, 0.999, 1e-8, 0.0, float("inf")], dtype=torch.float64))
    ops.global_norm(table, inputs=StepInputs(scalars))
    ops.sam_adamw_step_(table, scalars)
    assert weight.count_nonzero().item() == len(places)
    assert weight[places].tolist() == pytest.approx([-0.5] * len(places), rel=1e-2)
    assert m[places].tolist() == v[places].tolist() == [255] * len(places)
    assert (m == 127).sum().item() == size - len(places) and v.count_nonzero().item() == len(places)
    touched = {place // 256 for place in places}
    assert absmax.count_nonzero().item() == absmax_sq.count_nonzero().item() == len(touched)
    assert absmax[sorted(touched)].tolist() == pytest.approx([0.3] * len(touched), rel=1e-5)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_tensors_stepped_alone_end_where_all_together_do(state_bits):
    sizes = ((33,), (257, 129), (ops.CHUNK - 1,), (3 * ops.CHUNK + 5,), (8, 4, 3, 3))
    names = STATE if state_bits == 8 else ("exp_avg", "exp_avg_sq")

    def prepare():
        generator = torch.Generator().manual_seed(6)
        options = dict(layout="channels_last", state_bits=state_bits, rounding_seed=9)
        table, _ = random_table("cuda", torch.bfloat16, generator, sizes, **options)
        scalars = ops.StepScalars("cuda")
        scalars.hyper.copy_(torch.tensor([1e-3, 0.9, 0.999, 1e-8, 0.01, float("inf")], dtype=torch.float64))
        second = [torch.empty_like(w).copy_(torch.randn(w.shape, generator=generator)) for w in table["weight"]]
        table.bind(backup=table["grad"])  # as released steps do: the old bits in the first gradients
        return table, scalars, second

    together, scalars, second = prepare()
    first = ops.global_norm(together, rho=1.0)
    ops.sam_perturb_(together, first)
    ops.adamw_coefficients_(together, first, StepInputs(scalars, first, released=True))
    together.bind(grad=second)
    ops.sam_adamw_step_(together, scalars, first=first, restore=True)

    alone, scalars, second = prepare()
    first = ops.global_norm(alone, rho=1.0)
    stream = torch.cuda.Stream()
    with no_synchronisation():
        ops.sam_perturb_(alone, first)
        alone.release("grad")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # as autograd may
            ops.adamw_coefficients_(alone, first, StepInputs(scalars, first, released=True))
            for i in reversed(range(len(sizes))):
                ops.sam_adamw_step_tensor_(alone, i, second[i], scalars, first=first)
        torch.cuda.current_stream().wait_stream(stream)
    for name in ("weight", *names):
        assert same_bits(bits_of(together[name]), bits_of(alone[name]))
    assert alone.steps.tolist() == [0] * len(sizes)


def test_released_gradients_in_one_backward_give_the_step_of_gradients_that_stay():
    results = []
    for release in (True, False):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(128, 128, bias=False) for _ in range(4)]
        model = torch.nn.Sequential(*layers).cuda().bfloat16()
        opt = SAMAdamW(model.parameters(), rho=0.05, **OPTIONS["8-bit, stochastic"], release_gradients=release)
        for step in range(5):
            x = torch.randn(16, 128, generator=torch.Generator().manual_seed(step)).cuda().bfloat16()
            model(x).square().mean().backward()
            opt.perturb(zero_grad=True)
            model(x).square().mean().backward()
            assert not release or all(p.grad is None for p in model.parameters())
            opt.step()
            opt.zero_grad()
        results.append(bits(list(model.parameters())))
    assert torch.equal(*results)


@pytest.mark.parametrize("norm", ["l2", "rms", "linf"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 3, 1024, 1024), torch.float32),  # 12.6 MB a sample: groups of one or two
        ((9, 3, 1024, 1024), torch.bfloat16),
        ((2, 3, 2048, 2048), torch.float32),  # a sample larger than any group
        ((70_000, 5), torch.float32),  # more samples than a grid is high
    ],
)
def test_images_in_groups_are_perturbed_as_each_alone(shape, dtype, norm):
    images, grad = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    grad[0] = 0
    grad[-1].view(-1)[-1] = float("inf")
    before = images.clone()
    with no_synchronisation():
        moved = ops.perturb_images(images, grad, 0.1, norm)
    for sample in {0, 1, len(images) // 2, len(images) - 2, len(images) - 1}:
        alone = ops.perturb_images(images[sample : sample + 1].clone(), grad[sample : sample + 1].clone(), 0.1, norm)
        assert torch.equal(moved[sample], alone[0])
    assert torch.equal(moved[0], images[0]) and torch.equal(moved[-1], images[-1])
    assert torch.equal(images, before)
    delta = (moved[1:-1].double() - images[1:-1].double()).flatten(1)
    assert ((delta * grad[1:-1].double().flatten(1)).sum(1) < 0).all()  # all others moved, against the reward
