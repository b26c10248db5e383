"""The plans that an update's micro-batches get: all random draws of a method, from (seed, iteration)."""

import torch

from rsaft_fast.algorithms.reward_gradient import RewardGradient
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.methods import AlignProp
from rsaft_fast.methods.losses import Loss
from rsaft_fast.sampling import NoiseSource
from rsaft_fast.smoothing.settings import Smoothing


def plans(count, scope, step=3, **sizes):
    algorithm = RewardGradient(
        None, None, [None] * 20, smoothing=Smoothing(), loss=Loss(), method=AlignProp(), plan_scope=scope
    )
    nothing = torch.empty(0)
    batches = [MicroBatch(["x"], None, nothing, NoiseSource(5, step, (i,)), i) for i in range(count)]
    return [part.plan for part in algorithm.collect(batches)]


def test_an_update_has_one_plan_whatever_it_is_split_into():
    assert plans(3, "batch") == plans(1, "batch") * 3
    assert len({plans(1, "batch", step)[0] for step in range(8)}) > 1


def test_a_plan_for_each_micro_batch_when_asked_for():
    drawn = plans(8, "micro-batch")
    assert len(set(drawn)) > 1 and drawn == plans(8, "micro-batch")


def test_means_are_over_all_samples_of_all_micro_batches():
    algorithm = RewardGradient(None, None, [None] * 20, smoothing=Smoothing(), loss=Loss(), method=AlignProp())
    nothing = torch.empty(0)
    batches = [MicroBatch(["x"] * n, None, nothing, NoiseSource(5, 0, tuple(range(n))), n) for n in (2, 3)]
    assert [part.total for part in algorithm.collect(batches)] == [5, 5]
