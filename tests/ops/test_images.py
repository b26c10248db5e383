"""Image perturbation: the radius exactly, the right direction, and a proper torch operation."""

import pytest
import torch
from builders.messages import says
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ops.tables import LOW, misaligned
from rsaft_fast import ops
from rsaft_fast.ops import CHUNK

SHAPES = [(1, 1), (3, 7), (2, 3, 8, 8), (2, 3, 105, 105), (4, CHUNK + 1), (5, 0), (0, 3, 4), (6,)]


def expected_delta(grad, radius, norm):
    """From the definition, sample by sample, in float64."""
    out = torch.zeros_like(grad, dtype=torch.float64)
    for sample, g in enumerate(grad.double()):
        if g.numel() and g.isfinite().all() and g.any():
            direction = g.sign() if norm == "linf" else g / g.norm()
            out[sample] = -radius * direction * (g.numel() ** 0.5 if norm == "rms" else 1)
    return out


def length(delta, norm):
    delta = delta.double().flatten(1)
    return {
        "l2": delta.norm(dim=1),
        "rms": delta.pow(2).mean(1).sqrt(),
        "linf": delta.abs().amax(1),
    }[norm]


@pytest.mark.parametrize("norm", ["l2", "rms", "linf"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(backend, shape, norm):
    # One draw for every backend: the bounds are those of float32 itself, and with steps beyond 1 one element in a
    # million is on the edge of the absolute one.
    generator = torch.Generator().manual_seed(60)
    images = torch.rand(shape, generator=generator).to(backend)
    grad = torch.randn(shape, generator=generator).to(backend) * 1e-3
    exact = expected_delta(grad.cpu(), 0.3, norm)
    torch.testing.assert_close(ops.image_delta(grad, 0.3, norm).double().cpu(), exact, rtol=1e-6, atol=1e-9)
    moved = ops.perturb_images(images, grad, 0.3, norm)
    torch.testing.assert_close(moved.double().cpu(), images.double().cpu() + exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", ["l2", "rms", "linf"])
def test_each_sample_moves_by_exactly_the_radius(norm):
    grad = torch.randn(5, 3, 17, 19, dtype=torch.float64) * torch.tensor([1e-9, 1e-3, 1, 1e3, 1e9]).view(-1, 1, 1, 1)
    delta = ops.image_delta(grad, 0.01, norm)
    torch.testing.assert_close(length(delta, norm), torch.full((5,), 0.01, dtype=torch.float64), rtol=1e-14, atol=0)
    assert ((delta * grad).flatten(1).sum(1) < 0).all()  # against the reward


@pytest.mark.parametrize("norm", ["l2", "rms", "linf"])
def test_no_point_of_the_ball_has_a_lower_linear_reward(norm):
    grad = torch.randn(1, 50, dtype=torch.float64)
    best = (ops.image_delta(grad, 1.0, norm) * grad).sum()
    others = torch.randn(2000, 50, dtype=torch.float64)
    others = others / length(others, norm).view(-1, 1)
    assert best <= (others * grad).sum(1).min()


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_within_twice_plain_torch(backend, dtype):
    images, grad = torch.rand(3, 3, 40, 41).to(dtype), torch.randn(3, 3, 40, 41).to(dtype)
    exact = images.double() + expected_delta(grad, 4.0, "l2")
    plain = images - 4.0 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    ours = ops.perturb_images(images.to(backend), grad.to(backend), 4.0)
    assert ours.dtype == dtype
    assert (ours.cpu().double() - exact).norm() <= 2 * (plain.double() - exact).norm()


def test_delta_in_another_dtype(backend):
    grad = torch.randn(2, 3, 9, 9).bfloat16().to(backend)
    delta = ops.image_delta(grad, 0.5, dtype=torch.float32)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double().cpu(), expected_delta(grad.cpu(), 0.5, "l2"), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", ["l2", "rms", "linf"])
def test_zero_and_non_finite_samples_stay_and_leave_the_others_alone(backend, norm):
    images, grad = torch.rand(5, 3, 30, 31, device=backend), torch.randn(5, 3, 30, 31, device=backend)
    grad[0] = 0
    for sample, bad in ((1, float("nan")), (2, float("inf")), (3, float("-inf"))):
        grad[sample, -1, -1, -1] = bad
    delta = ops.image_delta(grad, 0.1, norm)
    assert (delta[:4] == 0).all()
    assert torch.equal(ops.perturb_images(images, grad, 0.1, norm)[:4], images[:4])
    torch.testing.assert_close(delta[4:], ops.image_delta(grad[4:], 0.1, norm), rtol=0, atol=0)


@pytest.mark.parametrize("arrange", ["channels_last", "misaligned", "strided", "expanded", "mixed"])
def test_any_layout(backend, arrange):
    images, grad = torch.rand(2, 3, 6, 10), torch.randn(2, 3, 6, 10)
    exact = images.double() + expected_delta(grad, 0.2, "l2")
    if arrange == "channels_last":
        images, grad = (t.to(memory_format=torch.channels_last) for t in (images, grad))
    elif arrange == "misaligned":
        images, grad = misaligned(images), misaligned(grad)
    elif arrange == "strided":
        images, grad = (torch.stack([t, t], -1)[..., 0] for t in (images, grad))
    elif arrange == "expanded":
        grad = grad[:, :, :1].expand(2, 3, 6, 10)
        exact = images.double() + expected_delta(grad, 0.2, "l2")
    else:
        grad = grad.to(memory_format=torch.channels_last)
    moved = ops.perturb_images(images.to(backend), grad.to(backend), 0.2)
    torch.testing.assert_close(moved.double().cpu(), exact, rtol=1e-6, atol=1e-7)
    if arrange == "channels_last":
        assert moved.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.integers(1, 4),
    elements=st.integers(1, 3000),
    norm=st.sampled_from(["l2", "rms", "linf"]),
    dtype=st.sampled_from([torch.float32, *LOW]),
    exponent=st.integers(-3, 2),
    seed=st.integers(0, 2**31),
)
def test_any_size(backend, samples, elements, norm, dtype, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    grad = (torch.randn(samples, elements, generator=generator) * 10.0**exponent).to(dtype).to(backend)
    delta = ops.image_delta(grad, 0.7, norm, dtype=torch.float32).double().cpu()
    torch.testing.assert_close(delta, expected_delta(grad.cpu(), 0.7, norm), rtol=1e-5, atol=1e-7)


def test_the_same_bits_every_time(backend):
    grad = torch.randn(2, 2 * CHUNK + 5, device=backend)
    first = ops.image_delta(grad, 0.1)
    assert all(torch.equal(ops.image_delta(grad.clone(), 0.1), first) for _ in range(3))


@pytest.mark.parametrize(("dtype", "norm"), [(torch.float32, "l2"), (torch.bfloat16, "rms"), (torch.float32, "linf")])
def test_opcheck(backend, dtype, norm):
    images = torch.rand(2, 3, 5, 7, device=backend, dtype=dtype)
    grad = torch.randn_like(images)
    for arguments in ((images, grad), (images.to(memory_format=torch.channels_last), grad)):
        torch.library.opcheck(torch.ops.rsaft_fast.perturb_images, (*arguments, 0.1, norm))
    torch.library.opcheck(torch.ops.rsaft_fast.perturb_images, (images.clone().requires_grad_(), grad, 0.1, norm))
    torch.library.opcheck(torch.ops.rsaft_fast.image_delta, (grad, 0.1, norm, torch.float32))


def test_it_compiles_without_a_graph_break(backend):
    images, grad = torch.rand(2, 3, 5, 7, device=backend), torch.randn(2, 3, 5, 7, device=backend)

    def loss(images, grad):
        return (ops.perturb_images(images, grad, 0.1) * 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, grad), loss(images, grad))
    torch._dynamo.reset()


def test_the_perturbation_is_a_constant_to_autograd(backend):
    images = torch.rand(2, 3, 4, 4, device=backend, requires_grad=True)
    grad = torch.randn(2, 3, 4, 4, device=backend, requires_grad=True)
    weights = torch.randn(2, 3, 4, 4, device=backend)
    (ops.perturb_images(images, grad, 0.1) * weights).sum().backward()
    assert torch.equal(images.grad, weights) and grad.grad is None


@pytest.mark.parametrize("call", [lambda g, *a: ops.image_delta(g, *a), lambda g, *a: ops.perturb_images(g, g, *a)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "radius=0.0"),
        ((-1.0,), "radius=-1.0"),
        ((float("nan"),), "radius=nan"),
        ((float("inf"),), "radius=inf"),
        ((0.1, "l1"), says("norm='l1'", "l2, rms, linf")),
    ],
)
def test_bad_radius_or_norm(call, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3), *arguments)


def test_bad_tensors():
    with pytest.raises(ValueError, match=says("images", "(2, 3)", "gradient", "(3, 2)")):
        ops.perturb_images(torch.rand(2, 3), torch.rand(3, 2), 0.1)
    with pytest.raises(ValueError, match=says("(B, ...)", "torch.int64", "(2, 3)")):
        ops.image_delta(torch.ones(2, 3, dtype=torch.int64), 0.1)
    with pytest.raises(ValueError, match=says("(B, ...)", "torch.float32", "()")):
        ops.image_delta(torch.tensor(1.0), 0.1)
