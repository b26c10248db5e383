"""What `rsaft-fast score` has scored so far, kept on the disk: whatever stops it costs a batch and no more."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from rsaft_fast.data.picture_lists import Picture
from rsaft_fast.errors import UserError
from rsaft_fast.files import refuse_io_errors
from rsaft_fast.lock import NoLocksError, lock, unlink_own

FORMAT = "rsaft-fast scores 1"
# (what a reward is, the part of a combination or "").
Column = tuple[str, str]


def identity_of(pictures: Sequence[Picture], prompts: Sequence[str]) -> str:
    """A digest of which files are scored, as they are now, and against what."""
    entries = []
    for picture, prompt in zip(pictures, prompts):
        try:
            found = os.stat(picture.file)
            entries.append([os.path.realpath(picture.file), found.st_size, found.st_mtime_ns, prompt])
        except (OSError, ValueError):
            # Whoever reads it says what is wrong.
            entries.append([str(picture.file), prompt])
    return digest(entries)


def digest(content: Any) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """A file beside the table that is to be: a line that says what is scored, then a line for every batch.

    It is this process's alone while it is open, and goes when there is nothing in it or the table is written. A last
    line that was cut off is dropped.
    """

    def __init__(self, path: Path, identity: str, log: Callable[[str], None] = lambda line: None):
        """Begin it, or go on with the one that is there.

        Args:
            log: takes a line where the file system has no locks.

        Raises:
            UserError: it cannot be written, is another process's, or holds scores of other pictures.
        """
        self.path = path
        self._columns: dict[Column, list[float]] = {}
        meanwhile = f"--output: {path}, where scores are kept meanwhile,"
        with refuse_io_errors(meanwhile, or_else="give a file elsewhere"):
            self._stream = self._open(log)
        self._end = 0
        try:
            self._read({"format": FORMAT, "pictures": identity})
        except BaseException:
            self.close(finished=self._end == 0)
            raise

    def _open(self, log: Callable[[str], None]) -> IO[bytes]:
        """The file, held by this process."""
        path = self.path
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"{path}, where scores are kept meanwhile, is no file; give another --output")
            # Appending writes at the end whatever was read before; unbuffered, what fails once does not fail again.
            stream = path.open("a+b", buffering=0)
            try:
                if lock(path, stream.fileno()):
                    return stream
            except BlockingIOError as error:
                stream.close()
                raise UserError(
                    f"{path} is being written by another rsaft-fast score; give another --output"
                ) from error
            except NoLocksError as error:
                log(error.warning(path))
                return stream
            except OSError:
                stream.close()
                raise
            # Its last holder has just finished and removed it.
            stream.close()

    def _read(self, header: dict[str, str]) -> None:
        self._stream.seek(0)
        first = json.dumps(header).encode() + b"\n"
        begun = self._stream.read(len(first))
        if begun != first and not first.startswith(begun):
            # Somebody's file, or of another call: not this one's to change.
            self._end = -1
            raise UserError(
                f"{self.path} holds something else, or scores of other pictures, prompts or versions of them; remove "
                "it, or give another --output"
            )
        if begun == first:
            self._end = len(first)
            *lines, _ = self._stream.read().split(b"\n")
            for line in lines:
                if not self._take(line):
                    break
                self._end += len(line) + 1
        self._stream.truncate(self._end)
        if self._end == 0:
            self._append(header)

    def _take(self, line: bytes) -> bool:
        """Take in a line that this class wrote; False for any other."""
        try:
            entry = json.loads(line)
            known = self._columns.setdefault((entry["reward"], entry["part"]), [])
            scores = entry["scores"]
            if entry["first"] != len(known) or not all(type(s) is float and math.isfinite(s) for s in scores):
                return False
        except (ValueError, TypeError, KeyError):
            return False
        known.extend(scores)
        return True

    @property
    def count(self) -> int:
        """Scores that are kept."""
        return sum(map(len, self._columns.values()))

    def scores(self, column: Column) -> list[float]:
        """The scores of the first pictures that are there already."""
        return list(self._columns.get(column, ()))

    def columns(self) -> dict[Column, list[float]]:
        """All scores."""
        return {column: list(scores) for column, scores in self._columns.items()}

    def add(self, column: Column, scores: Sequence[float]) -> None:
        """Keep the next pictures' scores, which are finite.

        Raises:
            UserError: the disk does not take them.
        """
        known = self._columns.setdefault(column, [])
        self._append({"reward": column[0], "part": column[1], "first": len(known), "scores": list(scores)})
        known.extend(scores)

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with refuse_io_errors(str(self.path)):
            try:
                if (written := self._stream.write(line)) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    self._stream.truncate(self._end)
                raise
        self._end += written

    def close(self, finished: bool = False) -> None:
        """Leave the file to the next call, or remove it where nothing is in it or all of it is `finished`."""
        with contextlib.suppress(OSError):
            if finished:
                unlink_own(self.path, self._stream.fileno())
            self._stream.close()


class Followed:
    """What a rank knows of the journal that another one keeps: the same scores, and no file."""

    def __init__(self, columns: dict[Column, list[float]]):
        self._columns = columns
        self.path = Path("the first rank's journal")

    @property
    def count(self) -> int:
        """Scores that are kept."""
        return sum(map(len, self._columns.values()))

    def scores(self, column: Column) -> list[float]:
        """The scores of the first pictures that are there already."""
        return list(self._columns.get(column, ()))

    def add(self, column: Column, scores: Sequence[float]) -> None:
        """Keep the next pictures' scores."""
        self._columns.setdefault(column, []).extend(scores)

    def close(self, finished: bool = False) -> None:
        """Nothing is open."""
