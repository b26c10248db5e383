"""Algorithms: what one iteration collects, and the gradient that an update follows."""

from rsaft_fast.algorithms.ascent import Ascent
from rsaft_fast.algorithms.auxiliary import AuxiliaryAdapter
from rsaft_fast.algorithms.base import Algorithm, At
from rsaft_fast.algorithms.reward_gradient import PlannedBatch, RewardGradient, StepReport, rsaft_step

__all__ = [
    "Algorithm",
    "Ascent",
    "At",
    "AuxiliaryAdapter",
    "PlannedBatch",
    "RewardGradient",
    "StepReport",
    "rsaft_step",
]
