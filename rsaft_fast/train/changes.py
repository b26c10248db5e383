"""What a resumed run has other than the run that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import read_yaml, respelled, to_yaml, validate
from rsaft_fast.train import checkpoint as checkpoints
from rsaft_fast.train.trainer import describe_software
from rsaft_fast.yaml_text import parse_yaml

# Keys that may differ after a resume without a word.
_FREE_KEYS = {
    *("resume", "output_dir", "max_steps", "checkpoint_every", "keep_checkpoints", "samples", "evaluation", "logging"),
    *("report", "distributed"),
    "data.encoding_cache",
}


def what_changed(config: Config, checkpoint: Path, info: dict[str, Any], reward: str | None = None) -> list[str]:
    """Lines about what may keep a resumed run from repeating bit for bit: other settings, versions, or weights.

    Args:
        info: the checkpoint's.
        reward: SHA-256 of the reward's files now.
    """
    try:
        before = _flat(_with_defaults(respelled(read_yaml(checkpoint / checkpoints.CONFIG))))
    except UserError as error:
        return [f"what has changed since cannot be said: {error}"]
    now = _flat(parse_yaml(to_yaml(config)))
    keys = [key for key in dict.fromkeys([*now, *before]) if not _FREE_KEYS & {key, key.partition(".")[0]}]
    lines = _differences(keys, before, now)
    if reward != info.get("reward", reward):
        lines.append(
            f"warning: the reward's files are others (SHA-256 {info['reward']} before, {reward} now): its scores "
            "cannot be compared with the earlier updates'"
        )
    lines += [
        f"{name} was {info[name]} and is {version} now: the last bits may differ"
        for name, version in describe_software().items()
        if info.get(name, version) != version
    ]
    return lines


def differing(config: Config, checkpoint: Path, keys: Sequence[str]) -> list[str]:
    """Say which of these keys the run that wrote a checkpoint had otherwise; nothing where its recipe is unreadable."""
    with suppress(UserError):
        before = _flat(_with_defaults(respelled(read_yaml(checkpoint / checkpoints.CONFIG))))
        now = _flat(parse_yaml(to_yaml(config)))
        return _differences(keys, before, now)
    return []


def _differences(keys: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say which keys differ; of a section that is null on one side, the keys that it has on the other."""
    return [
        f"{key} was {_value_of(key, before)} and is {_value_of(key, now)} now"
        for key in keys
        if _value_of(key, before) != _value_of(key, now)
        and not any(other.startswith(f"{key}.") for flat in (before, now) for other in flat)
    ]


def _value_of(key: str, flat: Mapping[str, Any]) -> str:
    """The value in words; of a key inside a section that is null, that."""
    if key in flat:
        return repr(flat[key])
    section = key.rpartition(".")[0]
    return f"not there ({section} is null)" if section in flat else "not there"


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Keys that have come since are at their defaults, which is what the run had without knowing of them."""
    with suppress(UserError):
        return parse_yaml(to_yaml(validate(raw, where=checkpoints.CONFIG)))
    return raw


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}
