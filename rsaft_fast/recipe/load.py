"""From a recipe file and dotted overrides to a `Config`, or to lines that say what to mend."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence, Set
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rsaft_fast.errors import UserError
from rsaft_fast.paths import user_path
from rsaft_fast.reading import read_text
from rsaft_fast.recipe.config import PLAYGROUND, Config
from rsaft_fast.recipe.schema import explain, shown, text_kinds
from rsaft_fast.settings import Settings
from rsaft_fast.yaml_text import LARGEST_FILE, YAMLTextError, dump_yaml, parse_yaml

PAPER = "paper"
"""Folder of the shipped recipes that repeat a paper's settings."""

_OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)=(.*)", re.DOTALL)


def load_config(recipe: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe, put `key.sub=value` overrides over it, and validate.

    An override of a key that holds text is taken as typed; of any other it is YAML (`parse_override`).
    `resume=<run folder>` continues in that folder unless `output_dir=` is overridden too.

    Args:
        recipe: a YAML file, the name of a shipped recipe, or the keys themselves.
        overrides: in order.

    Raises:
        UserError: one line for each thing that is wrong, naming key, value and limit.
    """
    where = find_recipe(recipe).name if isinstance(recipe, str | Path) else "the recipe"
    raw = overridden(recipe, overrides)
    commanded = {key for key, _ in map(parse_override, overrides)}
    if raw.get("resume") not in (None, "auto") and "output_dir" not in commanded:
        raw = raw | {"output_dir": raw["resume"]}
    return validate(raw, where=where, commanded=commanded)


def overridden(recipe: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a recipe's keys with overrides over them, before they are validated.

    Raises:
        UserError: as `raw_recipe` and `parse_override`.
    """
    raw = raw_recipe(recipe)
    for text in overrides:
        key, value = parse_override(text)
        raw = _override(raw, key.split("."), value)
    return raw


def raw_recipe(recipe: str | Path | Mapping[str, Any] | Config) -> dict[str, Any]:
    """Return a recipe's keys as they stand, before they are validated.

    Raises:
        UserError: no such recipe, or no YAML mapping in it.
    """
    if isinstance(recipe, Config):
        return recipe.model_dump(mode="json")
    return dict(recipe) if isinstance(recipe, Mapping) else read_yaml(find_recipe(recipe))


def validate(raw: Mapping[str, Any], where: str, commanded: Set[str] = frozenset()) -> Config:
    """A mapping as a `Config`; `where` names its origin in messages, `commanded` the keys that overrides set."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, Config, where, commanded))) from None


def find_recipe(recipe: str | Path) -> Path:
    """The file, or the recipe of that name that ships with the package."""
    try:
        path = Path(user_path(str(recipe)))
    except ValueError as error:
        raise UserError(f"the recipe {shown(str(recipe))}: {error}") from error
    if os.path.isfile(path):
        return path
    shipped = resources.files("rsaft_fast.recipes")
    names = [
        *sorted(entry.name for entry in shipped.iterdir() if entry.name.endswith(".yaml")),
        *sorted(f"{PAPER}/{e.name}" for e in (shipped / PAPER).iterdir() if e.name.endswith(".yaml")),
    ]
    for name in (path.as_posix().removeprefix("recipes/"), f"{path.as_posix().removeprefix('recipes/')}.yaml"):
        # A path that names a folder of its own and is not there is a typing error, not a shipped recipe.
        if not os.path.exists(path) and name in names:
            return Path(str(shipped / name))
    if os.path.exists(path) and not os.path.isdir(path):
        return path  # a pipe or device, which the reader refuses by its kind
    kind = "a folder" if os.path.isdir(path) else "not a file"
    near = difflib.get_close_matches(path.name, names, 1, cutoff=0.75)
    near = near or difflib.get_close_matches(path.as_posix(), names, 1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near else ""
    listed = ", ".join(name.removesuffix(".yaml") for name in names)
    raise UserError(f"the recipe {str(recipe)!r} is {kind}{hint}; give a YAML file or a shipped one: {listed}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping (see `yaml_text`); a key given twice is refused rather than silently overwritten.

    Raises:
        UserError: no regular file, one of more than `LARGEST_FILE` bytes, not UTF-8, not YAML, or no mapping.
    """
    text = read_text(path, "recipe", LARGEST_FILE)
    try:
        content = parse_yaml(text)
    except YAMLTextError as error:
        raise UserError(f"recipe {str(path)!r} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {str(path)!r} holds {_kind(content)}; a recipe is a mapping of keys to values")
    return content


def parse_override(text: str, root: type[Settings] = Config) -> tuple[str, Any]:
    """`key.sub=value` as the dotted key and its value.

    Where the key holds text, that is what stands behind the first `=`, to the letter: no quotes, comments or numbers
    are seen in it, and only `null` is something else where the key may be null. Elsewhere it is YAML.

    Args:
        root: the settings that the key is one of.

    Raises:
        UserError: no key, or a value that is not YAML.
    """
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise UserError(f"cannot read {shown(text)} as an override; write key=value or section.key=value")
    key, value = match.groups()
    accepted = text_kinds(root, key)
    if accepted:
        return key, None if value == "null" and "null" in accepted else value
    try:
        return key, parse_yaml(value)
    except YAMLTextError as error:
        raise UserError(f"{key} is {shown(value)} on the command line, which is not YAML: {error}") from error


def to_yaml(config: Config) -> str:
    """Write out the configuration with every default, a recipe of its own.

    Whether this run went on from an earlier one is no part of it, and a pipeline's folder is named so that it is found
    from every working directory.
    """
    resolved = config.model_copy(update={"loss": config.training_loss, "resume": None})
    tree = resolved.model_dump(mode="json")
    path = tree["backbone"]["path"]
    if path != PLAYGROUND and os.path.isdir(path):
        tree["backbone"]["path"] = os.path.abspath(path)
    return dump_yaml(tree)


def respelled(raw: dict[str, Any]) -> dict[str, Any]:
    """Respell a run's config.yaml as this version writes it, so that another spelling or an old key is no difference.

    What this version does not take is given back as it is.
    """
    try:
        return parse_yaml(to_yaml(validate(raw, "config.yaml")))
    except UserError:
        return raw


def _override(raw: Any, keys: list[str], value: Any, section: str = "") -> dict[str, Any]:
    raw = raw if isinstance(raw, dict) else {}
    head, *rest = keys
    if rest:
        return raw | {head: _override(raw.get(head), rest, value, head)}
    # Another method has keys of its own: those of the recipe's method go with it.
    if section == "method" and head == "name" and raw.get("name") != value:
        return {"name": value}
    return raw | {head: value}


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
