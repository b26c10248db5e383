"""Training and estimating from Python, as the command line does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import Estimate, estimate
from rsaft_fast.estimate.forecast import announce
from rsaft_fast.progress import tell
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import load_config, raw_recipe
from rsaft_fast.report.page import write_run_report
from rsaft_fast.rewards import Reward
from rsaft_fast.rewards.python import Score, handed_over
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.train.loaders import FileLoaders
from rsaft_fast.train.loop import train
from rsaft_fast.train.run import Outcome

Recipe = Config | str | Path | Mapping[str, Any]


def finetune(
    recipe: Recipe,
    overrides: Sequence[str] = (),
    *,
    reward: Reward | Score | None = None,
    backbone: Backbone | None = None,
    log: Callable[[str], None] = tell,
    **options: Any,
) -> Outcome:
    """Fine-tune as a recipe says; the run folder is its `output_dir`, where `rsaft-fast sample --run` looks.

    Args:
        recipe: a `Config`, its keys as a mapping, a YAML file, or the name of a shipped recipe.
        overrides: keys that replace the recipe's, as on the command line: `["optimizer.lr=1e-4", "max_steps=50"]`.
        reward: of your own, in place of the recipe's: a `Reward`, on the host, or a function whose first two arguments
            are named images, (B, 3, H, W), nominally 0 to 1, and prompts, B texts, and that returns B scores with a
            gradient to the images.
        backbone: a model of your own, in place of `backbone.path`, with its text encoders.
        log: takes lines for the user.
        options: further keywords of `rsaft_fast.train.loop.train`, such as `on_samples`.

    Returns:
        how the run ended: its folder, the updates done, where the model is.

    Raises:
        UserError: something is wrong with the recipe, its inputs, a reward, memory or a disk.
    """
    raw = raw_recipe(recipe)
    for own, key in ((reward, "reward."), (backbone, "backbone.path=")):
        if own is not None and (odd := [text for text in overrides if text.startswith(key)]):
            raise UserError(f"{odd[0]} beside a {key.partition('.')[0]} that is handed over; leave one of them out")
    if backbone is not None and not isinstance(backbone, Backbone):
        raise UserError(f"backbone is a {type(backbone).__name__}; it must be an object of a subclass of Backbone")
    # The run's config.yaml says what was trained on, whatever the recipe named.
    if reward is not None:
        reward, settings = handed_over(reward)
        raw = raw | {"reward": settings.model_dump(mode="json")}
    if backbone is not None:
        named = type(backbone)
        raw = raw | {"backbone": raw.get("backbone", {}) | {"path": f"python:{named.__module__}:{named.__qualname__}"}}
    # What a model of one's own needs is not known from files.
    forecast: dict[str, Any] = {"forecast": announce} if reward is None and backbone is None else {}
    loaders = partial(FileLoaders, own_reward=reward, own_backbone=backbone)
    options.setdefault("report", write_run_report)
    return train(load_config(raw, overrides), log=log, loaders=loaders, **forecast, **options)


def estimate_memory(recipe: Recipe, overrides: Sequence[str] = (), *, cuda: bool = True) -> Estimate:
    """Estimate the peak memory of a run, phase by phase, in bytes, before anything is loaded.

    Args:
        recipe, overrides: as in `finetune`.
        cuda: as torch's CUDA allocator and attention kernels have it; else as on the CPU.

    Raises:
        UserError: keys that do not go together or do not fit the model; a model whose config files are not here.
    """
    return estimate(load_config(recipe, overrides), cuda)
