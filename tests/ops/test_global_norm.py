"""The global norm against exact summation in float64."""

import math

import pytest
import torch
from builders.messages import says
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ops.tables import LOW, SIZES, arrange, flat, random_table
from rsaft_fast import ops
from rsaft_fast.ops import CHUNK, TensorTable


def exact_norm(*lists) -> float:
    return math.sqrt(math.fsum((flat(sum(lists, [])) ** 2).tolist()))


def table_of(grads, device="cpu", **options):
    table = TensorTable([torch.zeros_like(g, device=device) for g in grads], **options)
    table.bind(grad=[g.to(device) for g in grads])
    return table


@pytest.mark.parametrize("layout", ["plain", "misaligned", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_norm_scale_and_flag(backend, dtype, layout):
    generator = torch.Generator().manual_seed(1)
    table, before = random_table(backend, dtype, generator, layout=layout, absent=(3, 5))
    table.sum_sq.fill_(float("nan"))
    norm = ops.global_norm(table, rho=0.3)
    expected = exact_norm(before["grad"])
    assert norm.norm.item() == pytest.approx(expected, rel=3e-7)
    assert norm.scale.tolist() == pytest.approx([0.3 / expected], rel=3e-7)
    assert norm.found_inf.item() == 0
    assert norm.norm.dtype == norm.scale.dtype == torch.float64 and norm.found_inf.dtype == torch.float32


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_gradients_lose_nothing(backend, dtype):
    grads = [torch.randn(size, generator=torch.Generator().manual_seed(2)).to(dtype) for size in SIZES]
    expected = exact_norm(grads)
    ours = abs(ops.global_norm(table_of(grads, backend)).norm.item() - expected)
    plain = abs(torch.nn.utils.get_total_norm(grads).item() - expected)
    assert ours <= 2 * plain and ours < 1e-6 * expected


def test_float64_is_exact():
    grads = [torch.randn(size, dtype=torch.float64) for size in SIZES]
    assert ops.global_norm(table_of(grads)).norm.item() == pytest.approx(exact_norm(grads), rel=1e-14)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 5000) | st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1]), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, *LOW]),
    layout=st.sampled_from(["plain", "misaligned"]),
    seed=st.integers(0, 2**31),
)
def test_any_sizes(backend, sizes, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    grads = [arrange(torch.randn(size, generator=generator).to(dtype), layout) for size in sizes]
    norm = ops.global_norm(table_of(grads, backend), rho=1.0)
    assert norm.norm.item() == pytest.approx(exact_norm(grads), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_one_bad_element_anywhere_raises_the_flag(backend, bad, where):
    grads = [torch.randn(CHUNK + 5), torch.randn(3), torch.randn(2 * CHUNK)]
    grads[where][-1] = bad
    norm = ops.global_norm(table_of(grads, backend), rho=1.0)
    assert norm.found_inf.item() == 1 and norm.scale.tolist() == [0.0]
    norm = ops.global_norm(table_of([torch.ones(2)], backend), rho=1.0, out=norm)  # and comes down again
    assert norm.found_inf.item() == 0 and norm.scale.item() > 0


def test_no_gradient_or_a_zero_one_has_scale_zero(backend):
    for grads in ([torch.zeros(5)], [torch.zeros(0)]):
        norm = ops.global_norm(table_of(grads, backend), rho=1.0)
        assert (norm.norm.item(), norm.scale.item(), norm.found_inf.item()) == (0, 0, 0)
    table = TensorTable([torch.zeros(3, device=backend)])
    table.bind(grad=[None])
    assert ops.global_norm(table, rho=1.0).norm.item() == 0


def test_groups_share_the_norm_and_keep_their_rho(backend):
    grads = [torch.randn(4000), torch.randn(9)]
    rho = torch.tensor([0.1, 0.7], dtype=torch.float64, device=backend)
    norm = ops.global_norm(table_of(grads, backend, group=[0, 1]), rho)
    assert norm.scale.tolist() == pytest.approx([r / exact_norm(grads) for r in (0.1, 0.7)], rel=1e-6)


def test_several_tables_are_one_norm(backend):
    low, full = [torch.randn(CHUNK + 7).bfloat16()], [torch.randn(50), torch.randn(3)]
    tables = [table_of(low, backend), table_of(full, backend)]
    assert ops.global_norm(tables).norm.item() == pytest.approx(exact_norm(low, full), rel=1e-6)


def test_adaptive_weighs_by_the_weights(backend):
    table, before = random_table(backend, torch.float32, torch.Generator().manual_seed(4), absent=(2,), adaptive=True)
    weighed = [w * g for w, g in zip(before["weight"], before["grad"]) if g is not None]
    assert ops.global_norm(table).norm.item() == pytest.approx(exact_norm(weighed), rel=1e-6)
    assert ops.global_norm(table, plain=True).norm.item() == pytest.approx(exact_norm(before["grad"]), rel=1e-6)


def test_the_same_bits_every_time(backend):
    grads = [torch.randn(3 * CHUNK + 11), torch.randn(77)]
    first = ops.global_norm(table_of(grads, backend), rho=0.1).values.clone()
    for _ in range(3):
        assert torch.equal(ops.global_norm(table_of([g.clone() for g in grads], backend), rho=0.1).values, first)


def test_tables_on_two_devices_are_refused():
    with pytest.raises(ValueError, match=says("tables", "cpu, meta")):
        ops.global_norm([table_of([torch.ones(2)]), TensorTable([torch.empty(2, device="meta")])])
