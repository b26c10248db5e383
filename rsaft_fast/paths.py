"""Paths as a user writes them: checked and completed once, where they enter a recipe or the command line."""

from __future__ import annotations

import os
import re

LONGEST_NAME = 255
"""Bytes of one name; what every usual file system takes."""

LONGEST_PATH = 4096
"""Bytes of a whole path; Linux's PATH_MAX."""

_URL = re.compile(r"[A-Za-z][\w+.\-]*://")
_SET = re.compile(r"([\w.\-]+=)(~.*)", re.DOTALL)


def user_path(text: str) -> str:
    """Check a path of this machine, and replace `~` and `~user` by the folder that they stand for.

    Environment variables stay as they are: a recipe of somebody else's shall not read them.

    Raises:
        ValueError: it is empty or an address, its home folder is not known, it has a name that no file can have, or
            one that is too long. The text says the limit and the mend, and not the path.
    """
    if _URL.match(text):
        raise ValueError("it is an address; give a file or folder of this machine")
    return _whole(text)


def user_place(text: str) -> str:
    """Apply `user_path` to what may also be an address, a hub id, the name of something, or NAME=PATH."""
    if match := _SET.fullmatch(text):
        return match[1] + _whole(match[2])
    return _whole(text)


def _whole(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty; give a path")
    require_text(text)
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise ValueError("the home folder that ~ stands for is not known here; write the path from / on")
    if (size := len(os.fsencode(path))) > LONGEST_PATH:
        raise ValueError(f"it has {size} bytes; a path has at most {LONGEST_PATH}")
    if (size := max(len(os.fsencode(name)) for name in path.split(os.sep))) > LONGEST_NAME:
        raise ValueError(f"it has a name of {size} bytes; a file's or folder's has at most {LONGEST_NAME}")
    return path


def require_text(text: str) -> None:
    """Refuse what no text and no file name may hold.

    Raises:
        ValueError: a NUL character, or half a character (a lone surrogate: bytes that were not UTF-8).
    """
    if "\0" in text:
        raise ValueError("it holds a NUL character; take it out")
    require_utf8(text)


def require_utf8(text: str) -> None:
    """Refuse what UTF-8 cannot hold.

    Raises:
        ValueError: half a character (of a pair of UTF-16: JSON's \\ud800, or bytes that were not UTF-8).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds {text[error.start]!r}, which is half a character; write it as UTF-8") from None
