"""The fused step over 8-bit moments: the update in float64 from the decoded ones, and bitsandbytes' own step."""

import mmap
import platform
import sys

import pytest
import torch
from builders.messages import says

from ops.tables import LOW, bits, decoded, flat, memory_order, poison, random_table, same_bits
from ops.test_adamw import adamw, scalars_for, take_step
from ops.test_quantize import nearest
from rsaft_fast import ops
from rsaft_fast.ops import CHUNK, StepInputs, TensorTable

SIZES = ((0,), (1,), (255,), (257,), (3, 5, 7, 9), (CHUNK - 1,), (CHUNK + 256,))
CASES = [(torch.float32, False), *((dtype, master) for dtype in LOW for master in (False, True))]
STATE = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")


def in_memory_order(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Float64 values of logical order, as they would lie in memory beside `like`."""
    arranged = torch.empty_like(like, dtype=torch.float64)
    return memory_order(arranged.copy_(values))


@pytest.mark.parametrize("layout", ["plain", "misaligned", "channels_last"])
@pytest.mark.parametrize(("dtype", "master"), CASES)
def test_step_equals_adamw_of_the_decoded_moments(backend, dtype, master, layout):
    generator = torch.Generator().manual_seed(31)
    table, before = random_table(
        backend, dtype, generator, SIZES, layout=layout, absent=(4,), master=master, state_bits=8
    )
    kept = [b for name in ("weight", *STATE) for b in bits([table[name][4]])]
    table.steps.fill_(4)
    take_step(table, scalars_for(backend))
    weights, first, second = adamw(before, step=5)
    assert same_bits(kept, [b for name in ("weight", *STATE) for b in bits([table[name][4]])])
    for i in (0, 1, 2, 3, 5, 6):
        exact, plain = weights[i], weights[i].to(dtype).double()
        error = (table["weight"][i].double().cpu() - exact).norm()
        assert error <= 2 * (plain - exact).norm() + 5e-7 * exact.norm()
        for name, moments, signed in (("exp_avg", first[i], True), ("exp_avg_sq", second[i], False)):
            codes = table[name][i].cpu()
            expected = in_memory_order(moments, codes)
            blocks = expected.split(256) if len(expected) else ()
            absmax = torch.tensor([block.abs().max() for block in blocks], dtype=torch.float64)
            torch.testing.assert_close(table[name + "_absmax"][i].double().cpu(), absmax, rtol=3e-6, atol=0)
            if len(expected):
                wanted = nearest(expected / absmax.repeat_interleave(256)[: len(expected)], signed)
                # A value at the edge between two codes falls to either side.
                difference = (memory_order(codes).long() - wanted).abs()
                assert difference.max() <= 1 and difference.float().mean() < 0.01


def test_ten_steps_stay_within_a_code_of_bitsandbytes(backend):
    theirs = pytest.importorskip("bitsandbytes.backends.triton.kernels_optim")
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(32)
    n, hyper = 3 * 256 * 5 + 100, dict(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    w = torch.randn(n, generator=generator)
    map1, map2 = (functional.create_dynamic_map(signed=signed) for signed in (True, False))
    p, m, v = w.clone(), torch.full((n,), 127, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
    m_max, v_max = torch.zeros(-(-n // 256)), torch.zeros(-(-n // 256))
    lists = dict(exp_avg=m, exp_avg_absmax=m_max, exp_avg_sq=v, exp_avg_sq_absmax=v_max)
    table = TensorTable([w.to(backend)])
    table.bind(**{name: [value.clone().to(backend)] for name, value in lists.items()})
    scalars = scalars_for(backend, **hyper)
    for step in range(1, 11):
        # From the same state each time: what is compared is one step, not how two roundings part.
        for name, value in lists.items():
            table[name][0].copy_(value)
        table["weight"][0].copy_(p)
        g = torch.randn(n, generator=generator) * 10.0 ** (torch.rand(n, generator=generator) * 4 - 4)
        table.bind(grad=[g.to(backend)])
        take_step(table, scalars)
        with torch.compiler.set_stance("force_eager"):  # it would compile itself, for a dozen seconds
            theirs.optimizer_update_8bit_blockwise_pytorch(
                p, g, m, v, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 0.01, map1, map2, m_max, v_max, 0.0, 1.0, False,
                optimizer_name="adam",
            )  # fmt: skip
        for name, value in lists.items():
            ours = table[name][0].cpu()
            if value.dtype is torch.uint8:
                assert (ours.int() - value.int()).abs().max() <= 1 and (ours != value).float().mean() < 0.01
            else:
                torch.testing.assert_close(ours, value, rtol=2e-6, atol=0)
        torch.testing.assert_close(table["weight"][0].cpu(), p, rtol=0, atol=2e-6)


@pytest.mark.parametrize("source", ["first", "second"])
def test_a_skipped_step_restores_and_keeps_every_code(backend, source):
    table, _ = random_table(backend, torch.bfloat16, torch.Generator().manual_seed(33), SIZES, state_bits=8)
    old = bits([t for name in ("weight", *STATE) for t in table[name]])
    if source == "first":
        table["grad"][3][0] = float("inf")
    first = ops.global_norm(table, rho=1.0)
    ops.sam_perturb_(table, first)
    second = [torch.randn_like(w) for w in table["weight"]]
    if source == "second":
        second[-1][CHUNK] = float("nan")
    table.bind(grad=second)
    take_step(table, scalars_for(backend), first=first, restore=True)
    assert same_bits(old, bits([t for name in ("weight", *STATE) for t in table[name]]))


def test_backends_give_the_same_codes(backend, monkeypatch):
    """To the bit: moments need no square root, the one operation in which torch differs from the kernels."""
    results = []
    for name in (None, "torch"):
        if name:
            monkeypatch.setenv("RSAFT_BACKEND", name)
        table, _ = random_table(backend, torch.float32, torch.Generator().manual_seed(34), SIZES, state_bits=8)
        norm = ops.GradientNorm(backend)
        norm.norm.fill_(1.0)
        scalars = scalars_for(backend)
        ops.adamw_coefficients_(table, norm, StepInputs(scalars))
        ops.sam_adamw_step_(table, scalars)
        results.append([b for name in STATE for b in bits(table[name])])
    assert same_bits(*results)


def test_one_tensor_alone_from_a_gradient_of_its_own(backend):
    """As released gradients do it: the others stay perturbed, and the step is the same as all together."""
    together, _ = random_table(backend, torch.bfloat16, torch.Generator().manual_seed(35), SIZES, state_bits=8)
    alone, _ = random_table(backend, torch.bfloat16, torch.Generator().manual_seed(35), SIZES, state_bits=8)
    second = [torch.randn(w.shape, generator=torch.Generator().manual_seed(36)).to(w) for w in together["weight"]]
    for table in (together, alone):
        first = ops.global_norm(table, rho=1.0)
        ops.sam_perturb_(table, first)
        scalars = scalars_for(backend)
        ops.adamw_coefficients_(table, first, StepInputs(scalars, first, released=table is alone))
        if table is together:
            table.bind(grad=second)
            ops.sam_adamw_step_(table, scalars, first=first, restore=True)
            continue
        assert table.steps.tolist() == [0] * len(table)
        for i in (6, 2, 5, 3, 0, 1):
            others = bits([w for j, w in enumerate(table["weight"]) if j != i])
            ops.sam_adamw_step_tensor_(table, i, second[i], scalars, first=first)
            assert same_bits(others, bits([w for j, w in enumerate(table["weight"]) if j != i]))
        ops.sam_restore_(table, first, 4)
        assert same_bits(bits([table["weight"][4]]), bits([table["backup"][4]]))
    kept = [0, 1, 2, 3, 5, 6]
    for name in ("weight", *STATE):
        assert same_bits(bits([together[name][i] for i in kept]), bits([alone[name][i] for i in kept]))


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="asks Linux on x86-64 for the place"
)
def test_a_gradient_may_lie_below_two_gigabytes(backend):
    """An address that fits 32 bits is still one of 64: it is passed by itself here, not in the table."""
    if backend.type != "cpu":
        pytest.skip("addresses of GPU memory are high")
    map_32bit = 0x40
    room = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_32bit)
    low = torch.frombuffer(room, dtype=torch.bfloat16, count=300).copy_(torch.randn(300))
    assert low.data_ptr() < 2**31
    results = []
    for grad in (low, low.clone()):
        table, _ = random_table(backend, torch.bfloat16, torch.Generator().manual_seed(37), [(300,)], state_bits=8)
        first = ops.global_norm(table, rho=1.0)
        ops.sam_perturb_(table, first)
        scalars = scalars_for(backend)
        ops.adamw_coefficients_(table, first, StepInputs(scalars, first, released=True))
        ops.sam_adamw_step_tensor_(table, 0, grad, scalars, first=first)
        results.append(bits([table[name][0] for name in ("weight", *STATE)]))
    assert same_bits(*results)


def test_an_absmax_of_another_shape_is_refused(backend):
    table, _ = random_table(backend, torch.bfloat16, torch.Generator(), [(300,)], state_bits=8)
    with pytest.raises(ValueError, match=says("exp_avg_absmax 0", "torch.float32", "(1,)", "(2,)")):
        table.bind(exp_avg_absmax=[torch.zeros(1, device=backend)])


def test_moments_are_only_as_wide_as_their_codes(backend):
    table, _ = random_table(backend, torch.bfloat16, torch.Generator(), [(CHUNK,)], state_bits=8)
    assert sum(t.numel() * t.element_size() for name in STATE for t in table[name]) == CHUNK * 2 + CHUNK // 256 * 8
    assert flat(decoded(table, "exp_avg")).numel() == CHUNK and poison(table["weight"][0]).isnan().all()
