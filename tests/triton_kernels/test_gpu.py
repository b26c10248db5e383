"""On a real device: no synchronisation, capture and replay, side streams, moving gradients, huge tensors."""

from contextlib import contextmanager

import pytest
import torch
from builders.messages import says

from rsaft_fast import ops
from rsaft_fast.optim import SAM, SAMAdamW

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1,), (33,), (257, 129), (ops.CHUNK - 1,), (3 * ops.CHUNK + 5,), (8, 4, 3, 3)]


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def forced(request, monkeypatch):
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    obstacle = ops.backends.why_not(request.param, device)
    if obstacle is not None:
        pytest.skip(obstacle)
    monkeypatch.setenv("RSAFT_BACKEND", request.param)


@contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def parameters(dtype, device="cuda", seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
    values[-1] = values[-1].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(v.to(device)) for v in values]


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(p.shape, generator=generator) for p in params]
    return [torch.empty_like(p).copy_(g) for p, g in zip(params, grads)]


def give(params, grads):
    for p, g in zip(params, grads):
        p.grad = g


def bits(params):
    return torch.cat([p.detach().cpu().reshape(-1).view(torch.uint8) for p in params])


def sharp_step(opt, params, first, second):
    give(params, first)
    opt.perturb(zero_grad=True)
    give(params, second)
    opt.step()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_never_waits_for_the_device(dtype):
    params = parameters(dtype)
    opt = SAMAdamW(params, rho=0.1, max_grad_norm=1.0)
    passes = [(gradients(params, 2 * i), gradients(params, 2 * i + 1)) for i in range(6)]
    sharp_step(opt, params, *passes[0])  # compiles
    with no_synchronisation():
        for first, second in passes[1:]:
            opt.param_groups[0]["lr"] *= 0.9
            sharp_step(opt, params, first, second)
        with opt.perturbed():
            pass
    assert int(opt.skipped) == 0


def test_the_first_step_does_not_wait_either():
    warm = parameters(torch.float32)
    sharp_step(SAMAdamW(warm), warm, gradients(warm, 0), gradients(warm, 1))
    params = parameters(torch.float32)
    grads = gradients(params, 0), gradients(params, 1)
    with no_synchronisation():
        sharp_step(SAMAdamW(params), params, *grads)


def test_images_never_wait():
    images, grad = torch.rand(4, 3, 64, 64, device="cuda"), torch.randn(4, 3, 64, 64, device="cuda")
    expected = ops.perturb_images(images, grad, 0.1)
    with no_synchronisation():
        again = ops.perturb_images(images, grad, 0.1)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_device_and_host_agree(dtype, monkeypatch):
    """Twenty steps with moving gradient memory: a stale address or an overwritten upload would show."""
    on_device, on_host = parameters(dtype), parameters(dtype, "cpu")
    opts = [SAMAdamW(p, rho=0.1, lr=1e-3) for p in (on_device, on_host)]
    hold = []
    for step in range(20):
        hold.append(torch.empty(1 + step * 1000, device="cuda"))
        sharp_step(opts[0], on_device, gradients(on_device, 2 * step), gradients(on_device, 2 * step + 1))
        with monkeypatch.context() as context:
            context.setenv("RSAFT_BACKEND", "torch")
            sharp_step(opts[1], on_host, gradients(on_host, 2 * step), gradients(on_host, 2 * step + 1))
    for p, q in zip(on_device, on_host):
        weight, expected = (
            opt.state[x]["master"] if dtype != torch.float32 else x.detach() for opt, x in zip(opts, (p, q))
        )
        torch.testing.assert_close(weight.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_exact(dtype):
    params = parameters(dtype)
    opt = SAMAdamW(params, rho=10.0)
    before = bits(params)
    for cycle in range(200):
        give(params, gradients(params, cycle))
        opt.perturb()
        assert cycle % 50 or not torch.equal(bits(params), before)
        opt.restore()
    assert torch.equal(bits(params), before)


def replayed_and_eager(prepare):
    """Parameters and optimizer after 3 eager steps and 100 replays of a captured one, and after 103 eager steps."""

    def step(params, opt):
        # Both passes' gradients are made from the weights, on the device, in the same memory.
        for p in params:
            p.grad.copy_(p.detach() * 0.5)
        opt.perturb()
        for p in params:
            p.grad.copy_(p.detach() * 0.5 + 0.1)
        opt.step()

    eager_params, eager = prepare()
    params, opt = prepare()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(params, opt)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(params, opt)
    for _ in range(100):
        graph.replay()
    for _ in range(103):
        step(eager_params, eager)
    return params, opt, eager_params, eager


@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_of_a_graph_equal_eager_steps(dtype):
    def prepare():
        params = parameters(dtype)
        give(params, gradients(params, 0))
        lr = torch.tensor(1e-3, device="cuda")
        return params, SAMAdamW(params, lr=lr, rho=0.1, max_grad_norm=1.0)

    params, opt, eager_params, _ = replayed_and_eager(prepare)
    assert torch.equal(bits(params), bits(eager_params))
    assert opt.state[params[0]]["step"].item() == 103

    params[2].grad = params[2].grad.clone()
    with pytest.raises(RuntimeError, match=says("grad", "graph", "zero_grad(set_to_none=False)")):
        opt.perturb()


def test_capturing_with_gradients_that_moved_is_refused():
    params = parameters(torch.float32)
    opt = SAMAdamW(params)
    sharp_step(opt, params, gradients(params, 0), gradients(params, 1))
    before = bits(params)
    moved = gradients(params, 2)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=says("captured", "zero_grad(set_to_none=False)")), torch.cuda.graph(graph):
        give(params, moved)
        opt.perturb()
    assert torch.equal(bits(params), before)


