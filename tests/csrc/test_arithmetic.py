"""The kernels' arithmetic, compiled by the C++ compiler from the headers that nvcc reads, against float64 and torch."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from builders.philox import KNOWN_ANSWERS
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_quantize import nearest, table

from rsaft_fast.abi import philox, quantize

HERE = Path(__file__).parent
CODES = torch.arange(256, dtype=torch.uint8)
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def hooks(tmp_path_factory):
    path = tmp_path_factory.mktemp("hooks") / "hooks.so"
    options = "-O1 -std=c++17 -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas -fPIC -shared".split()
    sources = ["-I", str(HERE.parents[1] / "csrc"), str(HERE / "hooks.cpp")]
    subprocess.run(["g++", *options, *sources, "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.hook_power.restype = ctypes.c_double
    library.hook_group_of.restype = ctypes.c_int64
    return library


def at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def encode(hooks, x: torch.Tensor, signed: bool) -> torch.Tensor:
    codes = torch.full(x.shape, 77, dtype=torch.uint8)
    hooks.hook_encode(int(signed), at(x), ctypes.c_int64(x.numel()), at(codes))
    return codes


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_has_its_value(hooks, signed):
    values = torch.full((256,), float("nan"))
    hooks.hook_decode(int(signed), at(values))
    assert torch.equal(values, quantize.dequantize(CODES, signed))
    torch.testing.assert_close(values.double(), table(signed), rtol=3e-7, atol=0)
    assert torch.equal(encode(hooks, values, signed), CODES)


@pytest.mark.parametrize("signed", [True, False])
def test_values_take_the_same_code_as_in_torch_to_the_bit(hooks, signed):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(400_000, generator=generator) * 10.0 ** (-9 * torch.rand(400_000, generator=generator))
    # Both sides of every edge between two codes, and of every power of two.
    values = table(signed)
    edges = torch.cat([(values[1:] + values[:-1]) / 2, values, 2.0 ** -torch.arange(0.0, 140.0)]).float().abs()
    near = edges[:, None].view(torch.int32) + torch.arange(-40, 41, dtype=torch.int32)
    x = torch.cat([x, near.clamp(min=0).view(torch.float32).flatten(), torch.tensor([0.0, 1e-45, 1e-38])])
    x = x.clamp(max=1 + 2**-23)
    x = torch.cat([x, -x]) if signed else x
    codes = encode(hooks, x, signed)
    assert torch.equal(codes, quantize.quantize(x, signed))
    assert (codes.long() != nearest(x, signed)).float().mean() < 0.1  # only those at the edges


@pytest.mark.parametrize("signed", [True, False])
def test_no_bit_pattern_leads_out_of_the_tables(hooks, signed):
    """Values that cannot be (a NaN, say, after an overflow) get some code, and touch no memory but their own."""
    patterns = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(2))
    x = torch.cat([patterns.int().view(torch.float32), torch.tensor([float("nan"), float("inf"), float("-inf")])])
    x = x[(x.abs() <= 1) | ~x.isfinite()]
    encode(hooks, x.contiguous(), signed)


@pytest.mark.parametrize(("counter", "seed", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(hooks, counter, seed, words):
    """Random123's known-answer vectors for philox4x32-10."""
    out = (ctypes.c_uint32 * 4)()
    hooks.hook_philox((ctypes.c_uint32 * 4)(*counter), ctypes.c_uint64(seed), out)
    assert tuple(out) == words


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    chunk=st.integers(0, 5),
    count=st.integers(1, 70),
    parameter=st.integers(0, 2**31 - 1),
    step=st.integers(0, 2**24),
    purpose=st.sampled_from([philox.PERTURBATION, philox.UPDATE]),
)
def test_elements_draw_the_bits_of_the_truth(hooks, seed, chunk, count, parameter, step, purpose):
    start = chunk * 256
    bits = torch.full((count,), -1, dtype=torch.int32)
    hooks.hook_random16(
        ctypes.c_int64(start), count, ctypes.c_uint64(seed), parameter, ctypes.c_double(step), purpose, at(bits)
    )
    expected = philox.random16(start + count, seed, torch.tensor(float(step)), parameter, purpose)[start:]
    assert torch.equal(bits.long(), expected)


