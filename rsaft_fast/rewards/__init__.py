"""Reward models: one protocol, one module a family, one registry."""

from rsaft_fast.rewards.aesthetic import AestheticReward, load_aesthetic
from rsaft_fast.rewards.base import Reward, RewardSpec
from rsaft_fast.rewards.clip import ClipReward
from rsaft_fast.rewards.combine import Combination
from rsaft_fast.rewards.ensemble import AuxiliaryEnsemble, uncertainty, win_rates
from rsaft_fast.rewards.hps import load_hps
from rsaft_fast.rewards.image_reward import ImageReward, load_image_reward
from rsaft_fast.rewards.preprocess import Preprocess, resize
from rsaft_fast.rewards.registry import RewardSettings, load_reward

__all__ = [
    "AestheticReward",
    "AuxiliaryEnsemble",
    "ClipReward",
    "Combination",
    "ImageReward",
    "Preprocess",
    "Reward",
    "RewardSettings",
    "RewardSpec",
    "load_aesthetic",
    "load_hps",
    "load_image_reward",
    "load_reward",
    "resize",
    "uncertainty",
    "win_rates",
]
