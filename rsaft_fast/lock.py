"""Lock of a folder for one process: the operating system's, which dies with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rsaft_fast.errors import UserError

LOCK = ".lock"
# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

_TRIES = 100


class FolderHeldError(UserError):
    """Another process writes into the folder."""


@contextmanager
def sole_writer(folder: Path, key: str, log: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold a folder, made if need be, against every other process that asks in this way.

    What was made and is still empty at the end goes again.

    `flock` on a file in the folder: it holds on this machine and, where NFS has its lock service, on others. A process
    that dies leaves the file and no lock; the next one takes both over.

    Args:
        key: what the user called the folder, for the message.
        log: takes a line where the file system has no locks: the block runs without one.

    Raises:
        FolderHeldError: another process holds it; the line names process, machine and time.
        OSError: the folder or the file in it cannot be made.
    """
    made: list[Path] = []
    try:
        descriptor = _take(folder, key, log, made)
        try:
            yield
        finally:
            # While it is still held: whoever opened the file before it went finds that it is no longer the folder's.
            unlink_own(folder / LOCK, descriptor)
            os.close(descriptor)
    finally:
        for path in reversed(made):
            with suppress(OSError):  # it holds something by now
                path.rmdir()


class NoLocksError(OSError):
    """The file system has no locks."""

    def warning(self, path: Path) -> str:
        """Say what to tell a user who writes to that path without one."""
        return (
            f"warning: the file system of {path} has no locks ({self.strerror}): nothing keeps a second process from "
            "writing there"
        )


def lock(path: Path, descriptor: int) -> bool:
    """Lock the open file of that path against every other process until it is closed, by `flock`.

    Returns:
        False where the path has another file by now, or none: its last holder removed it; open it anew.

    Raises:
        BlockingIOError: another process holds it.
        NoLocksError: nobody can hold it.
        OSError: anything else that the file system says.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocksError(error.errno, error.strerror) from error
        raise
    return _is(path, descriptor)


def unlink_own(path: Path, descriptor: int) -> None:
    """Remove the file of that path where it is still the open one, and do nothing where it cannot be removed."""
    with suppress(OSError):
        if _is(path, descriptor):
            path.unlink()


def _take(folder: Path, key: str, log: Callable[[str], None], made: list[Path]) -> int:
    path, tries = folder / LOCK, 0
    while True:
        _make(folder, made)
        try:
            descriptor = _open(path)
        except FileNotFoundError:
            tries += 1
            if tries == _TRIES:
                raise
            continue  # its last holder has just removed what it had made
        try:
            held = lock(path, descriptor)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise FolderHeldError(
                f"{key} {folder} is being written by {holder}; wait for it, stop it, or give another {key}"
            ) from None
        except NoLocksError as error:
            last = _holder(descriptor, patience=0)
            log(f"{error.warning(folder)}; the last to begin was {last}")
            _note(descriptor)
            return descriptor
        except OSError:
            os.close(descriptor)
            raise
        if held:
            _note(descriptor)
            return descriptor
        os.close(descriptor)


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder as `mkdir -p` does, noting what was not there."""
    absent = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    for path in reversed(absent):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        made.append(path)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not os.path.exists(path):
            raise
        return os.open(path, os.O_RDONLY)  # another user's, left behind: reading is enough for a lock


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _note(descriptor: int) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # the lock is what counts; this is for whoever asks who has it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int, patience: int = 20) -> str:
    """Say who holds it.

    Between locking and noting there is a moment in which the file says nothing yet.
    """
    for _ in range(patience + 1):
        try:
            holder = json.loads(os.pread(descriptor, 1000, 0))
            return f"process {int(holder['pid'])} on {str(holder['host'])[:100]} since {str(holder['since'])[:30]}"
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.01 if patience else 0)
    return "a process that left no name"
