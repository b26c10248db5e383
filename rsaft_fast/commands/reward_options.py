"""Rewards named on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rsaft_fast.errors import UserError
from rsaft_fast.recipe.load import parse_override, read_yaml
from rsaft_fast.recipe.schema import explain
from rsaft_fast.rewards import RewardSettings

_RECIPES = (".yaml", ".yml")


def parse_rewards(texts: Sequence[str]) -> dict[str, RewardSettings]:
    """What each `--reward` names, by the label of its column.

    Raises:
        UserError: one that cannot be read, or the same one twice.
    """
    parsed = [parse_reward(text) for text in texts]
    settings = dict(parsed)
    if len(settings) < len(parsed):
        raise UserError("--reward names the same reward twice; give each once")
    return settings


def parse_reward(text: str) -> tuple[str, RewardSettings]:
    """NAME=PATH, and more of the recipe's reward keys as ,key=value; or a recipe, whose reward section it then is."""
    if text.endswith(_RECIPES) and "=" not in text:
        content = read_yaml(Path(text))
        return Path(text).stem, _validated(content.get("reward", content), text)
    name, _, rest = text.partition("=")
    path, *pairs = rest.split(",")
    if not name or not all("=" in pair for pair in pairs):
        raise UserError(_NOT_READ.format(text))
    keys = dict(parse_override(pair, RewardSettings) for pair in pairs)
    given = {"name": name, "path": path} if path else {"name": name}
    return ",".join([name, *pairs]), _validated(given | keys, text)


_NOT_READ = "--reward {!r} is not NAME=PATH or NAME=PATH,key=value or a recipe's file; an example: hpsv2.1=xswu/HPSv2"


def _validated(keys: Any, text: str) -> RewardSettings:
    try:
        return RewardSettings.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing" and first["loc"][-1:] == ("path",):
            raise UserError(_NOT_READ.format(text)) from error
        where = f"--reward {text if len(text) <= 100 else f'{text[:97]}...'}"
        raise UserError("\n".join(explain(error, RewardSettings, where, set()))) from error
