"""Rewards on the meta device, from their config files: every shape, no weight."""

from __future__ import annotations

from rsaft_fast.estimate.skeleton import quiet
from rsaft_fast.rewards import Reward, RewardSettings


def skeleton_reward(settings: RewardSettings) -> tuple[Reward, list[str]]:
    """The reward on the meta device, and what there is to say about where it came from.

    Raises:
        UserError: see `RewardSettings.shapes`.
    """
    notes: list[str] = []
    with quiet():
        return settings.shapes(notes.append), list(dict.fromkeys(notes))
