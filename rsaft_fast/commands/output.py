"""Where a command may write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from rsaft_fast.errors import UserError
from rsaft_fast.files import check_writable, refuse_io_errors
from rsaft_fast.lock import LOCK, FolderHeldError, sole_writer
from rsaft_fast.progress import tell


@contextmanager
def output_folder(asked: str | None, default: str) -> Iterator[Path]:
    """Hold the output folder against other commands: the one asked for, or the first free one.

    The one asked for must be new or empty; else it is the first free one of `default`, `default-2`, ...

    Raises:
        UserError: it holds something, another process writes there, or it cannot be made.
    """
    with ExitStack() as held:
        if asked is None:
            yield _first_free(held, default)
            return
        folder = Path(asked)
        _hold(held, folder)
        if not _is_empty(folder):
            raise UserError(f"--output {folder} is not empty; give a new folder")
        yield folder


def _first_free(held: ExitStack, default: str) -> Path:
    for n in count(1):
        folder = Path(default if n == 1 else f"{default}-{n}")
        if os.path.exists(folder) and not os.path.exists(folder / LOCK):
            continue
        with suppress(FolderHeldError):
            _hold(held, folder)
            if _is_empty(folder):
                return folder


def _hold(held: ExitStack, folder: Path) -> None:
    check_writable(folder, "--output")
    with refuse_io_errors(f"--output {folder}", "made", "give another folder"):
        held.enter_context(sole_writer(folder, "--output", tell))


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold an output folder, new or begun, against other commands.

    Raises:
        UserError: another process writes there, or it cannot be made.
    """
    with ExitStack() as held:
        _hold(held, folder)
        yield


def _is_empty(folder: Path) -> bool:
    return all(path.name == LOCK for path in folder.iterdir())
