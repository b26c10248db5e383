"""Fixtures of the trainer's and the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.clip import write_clip
from builders.dino import write_dino
from builders.recipes import Tiny, write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """Tiny pipelines, a tiny reward and a prompt file on disk."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run folder that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def aux(tmp_path_factory) -> Path:
    """A second reward, and an encoder of pictures beside it."""
    folder = tmp_path_factory.mktemp("aux")
    write_clip(folder, seed=7, context=40)
    write_dino(folder / "dino")
    return folder