def test_a_side_stream_gives_the_same_bits():
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        params = parameters(torch.bfloat16)
        opt = SAMAdamW(params, rho=0.1)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(10):
                torch.cuda._sleep(1_000_000)  # work in front: an operation on the wrong stream would overtake it
                sharp_step(opt, params, gradients(params, step), gradients(params, step + 50))
        stream.synchronize()
        results.append(bits(params))
    assert torch.equal(*results)


def test_a_fused_base_optimizer_never_waits():
    params = parameters(torch.float32)
    opt = SAM(params, torch.optim.AdamW, lr=1e-3, fused=True)
    passes = [(gradients(params, 2 * i), gradients(params, 2 * i + 1)) for i in range(3)]
    sharp_step(opt, params, *passes[0])
    with no_synchronisation():
        for first, second in passes[1:]:
            sharp_step(opt, params, first, second)


def test_grad_scaler_on_the_device():
    scaled, plain = (parameters(torch.float32) for _ in range(2))
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    opts = [SAMAdamW(p, rho=0.1, max_grad_norm=0.5) for p in (scaled, plain)]
    for step in range(5):
        first, second = gradients(plain, step), gradients(plain, step + 50)
        sharp_step(opts[1], plain, first, second)
        scaler.scale(torch.zeros((), device="cuda"))
        give(scaled, [g * 1024 for g in first])
        opts[0].perturb(zero_grad=True)
        give(scaled, [g * 1024 for g in second])
        scaler.step(opts[0])
        scaler.update()
    for p, q in zip(scaled, plain):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_more_elements_than_an_int32_counts():
    size = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 4 * size * 2:
        pytest.skip(f"needs {8 * size / 2**30:.0f} GiB of free device memory")
    weight = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    places = [0, 2**30, 2**31 - 1, 2**31, size - 1]
    grad[places] = 3.0
    table = ops.TensorTable([weight])
    table.bind(grad=[grad], backup=[torch.empty_like(weight)])
    norm = ops.global_norm(table, rho=1.0)
    assert norm.norm.item() == pytest.approx(3 * len(places) ** 0.5, rel=1e-6)
    ops.sam_perturb_(table, norm)
    assert weight.count_nonzero().item() == len(places)
    assert weight[places].tolist() == pytest.approx([len(places) ** -0.5] * len(places), rel=1e-2)
    ops.sam_restore_(table, norm)
    assert weight.count_nonzero().item() == 0
