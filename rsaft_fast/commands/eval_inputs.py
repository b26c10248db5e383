"""What `rsaft-fast eval` measures on and by: its prompts, its rewards, and features where no network is named."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from rsaft_fast.commands.eval_models import Model
from rsaft_fast.commands.pictures import FIXED, log
from rsaft_fast.commands.reward_options import parse_judges
from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.known_preference import TRUTH, truth_of
from rsaft_fast.evaluation.protocols import SEED, protocol_prompts
from rsaft_fast.playground.scenes import parse
from rsaft_fast.recipe.config import PLAYGROUND
from rsaft_fast.rewards import RewardSettings
from rsaft_fast.rewards.base import PictureReward, RewardSpec

TAKEN = (*FIXED, "model", "updates", "seed", "distances", TRUTH)
"""Names that no reward's column may have."""

SIDE = 16
THUMBNAIL = RewardSpec("thumbnail", preprocessing={"size": SIDE, "filter": "area", "less": 0.5})
"""What stands in where no network is named; it sees colour and layout alone."""


def chosen_prompts(arguments: argparse.Namespace, models: Sequence[Model]) -> tuple[str, list[str], int, int]:
    """Load the prompts that the options name.

    Returns:
        their name, themselves, how many pictures of each, and the first one's seed.

    Raises:
        UserError: none, others than published, or an option that a protocol fixes.
    """
    if arguments.protocol is None:
        source = arguments.prompts or next((PLAYGROUND for m in models if m.settings.path == PLAYGROUND), None)
        if source is None:
            raise UserError("eval needs --prompts FILE (or a set), or --protocol NAME")
        prompts = load_prompts(source, held_out=True)
        return source, prompts[: arguments.count], arguments.pictures or 1, arguments.seed or SEED
    for option in ("count", "pictures", "seed"):
        if getattr(arguments, option) is not None:
            raise UserError(
                f"--{option} beside --protocol {arguments.protocol}: a protocol fixes it; leave it out, or name the "
                "prompts by --prompts"
            )
    name, protocol, prompts = protocol_prompts(arguments.protocol)
    log(f"protocol {name}: {len(prompts)} prompts, {protocol.pictures} pictures of each; judged by {protocol.judged}")
    return name, prompts, protocol.pictures, SEED


def chosen_rewards(
    arguments: argparse.Namespace, models: Sequence[Model]
) -> tuple[dict[str, RewardSettings], dict[str, RewardSettings]]:
    """List the rewards by their columns: all, and of those what some run was trained on.

    Raises:
        UserError: one that cannot be read, a name that is taken, or none.
    """
    configs = [model.config for model in models if model.config is not None]
    asked = parse_judges(arguments.rewards, "--rewards") if arguments.rewards else {}
    if not asked:
        asked = {name: reward for config in configs for name, reward in config.held_out.items()}
    trained: dict[str, RewardSettings] = {}
    for config in configs:
        known = {**asked, **trained}
        name = next((name for name, own in known.items() if own == config.reward), None)
        if name is None:
            stem = config.reward.path.removeprefix(f"{PLAYGROUND}/") if _is_shipped(config.reward) else ""
            name = stem or config.reward.name
            while name in known or name in TAKEN:
                name += "'"
        trained[name] = config.reward
    if taken := next((name for name in asked if name in TAKEN), None):
        raise UserError(f"--rewards {taken}: a column is called so already; give LABEL:NAME=PATH")
    found = {**trained, **asked}
    if not found and not any(model.settings.path == PLAYGROUND for model in models):
        raise UserError("eval needs --rewards NAME=PATH ...: nothing says by what the pictures are judged")
    return found, trained


def _is_shipped(reward: RewardSettings) -> bool:
    return str(getattr(reward, "path", "")).startswith(f"{PLAYGROUND}/")


def knows_truth(models: Sequence[Model], prompts: Sequence[str]) -> bool:
    """Whether all models draw the playground's scenes, whose true preference is known."""
    if any(model.settings.path != PLAYGROUND for model in models):
        return False
    try:
        for prompt in prompts:
            parse(prompt)
    except ValueError:
        return False
    return True


class TruePreference(PictureReward):
    """The playground's known preference r*, as one more reward."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = RewardSpec(TRUTH, PLAYGROUND)

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Preference of pictures (B, 3, 32, 32) for what their prompts say, (B,), 0 to 1."""
        return truth_of(inputs.cpu(), prompts)[TRUTH].float()


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """Reduce pictures (B, 3, H, W), 0 to 1, to (B, 3 * 16 * 16): area means less 0.5."""
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), SIDE)
    return small.flatten(1) - 0.5
