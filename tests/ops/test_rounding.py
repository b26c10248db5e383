"""Stochastic rounding: Philox's known answers, no bias, and bits that depend on nothing but what is rounded."""

import pytest
import torch
from builders.messages import says
from builders.philox import KNOWN_ANSWERS

from ops.tables import bits, flat, random_table, same_bits
from ops.test_adamw import adamw, scalars_for, take_step
from rsaft_fast import ops
from rsaft_fast.abi.philox import UPDATE, philox, random16, round_stochastically
from rsaft_fast.ops import CHUNK, StepInputs


@pytest.mark.parametrize(("counter", "seed", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, seed, words):
    """Random123's known-answer vectors for philox4x32-10."""
    out = philox(tuple(torch.tensor([c], dtype=torch.int64) for c in counter), seed)
    assert tuple(int(word) for word in out) == words


def test_rounding_is_unbiased_and_goes_to_a_neighbour():
    n = 200_000
    step = torch.tensor(3.0)
    for value in (1.0 + 2**-9 + 2**-12, -3.3e-5, 7.7e20, 1e-40):
        x = torch.full((n,), value)
        out = round_stochastically(x, random16(n, 5, step, 2, UPDATE)).double()
        low, high = out.min(), out.max()
        assert low <= x[0].double() <= high and len(out.unique()) <= 2
        # Four standard deviations of a mean of n draws between two neighbours.
        assert (out.mean() - x[0].double()).abs() <= 4 * (high - low) / 2 / n**0.5


def test_what_bf16_holds_stays_and_what_is_not_finite_too():
    x = torch.tensor([1.0, -0.5, 0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.3895313892515355e38])
    out = round_stochastically(x, torch.full((8,), 0xFFFF))
    assert torch.equal(out[:6].float(), x[:6]) and out[6].isnan() and torch.equal(out[7].float(), x[7])


def rounding_table(backend, seed=7, **options):
    return random_table(backend, torch.bfloat16, torch.Generator().manual_seed(41), rounding_seed=seed, **options)


@pytest.mark.parametrize("layout", ["plain", "misaligned", "channels_last"])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_backends_draw_the_same_bits(backend, monkeypatch, layout, state_bits):
    results = []
    for name in (None, "torch"):
        if name:
            monkeypatch.setenv("RSAFT_BACKEND", name)
        table, _ = rounding_table(backend, layout=layout, state_bits=state_bits, parameter=[9, 3, 4, 1, 0, 70000, 2])
        table.steps.fill_(4)
        norm = ops.GradientNorm(backend)
        norm.norm.fill_(1.0)
        norm.scale.fill_(1e-3)
        ops.sam_perturb_(table, norm)
        perturbed = bits(table["weight"])
        scalars = scalars_for(backend)
        ops.adamw_coefficients_(table, norm, StepInputs(scalars, norm))
        ops.sam_adamw_step_(table, scalars, first=norm, restore=True)
        results.append((perturbed, flat(table["weight"])))
    assert same_bits(results[0][0], results[1][0])
    # torch's square root on CPUs is off by a unit in the last place now and then, and may tip a rounding.
    assert (results[0][1] != results[1][1]).float().mean() < 1e-3


def test_perturbation_and_update_have_no_bias(backend):
    table, before = random_table(
        backend, torch.bfloat16, torch.Generator().manual_seed(42), [(8 * CHUNK,)], rounding_seed=1
    )
    norm = ops.global_norm(table, rho=0.05)
    ops.sam_perturb_(table, norm)
    applied_sq, dot, wanted_sq = table.perturbation_sums.sum(0).tolist()
    # To nearest nearly nothing would arrive; here the projection is 1 within its own noise.
    assert abs(dot / wanted_sq - 1) < 4 * (applied_sq / wanted_sq) ** 0.5 / (8 * CHUNK) ** 0.5
    assert applied_sq / wanted_sq > 1
    take_step(table, scalars_for(backend, lr=1e-4, weight_decay=0.0), first=norm, restore=True)
    exact = adamw(before, step=1, lr=1e-4, weight_decay=0.0)[0][0]
    moved, wanted = table["weight"][0].double().cpu() - before["weight"][0], exact - before["weight"][0]
    noise = (moved - wanted).norm() / wanted.norm() / len(moved) ** 0.5
    assert abs((moved * wanted).sum() / wanted.square().sum() - 1) < 4 * noise


def test_a_skipped_step_does_not_change_the_bits_of_the_next(backend):
    """Drawn by the step taken, not by how often one was tried."""
    results = []
    for skip in (False, True):
        table, _ = rounding_table(backend)
        scalars = scalars_for(backend)
        if skip:
            flag = torch.ones((), device=backend)
            first = ops.global_norm(table, rho=0.05)
            ops.sam_perturb_(table, first)
            take_step(table, scalars, first=first, restore=True, found_inf=flag)
        first = ops.global_norm(table, rho=0.05)
        ops.sam_perturb_(table, first)
        take_step(table, scalars, first=first, restore=True)
        results.append(bits(table["weight"]))
    assert same_bits(*results)


def test_seed_step_parameter_and_purpose_all_count(backend):
    def perturbed(seed=7, parameter=None, steps=0):
        table, _ = rounding_table(backend, seed=seed, parameter=parameter)
        table.steps.fill_(steps)
        ops.sam_perturb_(table, ops.global_norm(table, rho=0.05))
        return bits([table["weight"][-1]])

    plain = perturbed()
    assert same_bits(plain, perturbed())
    for other in (perturbed(seed=8), perturbed(seed=7 + 2**32), perturbed(parameter=range(1, 8)), perturbed(steps=1)):
        assert not same_bits(plain, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_bf16_is_rounded_so(backend, dtype):
    table, _ = random_table(backend, dtype, torch.Generator(), [(9,)], rounding_seed=1)
    old = bits(table["weight"])
    with pytest.raises(TypeError, match=says("stochastic", "bfloat16", dtype)):
        ops.sam_perturb_(table, ops.global_norm(table, rho=0.05))
    assert same_bits(old, bits(table["weight"]))
