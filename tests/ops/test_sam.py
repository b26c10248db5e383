"""Perturb and restore against the formula in float64, and to the bit."""

import pytest
import torch
from builders.messages import says
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ops.tables import LOW, SIZES, bits, flat, random_table, same_bits
from rsaft_fast import ops
from rsaft_fast.ops import CHUNK, TensorTable

DTYPES = [torch.float32, *LOW]
CASES = [(torch.float32, False), *((dtype, master) for dtype in LOW for master in (False, True))]


def wanted_perturbation(table, before, rho):
    """w, e in float64: e = rho * t(w) * g / ||u * g||, with t = w^2, u = w for ASAM and 1 otherwise."""
    base = before.get("master", before["weight"])
    grads = [torch.zeros_like(w) if g is None else g for w, g in zip(base, before["grad"])]
    if table.adaptive:
        # The norm is taken over the weights that the gradient belongs to.
        norm = flat([w * g for w, g in zip(before["weight"], grads)]).norm()
        return base, [rho * w * w * g / norm for w, g in zip(base, grads)]
    return base, [rho * g / flat(grads).norm() for g in grads]


@pytest.mark.parametrize("layout", ["plain", "misaligned", "channels_last"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("dtype", "master"), CASES)
def test_perturbation_equals_the_formula(backend, dtype, master, adaptive, layout):
    generator = torch.Generator().manual_seed(5)
    table, before = random_table(
        backend, dtype, generator, layout=layout, absent=(3,), master=master, adaptive=adaptive
    )
    old = bits(table["weight"])
    ops.sam_perturb_(table, ops.global_norm(table, rho=2.0))
    base, wanted = wanted_perturbation(table, before, 2.0)
    exact = flat([w + e for w, e in zip(base, wanted)])
    # Plain torch in the same precision: float32 arithmetic, rounded once.
    plain = flat([(w.float() + e.float()).to(dtype) for w, e in zip(base, wanted)])
    touched = flat([torch.full_like(w, float(i != 3)) for i, w in enumerate(base)]) == 1
    ours = flat(table["weight"])
    assert (ours - exact)[touched].norm() <= 2 * (plain - exact)[touched].norm()
    if not master:
        assert same_bits(bits(table["backup"]), old)
    assert same_bits(bits([table["weight"][3]]), [old[3]])


@pytest.mark.parametrize(("dtype", "master"), CASES)
def test_what_was_applied_is_summed(backend, dtype, master):
    table, before = random_table(backend, dtype, torch.Generator().manual_seed(6), absent=(0,), master=master)
    old = flat(table["weight"])
    table.perturbation_sums.fill_(float("nan"))
    ops.sam_perturb_(table, ops.global_norm(table, rho=0.5))
    applied = flat(table["weight"]) - old
    wanted = flat(wanted_perturbation(table, before, 0.5)[1])
    expected = [applied @ applied, applied @ wanted, wanted @ wanted]
    assert table.perturbation_sums.sum(0).tolist() == pytest.approx([x.item() for x in expected], rel=1e-4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 3000) | st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1]), min_size=1, max_size=4),
    case=st.sampled_from(CASES),
    layout=st.sampled_from(["plain", "misaligned"]),
    seed=st.integers(0, 2**31),
)
def test_restore_is_exact_for_any_sizes(backend, sizes, case, layout, seed):
    dtype, master = case
    generator = torch.Generator().manual_seed(seed)
    table, _ = random_table(backend, dtype, generator, [(s,) for s in sizes], layout, master=master)
    if master:
        for weight, full in zip(table["weight"], table["master"]):
            weight.copy_(full)  # weights are their masters, rounded
    old = bits(table["weight"])
    norm = ops.global_norm(table, rho=0.7)
    ops.sam_perturb_(table, norm)
    ops.sam_restore_(table, norm)
    assert same_bits(bits(table["weight"]), old)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backup_keeps_every_bit_pattern(backend, dtype):
    """NaN payloads, infinities, subnormals, minus zero: the weights are data, whatever they hold."""
    kind = {2: torch.int16, 4: torch.int32}[torch.empty(0, dtype=dtype).element_size()]
    span = torch.iinfo(kind)
    pattern = torch.randint(span.min, span.max, (CHUNK + 100,), dtype=torch.int64).to(kind)
    weight = pattern.to(backend).view(dtype)
    table = TensorTable([weight])
    table.bind(grad=[torch.ones_like(weight)], backup=[torch.empty_like(weight)])
    norm = ops.global_norm(table, rho=1.0)
    ops.sam_perturb_(table, norm)
    ops.sam_restore_(table, norm)
    assert torch.equal(weight.view(kind).cpu(), pattern)


