"""Samplers as linear steps, rollouts that keep what a plan needs, and the hand-walked adjoint."""

from rsaft_fast.sampling.adjoint import backpropagate, call_backward
from rsaft_fast.sampling.linear import LinearStep, Schedule, ddim_schedule, flow_schedule
from rsaft_fast.sampling.noise import NoiseSource, derive_rng
from rsaft_fast.sampling.plan import GradientPlan, Leap
from rsaft_fast.sampling.rollout import Trajectory, rollout, sample_chain

__all__ = [
    "GradientPlan",
    "Leap",
    "LinearStep",
    "NoiseSource",
    "Schedule",
    "Trajectory",
    "backpropagate",
    "call_backward",
    "ddim_schedule",
    "derive_rng",
    "flow_schedule",
    "rollout",
    "sample_chain",
]
