"""The components of a pipeline's folder, by their small files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}


@dataclass(frozen=True)
class Part:
    """One component of a pipeline that is to be loaded.

    Attributes:
        folder: its own.
        made: the class of diffusers or transformers that it becomes.
        config: content of its config file; empty for a tokenizer without one.
    """

    name: str
    folder: Path
    made: type
    config: dict[str, Any]

    @property
    def is_network(self) -> bool:
        return not self.name.startswith(tuple(_CONFIGS))

    @property
    def config_file(self) -> Path:
        return self.folder / config_name(self.name)


def config_name(part: str) -> str:
    """The file name of a component's config."""
    return next((file for start, file in _CONFIGS.items() if part.startswith(start)), "config.json")
