"""The part of a gradient that opposes a direction is taken out, in the plain metric and in the optimizer's."""

import pytest
import torch

from rsaft_fast.optim import SAMAdamW
from rsaft_fast.optim.projection import adam_scales, project_out_


def drawn(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


SHAPES = ((3, 4), (5,), (2, 2))


@pytest.mark.parametrize("scaled", [False, True])
def test_what_opposes_goes_and_the_rest_stays(scaled):
    g, d = drawn(0, *SHAPES), drawn(1, *SHAPES)
    scales = [t.abs() + 0.1 for t in drawn(2, *SHAPES)] if scaled else None
    s = flat(scales) if scales else torch.ones(21, dtype=torch.float64)
    if (s * flat(g)) @ flat(d) > 0:
        d = [-t for t in d]
    before = flat([t.clone() for t in g])
    cosine = project_out_(g, d, scales)
    expected = before - (s * before) @ flat(d) / ((s * flat(d)) @ flat(d)) * flat(d)
    torch.testing.assert_close(flat(g), expected, rtol=1e-12, atol=1e-12)
    # The optimizer's step s * g moves neither along nor against d.
    assert abs(float((s * flat(g)) @ flat(d))) < 1e-12
    norm = lambda v: ((s * v) @ v).sqrt()  # noqa: E731
    assert float(cosine) == pytest.approx(float((s * before) @ flat(d) / norm(before) / norm(flat(d))))
    assert float(cosine) < 0


def test_a_gradient_that_agrees_is_left_to_the_bit():
    g, d = drawn(0, *SHAPES), drawn(1, *SHAPES)
    if flat(g) @ flat(d) < 0:
        d = [-t for t in d]
    before = flat([t.clone() for t in g])
    assert project_out_(g, d) > 0 and torch.equal(flat(g), before)


def test_missing_gradients_and_zero_directions_are_no_fault():
    g = drawn(0, *SHAPES)
    before = flat([t.clone() for t in g])
    assert project_out_(g, [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]) == 0
    assert project_out_([None, None], [None, g[0]]) == 0
    assert torch.equal(flat(g), before)


def test_the_scales_are_those_of_the_step_that_adamw_makes():
    parameters = [torch.nn.Parameter(t.float()) for t in drawn(3, *SHAPES)]
    optimizer = SAMAdamW(parameters, lr=1e-3, betas=(0.0, 0.9), weight_decay=0.0)
    assert adam_scales(optimizer) is None
    for seed in (4, 5):
        before = [p.detach().clone() for p in parameters]
        for p, g in zip(parameters, drawn(seed, *SHAPES)):
            p.grad = g.float()
        gradients = [p.grad.clone() for p in parameters]
        optimizer.step(plain=True)
    scales = adam_scales(optimizer)
    for p, old, g, s in zip(parameters, before, gradients, scales):
        torch.testing.assert_close(old - p.detach(), 1e-3 * s * g, rtol=1e-3, atol=1e-7)
