"""Writing so that a power cut, a full disk or a second process leaves the old or the new, never half of either."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from rsaft_fast.errors import UserError, first_line

_MENDS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files",
    errno.EIO: "see that the disk is sound",
}


@contextmanager
def io_errors_of(path: Path) -> Iterator[None]:
    """An I/O error inside the block is an `OSError` with a file name: `path` where the system gives none.

    safetensors has an exception of its own for them, with the number in its text.
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def describe_io_error(error: OSError) -> str:
    """Path and reason, in a line."""
    if error.errno is None:  # an exception of a library's that only counts as one of the system's
        return first_line(error)
    code = errno.errorcode.get(error.errno, str(error.errno))
    return f"{os.fsdecode(error.filename or 'a file')}: {error.strerror or os.strerror(error.errno)} ({code})"


def mend_of(error: OSError) -> str:
    """What a user does about an I/O error."""
    return _MENDS.get(error.errno, "mend that")


def fsync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with io_errors_of(path), path.open("rb") as stream:
        os.fsync(stream.fileno())


def fsync_folder(path: Path) -> None:
    """Wait until a folder's entries (creations, renames, deletions) are on the disk."""
    with io_errors_of(path):
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
    _replace(path, path.with_name(f".{path.name}.tmp"), text.encode())
    fsync_folder(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content as a whole; several processes may do so at once, and the last one wins."""
    # Random, since two machines that share the folder may have the same process number.
    _replace(path, path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp"), content)


def _replace(path: Path, temporary: Path, content: bytes) -> None:
    try:
        with io_errors_of(path), temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in another's place; both have the same parent. The old one stays if that fails."""
    give_usual_modes(temporary)
    fsync_tree(temporary)
    old = final.with_name(f".{final.name}.old.tmp")
    remove_tree(old)
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(temporary, final)
    except BaseException:
        if old.exists():
            os.rename(old, final)
        raise
    fsync_folder(final.parent)
    remove_tree(old)


def remove_tree(folder: Path) -> None:
    """Remove a folder if it is there, as far as that goes."""
    shutil.rmtree(folder, ignore_errors=True)


def give_usual_modes(folder: Path) -> None:
    """Give every file below a folder the mode that a new file of this process has; safetensors makes its own 0600."""
    mode = usual_mode(folder)
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def usual_mode(folder: Path) -> int:
    """The mode of a new file there: the umask's, or what the folder's own rules make of it."""
    probe = folder / f".mode.{secrets.token_hex(8)}.tmp"
    try:
        with probe.open("wb") as stream:
            return stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)


def check_writable(folder: Path, key: str = "output_dir") -> None:
    """Refuse an output folder that could not be made."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"{key} {folder} is {'a link to nothing' if folder.is_symlink() else 'a file'}; give a folder")
    existing = folder.absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key} {folder} cannot be made: {existing} is not a folder that you may write to")
