"""Rewards named on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rsaft_fast.errors import UserError
from rsaft_fast.recipe.load import parse_override, read_yaml
from rsaft_fast.recipe.schema import explain
from rsaft_fast.rewards import RewardSettings

_RECIPES = (".yaml", ".yml")


def parse_judges(texts: Sequence[str], option: str = "--judges") -> dict[str, RewardSettings]:
    """What each of an option such as `--judges` names: a reward that ships, the user's own, or what `--reward` takes.

    playground/NAME and python:module:name stand for themselves. LABEL:REWARD gives a name of one's own.

    Raises:
        UserError: one that cannot be read, or a name twice.
    """
    # A name is a part of a key, and a recipe's file may be called anything.
    parsed = [_parse_judge(text, option) for text in texts]
    named = [(re.sub(r"[^\w.\-]", "_", name)[:60], judge) for name, judge in parsed]
    found = dict(named)
    if len(found) < len(named):
        names = [name for name, _ in named]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{option} has {twice!r} twice; give each once, or name one of them: LABEL:{twice}=PATH")
    return found


def _parse_judge(text: str, option: str) -> tuple[str, RewardSettings]:
    label = re.match(r"([\w.\-]{1,60}):(?!//)(?=.*=|playground/|python:)", text)
    if label is not None and label[1] != "python":
        return label[1], _parse_judge(text[label.end() :], option)[1]
    if text.startswith("python:") and "=" not in text.partition(",")[0]:
        text = text.replace("python:", "python=", 1)
    elif text.startswith("playground/") and "=" not in text.partition(",")[0]:
        return text.partition(",")[0].removeprefix("playground/"), parse_reward(f"clip={text}", option)[1]
    name, settings = parse_reward(text, option)
    return re.split(r"[,=]", name)[0], settings


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


def parse_reward(text: str, option: str = "--reward") -> tuple[str, RewardSettings]:
    """NAME=PATH, and more of the recipe's reward keys as ,key=value; or a recipe, whose reward section it then is."""
    if text.endswith(_RECIPES) and "=" not in text:
        content = read_yaml(Path(text))
        return Path(text).stem, _validated(content.get("reward", content), text, option)
    name, _, rest = text.partition("=")
    path, *pairs = rest.split(",")
    if not name or not all("=" in pair for pair in pairs):
        raise UserError(_NOT_READ.format(option, text))
    keys = dict(parse_override(pair, RewardSettings) for pair in pairs)
    given = {"name": name, "path": path} if path else {"name": name}
    return ",".join([name, *pairs]), _validated(given | keys, text, option)


_NOT_READ = "{} {!r} is not NAME=PATH or NAME=PATH,key=value or a recipe's file; an example: hpsv2.1=xswu/HPSv2"


def _validated(keys: Any, text: str, option: str) -> RewardSettings:
    try:
        return RewardSettings.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing" and first["loc"][-1:] == ("path",):
            raise UserError(_NOT_READ.format(option, text)) from error
        where = f"{option} {text if len(text) <= 100 else f'{text[:97]}...'}"
        raise UserError("\n".join(explain(error, RewardSettings, where, set()))) from error
