from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.recipes import Tiny, write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """Tiny pipelines, a tiny reward and a prompt file on disk."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def one_thread():
    """The same sums in the same order as the subprocesses, which run with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"
