"""Who imports whom, as `[tool.importlinter]` in pyproject.toml has it: it holds, and what breaks it is found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Module, what is added to it, and the import that is to be reported.
DELIBERATE = [
    ("ops/backends.py", "def late():\n    import rsaft_fast.optim.sam", "ops.backends -> rsaft_fast.optim.sam"),
    (
        "sampling/noise.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rsaft_fast.train import logging",
        "sampling.noise -> rsaft_fast.train.logging",
    ),
    ("rewards/base.py", "from rsaft_fast.backbones import configs", "rewards.base -> rsaft_fast.backbones.configs"),
    ("optim/moments.py", "from rsaft_fast.kernels import common", "optim.moments -> rsaft_fast.kernels.common"),
    ("kernels/common.py", "from rsaft_fast import errors", "kernels.common -> rsaft_fast.errors"),
    ("train/logging.py", "from rsaft_fast.benchmarks import results", "logging -> rsaft_fast.benchmarks.results"),
    ("abi/table.py", "import diffusers", "abi.table -> diffusers"),
    ("without_a_place.py", "", "rsaft_fast.without_a_place"),
]


def check(tree: Path) -> tuple[int, str]:
    """What a contributor runs."""
    command = [sys.executable, ROOT / ".ci" / "layers.py", tree]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    return done.returncode, done.stdout + done.stderr


def test_the_layers_hold():
    code, output = check(ROOT)
    assert code == 0, output


def test_imports_that_break_them_are_found(tmp_path):
    for name in ("rsaft_fast", "kernels", "recipes", "benchmarks"):
        for path in (ROOT / name).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    for name, text, _ in DELIBERATE:
        with open(tmp_path / name if name.startswith("kernels") else tmp_path / "rsaft_fast" / name, "a") as file:
            file.write(f"\n{text}\n")
    code, output = check(tmp_path)
    assert code == 1
    assert [line for *_, line in DELIBERATE if line not in output] == []
