"""The learning rate as a function of the step, parameter groups, the running mean of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from builders.messages import says
from torch import nn

from rsaft_fast.algorithms.copies import EMA
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import OptimizerSettings
from rsaft_fast.smoothing.settings import ParameterGroup, ParameterSmoothing
from rsaft_fast.train.optimizer import build_optimizer, learning_rate


@pytest.mark.parametrize(
    ("schedule", "torchs"),
    [
        ("constant", lambda progress: 1.0),
        ("linear", lambda progress: 1 - progress),
        ("cosine", lambda progress: (1 + math.cos(math.pi * progress)) / 2),
    ],
)
def test_warm_up_then_the_schedule(schedule, torchs):
    settings = OptimizerSettings(lr=0.5, schedule=schedule, warmup_steps=4)
    rates = [learning_rate(settings, step, 20) for step in range(20)]
    assert rates[:4] == [0.125, 0.25, 0.375, 0.5]
    assert rates[4:] == pytest.approx([0.5 * torchs((step - 4) / 16) for step in range(4, 20)])
    assert min(rates) > 0


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(3)) for name in ("attn1.to_q", "attn2.to_q", "ff.net")}


def test_a_radius_for_each_group():
    params = parameters()
    smoothing = ParameterSmoothing(rho=0.1, groups=(ParameterGroup(match="attn", rho=0.3),), adaptive=True)
    optimizer = build_optimizer(params, OptimizerSettings(lr=0.5, betas=(0.8, 0.9), max_grad_norm=2.0), smoothing)
    first, rest = optimizer.param_groups
    assert [first["rho"], rest["rho"]] == [0.3, 0.1] and first["adaptive"] and rest["lr"] == 0.5
    assert [len(first["params"]), len(rest["params"])] == [2, 1] and rest["params"][0] is params["ff.net"]
    assert rest["betas"] == (0.8, 0.9) and optimizer.max_grad_norm == 2.0


def test_a_group_that_takes_everything_leaves_no_empty_one():
    smoothing = ParameterSmoothing(groups=(ParameterGroup(match=".", rho=0.3),))
    assert len(build_optimizer(parameters(), OptimizerSettings(), smoothing).param_groups) == 1


def test_a_group_that_matches_nothing_is_refused():
    smoothing = ParameterSmoothing(groups=(ParameterGroup(match="attn", rho=1), ParameterGroup(match="attn1", rho=2)))
    with pytest.raises(UserError, match=says("smoothing.parameters.groups", "'attn1'", "attn1.to_q")):
        build_optimizer(parameters(), OptimizerSettings(), smoothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_mean_follows_its_recurrence(dtype):
    parameter = nn.Parameter(torch.randn(5).to(dtype))
    ema = EMA({"p": parameter}, decay=0.7)
    mean = parameter.detach().double().clone()
    for n in range(1, 12):
        with torch.no_grad():
            parameter.copy_(torch.randn(5))
        ema.update(n)
        decay = min(0.7, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * parameter.detach().double()
    assert ema.means["p"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ema.means["p"].double(), mean, rtol=1e-6, atol=1e-6)


def test_the_mean_is_applied_and_taken_back_bit_for_bit():
    parameter = nn.Parameter(torch.randn(7).bfloat16())
    ema = EMA({"p": parameter}, decay=0.5)
    with torch.no_grad():
        parameter.mul_(3)
    ema.update(1)
    own, storage = parameter.detach().clone(), parameter.data_ptr()
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert torch.equal(parameter, ema.means["p"].bfloat16())
        raise RuntimeError("inside")
    assert torch.equal(parameter, own) and parameter.data_ptr() == storage and parameter.requires_grad


def test_the_mean_does_not_share_memory_with_the_weights():
    parameter = nn.Parameter(torch.zeros(2))
    ema = EMA({"p": parameter}, decay=0.9)
    with torch.no_grad():
        parameter.add_(1)
    assert not ema.means["p"].any()
