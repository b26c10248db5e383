"""Every draw of every method is a plan its paper describes."""

import numpy as np
import pytest
from builders.messages import says
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from rsaft_fast.errors import UserError
from rsaft_fast.methods import AlignProp, AnyMethod, DRaFT, DRaFTLV, DRTune, ReFL

SEEDS = st.integers(0, 2**32 - 1)
# Settings refuse numbers that float32 holds as nothing or nearly so.
SHARES = st.just(0.0) | st.floats(2e-38, 1)


@given(num_steps=st.integers(1, 60), seed=SEEDS)
def test_refl_grades_one_late_call_and_stops_there(num_steps, seed):
    plan = ReFL().draw(num_steps, np.random.default_rng(seed))
    assert plan.graded == (plan.last,) and plan.finish == "x0" and plan.through == ()
    assert plan.last >= int(0.75 * num_steps)
    assert plan.uncond == "none"


def test_refl_draws_from_30_to_39_of_40():
    drawn = {ReFL().draw(40, np.random.default_rng(seed)).last for seed in range(300)}
    assert drawn == set(range(30, 40))


@given(num_steps=st.integers(1, 60), k=st.integers(1, 60), seed=SEEDS)
def test_draft_grades_the_last_k(num_steps, k, seed):
    rng = np.random.default_rng(seed)
    if k > num_steps:
        with pytest.raises(UserError, match=says("method.k", k, "sampler.steps", num_steps)):
            DRaFT(k=k).draw(num_steps, rng)
        return
    plan = DRaFT(k=k).draw(num_steps, rng)
    assert plan.graded == plan.through == tuple(range(num_steps - k, num_steps))
    assert plan.finish == "sampler" and plan.last == num_steps - 1


@given(num_steps=st.integers(1, 60), n=st.integers(1, 5), seed=SEEDS)
def test_draft_lv_adds_renoised_endpoints_at_the_last_step(num_steps, n, seed):
    plan = DRaFTLV(n_extra=n).draw(num_steps, np.random.default_rng(seed))
    assert plan.graded == (num_steps - 1,)
    assert plan.renoise == tuple((num_steps - 1, key) for key in range(n))
    assert plan.weights == pytest.approx([1 / (n + 1)] * (n + 1))


@given(num_steps=st.integers(1, 60), mean=SHARES, std=SHARES, seed=SEEDS)
def test_alignprop_grades_from_b_to_the_end(num_steps, mean, std, seed):
    plan = AlignProp(mean=mean, std=std).draw(num_steps, np.random.default_rng(seed))
    b = plan.graded[0]
    assert b >= min(1, num_steps - 1)
    assert plan.graded == plan.through == tuple(range(b, num_steps))


def test_alignprop_draws_b_around_42_of_50():
    draws = [AlignProp().draw(50, np.random.default_rng(seed)).graded[0] for seed in range(2000)]
    assert np.mean(draws) == pytest.approx(41.2, abs=0.7)  # truncation of N(42, 5) towards zero, cut at 49
    assert 1 <= min(draws) and max(draws) <= 49


@given(num_steps=st.integers(1, 60), k=st.none() | st.integers(1, 60), stop=SHARES.map((0.99).__mul__), seed=SEEDS)
def test_drtune_spreads_k_calls_over_those_that_run(num_steps, k, stop, seed):
    method, rng = DRTune(k=k, early_stop=stop), np.random.default_rng(seed)
    expected = k or max(1, num_steps // 10)
    if expected > num_steps:
        with pytest.raises(UserError, match=says("method.k", "sampler.steps")):
            method.draw(num_steps, rng)
        return
    plan = method.draw(num_steps, rng)
    assert len(plan.graded) == expected and plan.through == () and plan.finish == "x0"
    assert len(set(np.diff(plan.graded))) <= 1, "equally spaced"
    assert num_steps - 1 - plan.last <= int(stop * num_steps)


def test_drtune_default_is_five_of_fifty():
    plan = DRTune().draw(50, np.random.default_rng(0))
    assert len(plan.graded) == 5 and 29 <= plan.last <= 48


def test_same_rng_same_plan_and_different_rng_another():
    for method in (ReFL(), AlignProp(), DRTune()):
        plans = [method.draw(50, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3, 4)]
        assert plans[0] == plans[1] and len(set(plans)) > 2


def test_settings_pick_the_method_and_refuse_the_rest():
    adapter = TypeAdapter(AnyMethod)
    assert adapter.validate_python({"name": "draft", "k": 3}) == DRaFT(k=3)
    for bad in (
        {"name": "draft", "k": 0},
        {"name": "dpo"},
        {"name": "refl", "k": 1},
        {"name": "refl", "window": (0.9, 0.2)},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)
