"""Reward models: one protocol, one module a family, one registry."""

from rsaft_fast.rewards.base import Reward, RewardSpec
from rsaft_fast.rewards.clip import ClipReward
from rsaft_fast.rewards.preprocess import Preprocess, resize, saturated_fraction
from rsaft_fast.rewards.registry import RewardSettings, load_reward

__all__ = [
    "ClipReward",
    "Preprocess",
    "Reward",
    "RewardSettings",
    "RewardSpec",
    "load_reward",
    "resize",
    "saturated_fraction",
]