def test_elements_beyond_two_to_the_35_draw_bits_of_their_own(hooks):
    """The pack's index takes two words of the counter."""
    draws = []
    for start in (0, 2**35):
        bits = torch.full((64,), -1, dtype=torch.int32)
        hooks.hook_random16(ctypes.c_int64(start), 64, ctypes.c_uint64(3), 1, ctypes.c_double(2), 0, at(bits))
        draws.append(bits)
    counter = tuple(torch.tensor([c], dtype=torch.int64) for c in (0, 1, 1, 4))
    first = philox.philox(counter, 3)[0]
    assert draws[1][0] == (first & 0xFFFF) and not torch.equal(*draws)


def test_rounding_follows_the_truth_for_every_kind_of_value(hooks):
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).int()
    specials = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 1e-45, 1e-40])
    x = torch.cat([patterns.view(torch.float32), specials])
    bits = torch.randint(0, 2**16, x.shape, generator=generator).int()
    stochastic, near = torch.zeros_like(x, dtype=torch.int16), torch.zeros_like(x, dtype=torch.int16)
    hooks.hook_round(at(x), at(bits), ctypes.c_int64(x.numel()), at(stochastic), at(near))
    finite = torch.isfinite(x)
    expected = philox.round_stochastically(x, bits.long()).view(torch.int16)
    assert torch.equal(stochastic[finite], expected[finite])
    assert torch.equal(near[finite], x.bfloat16().view(torch.int16)[finite])
    for rounded in (stochastic, near):
        back = rounded.view(torch.bfloat16)[~finite].float()
        assert torch.equal(back.isnan(), x[~finite].isnan())
        assert torch.equal(back[~back.isnan()], x[~finite][~back.isnan()])


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.99999])
@pytest.mark.parametrize("step", [0, 1, 2, 7, 1000, 100_001, 2**24])
def test_powers(hooks, beta, step):
    power = hooks.hook_power(ctypes.c_double(beta), ctypes.c_uint64(step))
    assert power == pytest.approx(beta**step, rel=1e-15 * max(step, 10), abs=1e-300)
    # What it is for: both bias corrections, in the float32 that the update uses.
    assert abs((1 - power) - (1 - beta**step)) <= 1e-9 * (1 - beta**step)


def test_the_update_against_float64(hooks):
    generator = torch.Generator().manual_seed(4)
    w, g, m = (torch.randn(50_000, generator=generator) for _ in range(3))
    v = torch.rand(50_000, generator=generator)
    row = torch.tensor([0.7, 1 - 1e-3, 0.1, 0.999, 0.001, 0.3, 1e-8, 1e-2])
    factor, decay, beta1_c, beta2, beta2_c, bias2_sqrt, eps, step_size = row.double()
    gd, md, vd = g.double() * factor, m.double(), v.double()
    md = md + (gd - md) * beta1_c
    vd = vd * beta2 + gd * gd * beta2_c
    wd = w.double() * decay - step_size * md / (vd.sqrt() / bias2_sqrt + eps)
    hooks.hook_adamw(at(w), at(g), at(m), at(v), ctypes.c_int64(len(w)), at(row))
    for ours, exact in ((w, wd), (m, md), (v, vd)):
        torch.testing.assert_close(ours.double(), exact, rtol=4e-7, atol=1e-7)


BUDGET = 24 * 2**20


def group_of(hooks, samples: int, sample_bytes: int) -> int:
    return hooks.hook_group_of(ctypes.c_int64(samples), ctypes.c_int64(sample_bytes))


def test_samples_that_fit_the_cache_share_a_group(hooks):
    megapixel = 3 * 1024 * 1024
    assert group_of(hooks, 32, 4 * megapixel) == 2
    assert group_of(hooks, 32, 2 * megapixel) == 4
    assert group_of(hooks, 4, 4 * 3 * 512 * 512) == 4  # all at once: one pair of launches
    assert group_of(hooks, 3, BUDGET + 4) == 1  # larger than the cache: alone


@given(st.integers(1, 2**20), st.integers(1, 2**27))
def test_groups_are_even_and_within_what_a_launch_takes(hooks, samples, sample_bytes):
    group = group_of(hooks, samples, sample_bytes)
    assert 1 <= group <= min(samples, 65535)
    assert group == 1 or group * sample_bytes <= BUDGET
    launches = -(-samples // group)
    most = max(1, min(BUDGET // sample_bytes, 65535))
    assert launches == -(-samples // most), "no more launches than full groups would take"
