"""The closed form against the published table of values, and against bitsandbytes' own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsaft_fast.abi import quantize

CODES = torch.arange(256, dtype=torch.uint8)


def table(signed: bool) -> torch.Tensor:
    """The dynamic map as it is defined (arXiv 2110.02861, section 2.3), in float64: midpoints of equal parts."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles.tolist(), *((-middles).tolist() if signed else ())]
    return torch.tensor(sorted(values), dtype=torch.float64)


def nearest(x: torch.Tensor, signed: bool) -> torch.Tensor:
    values = table(signed)
    return torch.searchsorted((values[1:] + values[:-1]) / 2, x.double())


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_has_its_value(signed):
    torch.testing.assert_close(quantize.dequantize(CODES, signed).double(), table(signed), rtol=3e-7, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_has_its_code(signed):
    assert torch.equal(quantize.quantize(table(signed).float(), signed), CODES)


@pytest.mark.parametrize("signed", [True, False])
def test_values_take_the_nearest_code(signed):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(100_000, generator=generator) * 10.0 ** (-8 * torch.rand(100_000, generator=generator))
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, 1.0, -1.0])]) if signed else x
    codes = quantize.quantize(x, signed).long()
    # Half way between two values, float32 may fall to either side.
    values = table(signed)
    assert torch.equal(
        (values[codes] - x.double()).abs() <= (values[nearest(x, signed)] - x.double()).abs() * (1 + 1e-5), codes >= 0
    )
    assert (codes != nearest(x, signed)).float().mean() < 1e-4


@given(st.integers(0, 700), st.booleans(), st.floats(-30, 30), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_blocks_come_back_within_half_a_step(count, signed, exponent, seed):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    x = x if signed else x.abs()
    codes, absmax = quantize.quantize_blocks(x, signed)
    assert codes.shape == x.shape and absmax.shape == (quantize.blocks(count),)
    back = quantize.dequantize_blocks(codes, absmax, signed)
    # The widest step, in the last decade, is 0.9 / 64 (signed) or 0.9 / 128; the largest value is 1 when positive.
    limit = absmax.repeat_interleave(quantize.BLOCK)[:count] * (0.9 / (64 if signed else 128)) * 0.5001
    assert ((back - x).abs() <= limit).all()


def test_a_block_of_zeros_and_a_subnormal_one_stay_finite():
    for signed in (True, False):
        for x in (torch.zeros(256), torch.full((256,), 1e-40)):
            codes, absmax = quantize.quantize_blocks(x, signed)
            assert torch.equal(quantize.dequantize(codes, signed), torch.zeros(256)) and torch.isfinite(absmax).all()


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=signed)
    torch.testing.assert_close(quantize.dequantize(CODES, signed), theirs, rtol=3e-7, atol=0)
