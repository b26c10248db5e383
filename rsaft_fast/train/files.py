"""Writing so that a power cut leaves the old or the new, never half of either."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def fsync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def fsync_folder(path: Path) -> None:
    """Wait until a folder's entries (creations, renames, deletions) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Every file below a folder, then every folder, the innermost first."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            fsync_file(Path(folder) / name)
        fsync_folder(Path(folder))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content as a whole; several processes may do so at once, and the last one wins."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in another's place; both have the same parent."""
    fsync_tree(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    fsync_folder(final.parent)
