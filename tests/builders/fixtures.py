"""Fixtures of the trainer's and the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.recipes import Tiny, write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """Tiny pipelines, a tiny reward and a prompt file on disk."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run folder that does not exist yet."""
    return tmp_path / "run"
