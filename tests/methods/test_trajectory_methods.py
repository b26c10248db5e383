"""Draws of LeapAlign and FlowBP's surrogates are those that their authors describe."""

import numpy as np
import pytest
from builders.messages import says
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from rsaft_fast.errors import UserError
from rsaft_fast.methods import AnyMethod, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign
from rsaft_fast.methods.flowbp import spread

SEEDS = st.integers(0, 2**32 - 1)
STEPS = st.integers(1, 60)


@given(num_steps=STEPS, seed=SEEDS)
def test_leapalign_leaps_twice_and_ends_at_the_picture(num_steps, seed):
    rng = np.random.default_rng(seed)
    if num_steps < 2:
        with pytest.raises(UserError, match=says("leapalign", "method.window", "sampler.steps", num_steps)):
            LeapAlign().draw(num_steps, rng)
        return
    plan = LeapAlign().draw(num_steps, rng)
    k, j = plan.graded
    assert 0 <= k < j < num_steps and plan.through == (j,) and plan.finish == "sampler"
    assert [(leap.start, leap.stop, leap.supports) for leap in plan.leaps] == [(k, j, (k,)), (j, num_steps, (j,))]
    assert plan.uncond == "graded" and plan.similarity_floor == 0.1 and plan.input_share == 0.3


def test_leapalign_draws_all_pairs_alike_and_those_of_its_window():
    drawn = [LeapAlign().draw(5, np.random.default_rng(seed)).graded for seed in range(2000)]
    counts = {pair: drawn.count(pair) for pair in set(drawn)}
    assert len(counts) == 10 and max(counts.values()) < 1.5 * min(counts.values())
    halved = {LeapAlign(window=(0, 0.5)).draw(8, np.random.default_rng(seed)).graded for seed in range(100)}
    assert {call for pair in halved for call in pair} == {0, 1, 2, 3}


@given(num_steps=STEPS, k=st.integers(1, 60), seed=SEEDS)
def test_sparse_draws_k_calls(num_steps, k, seed):
    rng = np.random.default_rng(seed)
    if k > num_steps:
        with pytest.raises(UserError, match=says("method.k", k, "sampler.steps", num_steps)):
            FlowBPSparse(k=k).draw(num_steps, rng)
        return
    plan = FlowBPSparse(k=k).draw(num_steps, rng)
    assert len(plan.graded) == k and plan.through == () and plan.leaps == () and plan.last == num_steps - 1
    assert plan.uncond == "detached"


def test_late_calls_are_the_likelier_by_the_power_of_their_place():
    for bias in (0.0, 1.0, 2.0):
        drawn = [FlowBPSparse(k=1, late_bias=bias).draw(6, np.random.default_rng(s)).graded[0] for s in range(1500)]
        expected = np.arange(1, 7) ** bias
        found = np.bincount(drawn, minlength=6) / len(drawn)
        assert np.abs(found - expected / expected.sum()).max() < 0.05


@given(num_steps=STEPS, k=st.integers(2, 60), seed=SEEDS)
def test_bridge_grades_both_sides_of_its_call(num_steps, k, seed):
    rng = np.random.default_rng(seed)
    if k > num_steps:
        with pytest.raises(UserError, match=says("method.k", k, "sampler.steps")):
            FlowBPBridge(k=k).draw(num_steps, rng)
        return
    plan = FlowBPBridge(k=k).draw(num_steps, rng)
    (j,) = plan.through
    before = [call for call in plan.graded if call < j]
    assert len(plan.graded) == k and j in plan.graded and before
    # As even as lengths and the two sides allow.
    wanted = round(k * j / num_steps)
    assert len(before) == min(max(wanted, 1, k - (num_steps - j)), j, k - 1)


@given(num_steps=st.integers(3, 60), order=st.integers(1, 5), active=st.integers(1, 5), seed=SEEDS)
def test_lagrange_grades_the_first_supports_of_two_leaps(num_steps, order, active, seed):
    plan = FlowBPLagrange(order=order, active=active).draw(num_steps, np.random.default_rng(seed))
    first, second = plan.leaps
    assert first.stop == second.start == plan.through[0] < num_steps - 1 and second.stop == num_steps
    for leap in plan.leaps:
        assert leap.supports[0] == leap.start and leap.supports[-1] < leap.stop
        assert len(leap.supports) == min(order, leap.stop - leap.start)
    assert plan.graded == first.supports[:active] + second.supports[:active]


def test_lagrange_divides_the_calls_as_its_concentrations_say():
    method = FlowBPLagrange()
    plans = [method.draw(25, np.random.default_rng(seed)) for seed in range(2000)]
    after = np.mean([25 - plan.through[0] - 1 for plan in plans]) / 25
    between = np.mean([plan.through[0] - plan.graded[0] for plan in plans]) / 25
    assert after == pytest.approx(2.5 / 10.5, abs=0.02) and between == pytest.approx(6 / 10.5, abs=0.02)
    with pytest.raises(UserError, match=says("sampler.steps", 2, "flowbp_lagrange", 3)):
        method.draw(2, np.random.default_rng(0))


def test_supports_are_spread_evenly():
    assert spread(3, 12, 3) == (3, 7, 11) and spread(3, 5, 4) == (3, 4) and spread(3, 12, 1) == (3,)


def test_same_rng_same_plan_and_different_rng_another():
    for method in (LeapAlign(), FlowBPSparse(), FlowBPBridge(), FlowBPLagrange()):
        plans = [method.draw(25, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3, 4)]
        assert plans[0] == plans[1] and len(set(plans)) > 2


def test_settings_out_of_their_limits_are_refused():
    adapter = TypeAdapter(AnyMethod)
    assert adapter.validate_python({"name": "flowbp_bridge", "k": 3}) == FlowBPBridge(k=3)
    for bad in (
        {"name": "leapalign", "discount": 1.5},
        {"name": "leapalign", "similarity": 0},
        {"name": "leapalign", "window": (0.5, 0.5)},
        {"name": "leapalign", "k": 2},
        {"name": "flowbp_sparse", "k": 0},
        {"name": "flowbp_sparse", "rescale": -1},
        {"name": "flowbp_bridge", "k": 1},
        {"name": "flowbp_bridge", "coupling": 2},
        {"name": "flowbp_lagrange", "order": 0},
        {"name": "flowbp_lagrange", "stretches": (1, 2)},
        {"name": "flowbp_lagrange", "stretches": (0, 1, 2)},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)
