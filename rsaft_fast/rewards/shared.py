"""A reward of which every rank keeps a part, and what is said of it."""

from __future__ import annotations

from rsaft_fast.memory.shared import Sharing, share_weights
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.combine import Combination
from rsaft_fast.rewards.features import Features


def share_reward(reward: Reward, sharing: Sharing) -> list[str]:
    """Keep this rank's part of a reward's blocks; return lines about what is parted, and what stays whole."""
    parts = [part.reward for part in reward.parts] if isinstance(reward, Combination) else [reward]
    return [_share("reward", part, sharing) for part in parts]


def share_features(features: Features, sharing: Sharing) -> str:
    """Keep this rank's part of the blocks of a network of features; return a line about it."""
    return _share("features", features, sharing)


def _share(kind: str, network: Reward | Features, sharing: Sharing) -> str:
    before = sum(weight.nbytes for weight in network.parameters())
    parted = share_weights(network.shared_blocks(), sharing)
    spec = network.spec
    named = f"{kind} {spec.name} ({spec.source})" if spec.source else f"{kind} {spec.name}"
    if parted:
        sizes = f"{parted / 2**20:,.1f} of the {before / 2**20:,.1f} MiB of {named}"
        return f"distributed.reward shared: {sizes} lie in parts, one with each of {sharing.size} processes"
    return (
        f"distributed.reward shared: {named} names no blocks of weights (`shared_blocks`), so that each process has it "
        "whole"
    )
