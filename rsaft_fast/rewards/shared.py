"""A reward of which every rank keeps a part, and what is said of it."""

from __future__ import annotations

from rsaft_fast.memory.shared import Sharing, share_weights
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.combine import Combination


def share_reward(reward: Reward, sharing: Sharing) -> list[str]:
    """Keep this rank's part of a reward's blocks; return lines about what is parted, and what stays whole."""
    notes = []
    for one in [part.reward for part in reward.parts] if isinstance(reward, Combination) else [reward]:
        before = sum(weight.nbytes for weight in one.parameters())
        parted = share_weights(one.shared_blocks(), sharing)
        named = f"{one.spec.name} ({one.spec.source})" if one.spec.source else one.spec.name
        if parted:
            sizes = f"{parted / 2**30:.2f} of the {before / 2**30:.2f} GiB of reward {named}"
            notes.append(f"distributed.reward shared: {sizes} lie in parts on {sharing.size} GPUs")
        else:
            notes.append(
                f"distributed.reward shared: reward {named} names no blocks of weights (`shared_blocks`), so that each "
                "process has it whole"
            )
    return notes