@pytest.mark.parametrize(("dtype", "master"), CASES)
def test_after_a_bad_gradient_neither_pass_writes(backend, dtype, master):
    table, _ = random_table(backend, dtype, torch.Generator().manual_seed(7), master=master)
    table["grad"][4][3] = float("nan")
    old = bits(table["weight"])
    norm = ops.global_norm(table, rho=1.0)
    ops.sam_perturb_(table, norm)
    assert same_bits(bits(table["weight"]), old)
    assert (table.perturbation_sums == 0).all()
    for backup in table["backup"] if "backup" in table else []:
        backup.fill_(float("nan"))  # this memory is not the weights': restoring from it would show
    ops.sam_restore_(table, norm)
    assert same_bits(bits(table["weight"]), old)


def test_a_zero_gradient_moves_nothing(backend):
    table, _ = random_table(backend, torch.float32, torch.Generator().manual_seed(8))
    table.bind(grad=[torch.zeros_like(w) for w in table["weight"]])
    old = bits(table["weight"])
    ops.sam_perturb_(table, ops.global_norm(table, rho=1.0))
    assert same_bits(bits(table["weight"]), old)


def test_float64_holds_the_radius_exactly():
    table, before = random_table("cpu", torch.float64, torch.Generator().manual_seed(9))
    ops.sam_perturb_(table, ops.global_norm(table, rho=0.05))
    assert (flat(table["weight"]) - flat(before["weight"])).norm().item() == pytest.approx(0.05, rel=1e-9)


def test_writes_are_seen_by_autograd(backend):
    weight = torch.randn(8, device=backend, requires_grad=True)
    loss = (weight**2).sum()  # backward needs the weight as it is now
    table = TensorTable([weight])
    table.bind(grad=[torch.ones_like(weight)], backup=[torch.empty_like(weight)])
    norm = ops.global_norm(table, rho=1.0)
    version = weight._version
    ops.sam_perturb_(table, norm)
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = weight._version
    ops.sam_restore_(table, norm)
    assert weight._version > version


def test_perturbing_without_a_way_back_is_refused():
    table = TensorTable([torch.randn(3)])
    table.bind(grad=[torch.randn(3)])
    old = bits(table["weight"])
    with pytest.raises(ValueError, match=says("sam_perturb_", "master", "table.bind(backup=")):
        ops.sam_perturb_(table, ops.global_norm(table, rho=1.0))
    assert same_bits(bits(table["weight"]), old)


def test_the_same_bits_every_time(backend):
    results = []
    for _ in range(2):
        table, _ = random_table(backend, torch.bfloat16, torch.Generator().manual_seed(10), SIZES, master=True)
        ops.sam_perturb_(table, ops.global_norm(table, rho=3.0))
        results.append(bits(table["weight"]) + [table.perturbation_sums.cpu().clone()])
    assert same_bits(*results)


def test_table_operations_stay_out_of_traced_graphs():
    table, before = random_table("cpu", torch.float32, torch.Generator().manual_seed(11), [(40,)])
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count)
    def perturbed_sum(x):
        x = x + 1
        ops.sam_perturb_(table, ops.global_norm(table, rho=0.1))
        return x * 2

    assert torch.equal(perturbed_sum(torch.ones(3)), torch.full((3,), 4.0))
    assert (flat(table["weight"]) - flat(before["weight"])).norm().item() == pytest.approx(0.1, rel=1e-4)
    assert len(graphs) == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["plain", "misaligned", "channels_last"])
@pytest.mark.parametrize("finite", [True, False])
def test_the_backup_may_live_in_the_gradients_memory(backend, layout, finite):
    """Weights perturbed as with memory of its own; the old bits where the gradient was; restored to the bit."""
    own, _ = random_table(backend, torch.bfloat16, torch.Generator().manual_seed(51), layout=layout, absent=(3,))
    shared, _ = random_table(backend, torch.bfloat16, torch.Generator().manual_seed(51), layout=layout, absent=(3,))
    if not finite:
        for table in (own, shared):
            table["grad"][-1][-1] = float("nan")
    shared.bind(backup=shared["grad"])
    old, gradients = bits(shared["weight"]), bits(shared["grad"])
    norms = [ops.global_norm(table, rho=1.0) for table in (own, shared)]
    for table, norm in zip((own, shared), norms):
        ops.sam_perturb_(table, norm)
    assert same_bits(bits(own["weight"]), bits(shared["weight"]))
    kept = [i for i in range(len(shared)) if i != 3]
    assert same_bits(bits(shared["backup"]), [old[i] for i in kept] if finite else gradients)
    ops.sam_restore_(shared, norms[1])
    assert same_bits(bits(shared["weight"]), old)


def test_a_weight_that_nothing_could_bring_back_is_left_alone(backend):
    table, _ = random_table(backend, torch.float32, torch.Generator().manual_seed(52))
    table.bind(backup=[None if i == 5 else w for i, w in enumerate(table["backup"])])
    old = bits(table["weight"])
    norm = ops.global_norm(table, rho=1.0)
    ops.sam_perturb_(table, norm)
    moved = [not same_bits([a], [b]) for a, b in zip(old, bits(table["weight"]))]
    assert moved == [i not in (0, 5) for i in range(len(SIZES))]
    ops.sam_restore_(table, norm)
    assert same_bits(old, bits(table["weight"]))
