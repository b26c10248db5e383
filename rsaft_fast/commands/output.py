"""Where a command may write."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from rsaft_fast.errors import UserError
from rsaft_fast.train.check import check_writable


def output_folder(asked: str | None, default: str) -> Path:
    """The folder asked for, which must be new or empty, or the first free one of `default`, `default-2`, ...

    Raises:
        UserError: it holds something, or cannot be made.
    """
    if asked is None:
        names = (default if n == 1 else f"{default}-{n}" for n in count(1))
        folder = next(path for path in map(Path, names) if not path.exists())
    else:
        folder = Path(asked)
    check_writable(folder, "--output")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output {folder} is not empty; give a new folder")
    return folder
