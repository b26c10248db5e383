"""The kernels through Triton's interpreter: what only they have, and the cases of tests/ops and tests/optim.

The latter, and the tests here that name the interpreter, run in a process of their own that interprets throughout.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsaft_fast.abi import quantize
from rsaft_fast.abi.philox import UPDATE, philox
from rsaft_fast.ops import CHUNK, GradientNorm, StepInputs, StepScalars, TensorTable, reference

TESTS = Path(__file__).parents[1]
interpreted = pytest.mark.parametrize("_", ["triton-interpreter"])


@pytest.mark.slow
def test_through_the_interpreter():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("already interpreting: these tests are in this very run")
    folders = [TESTS / "ops", TESTS / "optim", __file__]
    command = [sys.executable, "-m", "pytest", *folders, "-k", "triton-interpreter", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, "-q"], env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # With -q twice over (the configuration has one) pytest prints dots only.
    dots = "".join(re.findall(r"^([.s]+) +\[ *\d+%\]$", done.stdout, re.MULTILINE))
    assert dots.count(".") > 100, done.stdout[-2000:]


@interpreted
@pytest.mark.parametrize("signed", [True, False])
def test_codes_equal_their_definition_to_the_bit(_, signed):
    from triton_kernels.one_block import dequantize_kernel, quantize_kernel

    codes = torch.arange(256, dtype=torch.uint8)
    values = torch.full((256,), float("nan"))
    dequantize_kernel[(1,)](codes, values, signed, 256)
    truth = quantize.dequantize(codes, signed)
    assert torch.equal(values, truth)

    # At and around every limit, at every value and midpoint, and anywhere over eight decades.
    ordered = truth.abs().sort().values
    limits = [*quantize.decade_limits(signed), quantize.zero_limit(signed), quantize.one_limit(signed), 1.5]
    places = torch.cat([torch.tensor(limits), ordered, (ordered[1:] + ordered[:-1]) / 2])
    around = places.view(torch.int32)[:, None] + torch.arange(-8, 9, dtype=torch.int32)
    anywhere = torch.rand(1 << 16) * 10 ** (-8 * torch.rand(1 << 16))
    x = torch.cat([around.clamp(min=0).reshape(-1).view(torch.float32), anywhere])
    x = torch.cat([x, -x if signed else x, torch.zeros(1 << 18)])[: 1 << 18]
    out = torch.full(x.shape, 99, dtype=torch.uint8)
    quantize_kernel[(1,)](x, out, signed, x.numel())
    assert torch.equal(out, quantize.quantize(x, signed))


@interpreted
@pytest.mark.parametrize("first", [0, 2**35 - 2048, 2**36])
def test_random_bits_count_on_beyond_32_bits(_, first):
    """A tensor of 2^36 elements has more packs of eight than one word counts."""
    from triton_kernels.one_block import random16_kernel

    seed, parameter, step = 2**63 + 5, 70000, 9
    out = torch.zeros(4096, dtype=torch.int64)
    random16_kernel[(1,)](out, seed, torch.tensor([parameter], dtype=torch.int32), torch.tensor([9.0]), first, 4096)
    pack = first // 8 + torch.arange(512)
    fixed = (torch.full_like(pack, parameter), torch.full_like(pack, 2 * step + UPDATE))
    words = torch.stack(philox((pack & 0xFFFFFFFF, pack >> 32, *fixed), seed), dim=1)
    assert torch.equal(out, torch.stack([words & 0xFFFF, words >> 16], dim=2).view(-1))


@interpreted
@pytest.mark.parametrize("shape", [(3, 1000), (32, 77), (1, 1), (5, 0)])
def test_three_bf16_parts_are_those_of_plain_torch(_, shape):
    from rsaft_fast.backbones.lora_linear import LEFT, RIGHT
    from rsaft_fast.ops import reference
    from rsaft_fast.ops.split_bf16 import PARTS

    kernels = importlib.import_module("rsaft_fast.kernels")
    wide = torch.randn(shape) * 10 ** (8 * torch.rand(shape) - 4)
    for order in (PARTS, LEFT, RIGHT):
        expected = reference.bf16_parts(wide, order)
        assert torch.equal(kernels.bf16_parts(wide, order), expected)
        assert torch.equal(kernels.bf16_parts(wide.T.contiguous().T, order), expected)


@interpreted
@pytest.mark.parametrize("images_too", [True, False])
def test_groups_of_samples_give_the_same_bits(_, monkeypatch, images_too):
    """Each sample's norm and step are its own, however many samples fit into the cache at once."""
    module = importlib.import_module("rsaft_fast.kernels.perturb_images")
    grad, images = torch.randn(5, CHUNK + 7), torch.rand(5, CHUNK + 7)
    results = []
    for group_bytes in (module.GROUP_BYTES, 2 * 4 * (CHUNK + 7), 1):  # all five, two at a time, one at a time
        monkeypatch.setattr(module, "GROUP_BYTES", group_bytes)
        out = torch.full_like(grad, float("nan"))
        module.step_against_(out, images if images_too else None, grad, 0.1, "l2")
        results.append(out)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@interpreted
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("bad", [None, "norm", "first", "scaler"])
def test_the_last_launch_of_a_norm_writes_what_the_step_needs(_, tables, released, bad):
    """Coefficients, step counts, skip flag and counter of every table, as the definition has them."""
    kernels = importlib.import_module("rsaft_fast.kernels")

    def prepare():
        out = []
        for index in range(tables):
            weights = [torch.zeros(3 + i) for i in range(5 + index)]
            table = TensorTable(weights, group=[i % 2 for i in range(len(weights))])
            table.bind(grad=[None if i == 1 else torch.zeros_like(w) for i, w in enumerate(weights)])
            table.steps.copy_(torch.arange(len(weights)))
            table.coefficients.fill_(float("nan"))
            out.append(table)
        scalars = StepScalars("cpu", groups=2)
        scalars.hyper.copy_(torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.1, 0.5], [1e-2, 0.8, 0.99, 1e-6, 0.0, 9e9]]))
        norms = [GradientNorm("cpu", groups=2) for _ in range(2)]
        norms[0].found_inf.fill_(float(bad == "first"))
        norms[1].found_inf.fill_(1.0)  # stale: what this norm finds must count, not what an earlier one left
        flag = torch.tensor(float(bad == "scaler"))
        return out, norms[1], StepInputs(scalars, norms[0], torch.tensor(64.0), flag, released)

    found = []
    for module in (kernels, reference):
        step_tables, norm, inputs = prepare()
        slots = [torch.rand(700, generator=torch.Generator().manual_seed(i)).double() for i in range(tables)]
        slots[0][3] = float("inf") if bad == "norm" else 1.0
        module.finish_norm(slots, norm, torch.tensor([0.1, 0.2], dtype=torch.float64), step_tables, inputs)
        results = [norm.values, norm.found_inf, inputs.scalars.skip, inputs.scalars.skipped]
        found.append(results + [r for table in step_tables for r in (table.coefficients, table.steps)])
    for ours, truth in zip(*found):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0, equal_nan=True)
    assert found[0][2].item() == found[0][3].item() == float(bad is not None)
