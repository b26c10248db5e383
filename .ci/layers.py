#!/usr/bin/env python3
"""Check who imports whom: the contracts of `[tool.importlinter]` in pyproject.toml, on a source tree.

    python .ci/layers.py [TREE]    # this tree, unless another is named

import-linter reads what lies below `rsaft_fast/`. `kernels/`, `recipes/` and `benchmarks/` lie beside it, and setup.py
maps them into the package; so it is shown a folder of links in which they lie where they are installed.
"""

import os
import sys
import tempfile
from pathlib import Path

from importlinter.cli import lint_imports

BESIDE = ("kernels", "recipes", "benchmarks")  # as in setup.py


def main(tree: Path) -> int:
    """Check the contracts; 0 where they hold, 1 where one is broken (the imports are printed)."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "rsaft_fast")
        package.mkdir()
        for path in (tree / "rsaft_fast").iterdir():
            if path.stem not in BESIDE:
                (package / path.name).symlink_to(path)
        for name in BESIDE:
            (package / name).mkdir()
            for path in (tree / name).glob("*.py"):
                (package / name / path.name).symlink_to(path)
            if (module := tree / "rsaft_fast" / f"{name}.py").exists():  # stands for the folder's __init__.py
                (package / name / "__init__.py").symlink_to(module)
        before = Path.cwd()
        os.chdir(folder)  # where import-linter looks for the package first
        try:
            return lint_imports(str(tree / "pyproject.toml"), no_cache=True, no_logo=True)
        finally:
            os.chdir(before)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()))
