"""Reading of files that a user names: regular ones alone, and no more of them than fits."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from rsaft_fast.errors import UserError
from rsaft_fast.files import refuse_io_errors

_PIECE = 2**20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | Path, what: str) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Anything else may wait for ever (a pipe that nobody writes to) or never end (/dev/zero).

    Args:
        path: of the file.
        what: how messages call it, such as "prompt file".

    Raises:
        UserError: nothing there, no regular file, not yours to read, or a name that no file can have.
    """
    try:
        with refuse_io_errors(f"{what} {str(path)!r}", "read"):
            # Without blocking: to open a pipe would wait for whoever writes to it. The kind is asked of what is open.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            try:
                mode = os.fstat(descriptor).st_mode
                if not stat.S_ISREG(mode):
                    kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
                    raise UserError(f"{what} {str(path)!r} cannot be read: it is {kind}; give a file")
                return os.fdopen(descriptor, "rb")
            except BaseException:
                os.close(descriptor)
                raise
    except ValueError as error:
        # A NUL byte, or a character that the file system cannot spell.
        raise UserError(f"{what} {str(path)!r} cannot be read ({error}); no file has such a name") from error


def read_limited(path: str | Path, what: str, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        UserError: it is larger, or see `open_regular`.
    """
    pieces, size = [], 0
    with refuse_io_errors(f"{what} {str(path)!r}", "read"), open_regular(path, what) as stream:
        announced = os.fstat(stream.fileno()).st_size
        # Some files grow while they are read, and some, as in /proc, announce nothing.
        while announced <= limit and size <= limit and (piece := stream.read(_PIECE)):
            pieces.append(piece)
            size += len(piece)
    if max(announced, size) > limit:
        raise UserError(f"{what} {str(path)!r} has {max(announced, size)} bytes; the limit is {limit}")
    return b"".join(pieces)


def read_text(path: str | Path, what: str, limit: int) -> str:
    """Read a regular file of UTF-8 text, with or without a byte-order mark, of at most `limit` bytes.

    Raises:
        UserError: other encodings, NUL characters, or see `read_limited`.
    """
    content = read_limited(path, what, limit)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = ", it may be UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise UserError(f"{what} {str(path)!r} is not UTF-8 (byte {error.start}{guess}); save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{what} {str(path)!r}, line {line}: a NUL character, which no text has; save it as UTF-8")
    return text
