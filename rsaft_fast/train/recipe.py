"""From a recipe file and dotted overrides to a `Config`, or to lines that say what to mend."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rsaft_fast.errors import UserError
from rsaft_fast.train.config import Config
from rsaft_fast.train.schema import explain

_OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)=(.*)", re.DOTALL)


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe, put `key.sub=value` overrides over it (values are YAML), and validate.

    `resume=<run folder>` continues in that folder unless `output_dir=` is overridden too.

    Raises:
        UserError: one line for each thing that is wrong, naming key, value and limit.
    """
    path = find_recipe(recipe)
    raw = read_yaml(path)
    given = [parse_override(text) for text in overrides]
    for key, value in given:
        raw = _override(raw, key.split("."), value)
    commanded = {key for key, _ in given}
    if raw.get("resume") not in (None, "auto") and "output_dir" not in commanded:
        raw = raw | {"output_dir": str(raw["resume"])}
    return validate(raw, where=path.name, commanded=commanded)


def validate(raw: Mapping[str, Any], where: str, commanded: set[str] = frozenset()) -> Config:
    """A mapping as a `Config`; `where` names its origin in messages, `commanded` the keys that overrides set."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, Config, where, commanded))) from None


def find_recipe(recipe: str | Path) -> Path:
    """The file, or the recipe of that name that ships with the package."""
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = resources.files("rsaft_fast.recipes")
    names = sorted(entry.name for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
    for name in (path.name, f"{path.name}.yaml"):
        # A path that names a folder of its own and is not there is a typing error, not a shipped recipe.
        if name in names and path.parent in (Path("."), Path("recipes")):
            return Path(str(shipped / name))
    kind = "a folder" if path.is_dir() else "not a file"
    raise UserError(f"the recipe {str(recipe)!r} is {kind}; give a YAML file or a shipped one: {', '.join(names)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, by the safe loader; a key given twice is refused rather than silently overwritten."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {_kind(content)}; a recipe is a mapping of keys to values")
    return content


def parse_override(text: str) -> tuple[str, Any]:
    """`key.sub=value` as the dotted key and the value that YAML reads."""
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise UserError(f"cannot read {text!r} as an override; write key=value or section.key=value")
    key, value = match.groups()
    try:
        return key, yaml.load(value, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"the value of {key}={value} is not YAML: {' '.join(str(error).split())}") from error


def to_yaml(config: Config) -> str:
    """The configuration with every default written out, a recipe of its own: whether this run went on from an earlier
    one is no part of it."""
    resolved = config.model_copy(update={"loss": config.training_loss, "resume": None})
    return yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


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


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice (line {line})")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-5 as a string unless it has a point; everyone who writes it means the number.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
