"""One run of the experiment, as data: the playground's recipe, and what is changed of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rsaft_fast import playground
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import find_recipe, load_config, overridden

RECIPE = "playground.yaml"


@dataclass(frozen=True)
class Row:
    """One run: the playground's recipe, what is changed of it, and when it is evaluated.

    Attributes:
        set: the question it belongs to.
        proxy: the playground's reward that is trained on, or that would be, where a baseline trains on another.
        method, variant: what the reports call it.
        seed: of noise, plans and prompt order.
        updates: in all.
        every: updates between two evaluations; there is one before the first update and one after the last.
        pictures: of an evaluation.
        overrides: keys that replace the recipe's.
        scales: shares of the way from the start's weights to the last ones, at which it is evaluated in the end.
    """

    set: str
    proxy: str
    method: str
    variant: str
    seed: int
    updates: int
    every: int
    pictures: int
    overrides: tuple[str, ...]
    scales: tuple[float, ...] = ()

    recipe: ClassVar[str] = RECIPE

    @property
    def settings(self) -> list[str]:
        """What is changed of the recipe."""
        return [f"reward.path=playground/{self.proxy}", *common_keys(self), *self.overrides]

    @property
    def proxy_reward(self) -> tuple[str, str]:
        """Name the proxy's family and path."""
        return "clip", f"playground/{self.proxy}"

    @property
    def prompts(self) -> list[str]:
        """Return the prompts of an evaluation's pictures, one for each."""
        return playground.eval_prompts(self.pictures)

    @property
    def name(self) -> str:
        return f"{self.proxy}-{self.method}-{self.variant}-s{self.seed}"

    def path(self, folder: Path) -> Path:
        """Return where its results are written."""
        return folder / self.set / f"{self.name}.json"

    @property
    def evaluations(self) -> int:
        return -(-self.updates // self.every) + len(self.scales)

    @property
    def cost(self) -> float:
        """Roughly its time, in plain updates: a picture of an evaluation takes a tenth of one."""
        return self.updates * self._passes + self.evaluations * self.pictures / 10

    @property
    def _passes(self) -> float:
        """Forward and backward passes of an update."""
        if any(text in ("smoothing=null", "smoothing.parameters=null") for text in self.overrides):
            return 1
        keys = dict(text.split("=", 1) for text in self.overrides)
        if keys.get("smoothing.parameters.direction") in ("momentum", "bi_lora"):
            return 1
        return 1 + 1 / int(keys.get("smoothing.parameters.reuse", 1))


def config_of(row: Row, folder: Path) -> Config:
    """Return the recipe of a row, as a run in `folder`.

    Raises:
        UserError: a key that is not there, or a value that it does not take.
    """
    return load_config(find_recipe(row.recipe), [*row.settings, f"output_dir={folder}"])


def keys_of(row: Row) -> dict[str, Any]:
    """Return the recipe's keys with a row's over them: what its results follow from.

    A key of the recipe that every row replaces, such as a radius, may change without making results stale.
    """
    return overridden(find_recipe(row.recipe), row.settings)


def common_keys(row: Row) -> list[str]:
    """What every run changes of the recipe: when it is evaluated, and nothing written that nobody will look at."""
    return [
        f"seed={row.seed}",
        f"max_steps={row.updates}",
        f"checkpoint_every={row.updates}",
        f"samples.every={row.every}",
        "samples.count=1",
        "sharpness=null",
        "logging.tensorboard=false",
        "logging.diagnostics=false",
    ]
