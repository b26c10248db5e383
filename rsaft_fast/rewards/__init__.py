"""Reward models: one protocol, one module a family, one registry."""

from rsaft_fast.rewards import registry  # noqa: F401 (makes the families known)
from rsaft_fast.rewards.aesthetic import AestheticReward
from rsaft_fast.rewards.base import Reward, RewardSpec
from rsaft_fast.rewards.clip import ClipReward
from rsaft_fast.rewards.combine import Combination
from rsaft_fast.rewards.ensemble import AuxiliaryEnsemble, uncertainty, win_rates
from rsaft_fast.rewards.image_reward import ImageReward
from rsaft_fast.rewards.loading import load_reward
from rsaft_fast.rewards.preprocess import Preprocess, resize
from rsaft_fast.rewards.settings import REWARDS, RewardSettings, TowerSettings, register

__all__ = [
    "REWARDS",
    "AestheticReward",
    "AuxiliaryEnsemble",
    "ClipReward",
    "Combination",
    "ImageReward",
    "Preprocess",
    "Reward",
    "RewardSettings",
    "RewardSpec",
    "TowerSettings",
    "load_reward",
    "register",
    "resize",
    "uncertainty",
    "win_rates",
]
