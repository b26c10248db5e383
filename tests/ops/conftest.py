"""Triton's interpreter pays for each call of a helper: wider blocks, two a chunk and a tail, keep it to a minute."""

import importlib
import os

import pytest

from rsaft_fast.ops import CHUNK


@pytest.fixture(autouse=True)
def wide_blocks(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":
        for name in ("global_norm", "sam_perturb", "sam_restore", "sam_adamw", "perturb_images"):
            monkeypatch.setattr(importlib.import_module(f"rsaft_fast.kernels.{name}"), "BLOCK", CHUNK // 2)
