"""Files written whole or not at all, hashed, and refused in one line where they cannot be read or written.

A power cut, a full disk or a second process leaves the old or the new, never half of either.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
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
_MENDS_OF_READING = _MENDS | dict.fromkeys((errno.EACCES, errno.EPERM), "make it readable")


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
    return f"{os.fsdecode(error.filename or 'a file')}: {_reason(error)}"


def _reason(error: OSError) -> str:
    if error.errno is None:
        return first_line(error)
    return f"{error.strerror or os.strerror(error.errno)} ({errno.errorcode.get(error.errno, error.errno)})"


def mend_of(error: OSError, reading: bool = False) -> str:
    """What a user does about an I/O error."""
    return (
        _MENDS_OF_READING.get(error.errno or 0, "check the path")
        if reading
        else _MENDS.get(error.errno or 0, "mend that")
    )


@contextmanager
def refuse_io_errors(what: str, action: str = "written", or_else: str = "") -> Iterator[None]:
    """Turn an I/O error inside the block into a `UserError`: what cannot be done, why, and what to do about it.

    Args:
        what: the file or the key, as the user knows it, with its path.
        action: "written", "read" or "made".
        or_else: another way out, such as "give another folder".
    """
    try:
        yield
    except OSError as error:
        ways = [mend_of(error, action == "read"), *([or_else] if or_else else ())]
        raise UserError(f"{what} cannot be {action}: {_reason(error)}; {', or '.join(ways)}") from error


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


@contextmanager
def replacing(path: Path, alone: bool = False) -> Iterator[Path]:
    """Replace a file's content as a whole: yield a path beside it to write to, and put that in its place at the end.

    Whatever the block raises leaves the old file as it was, and nothing beside it.

    Args:
        alone: nobody else writes the file meanwhile; else several processes may do so at once, and the last one wins.
    """
    # Random, since two machines that share the folder may have the same process number.
    temporary = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with io_errors_of(path):
            yield temporary
            fsync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Replace the text of a file that nobody else writes, as a whole; it is on the disk when this returns."""
    with replacing(path, alone=True) as temporary:
        temporary.write_bytes(text.encode())
    fsync_folder(path.parent)


def replace_between(text: str, begin: str, end: str, said: str, where: str) -> str:
    """Replace what lies between two marker lines of a text.

    Args:
        said: put between them, on lines of its own.
        where: what the text is called, for the message.

    Raises:
        UserError: the markers are not there once each, the first before the second.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{where} needs one line {begin} and, after it, one line {end}: the text goes between")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{said}\n{end}{rest.split(end)[1]}"


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content as a whole; several processes may do so at once, and the last one wins."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


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


def digests_of(files: Sequence[Path], *algorithms: str) -> dict[str, str]:
    """Hashes of the files' bytes, one after the other, read once."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                for digest in digests.values():
                    digest.update(block)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def sha256_of(files: Sequence[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other."""
    return digests_of(files, "sha256")["sha256"]


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
