"""Limits of one client: what it may ask of a reward server, and how long it may take over it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rsaft_fast.errors import UserError
from rsaft_fast.settings import LONGEST_TEXT

# Files that open while the server runs, beside its connections: those of the libraries, and a margin.
_RESERVED_FILES = 32
_FEWEST_CONNECTIONS = 8
_MOST_FILES = 4096
_MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Limits:
    """Limits of what one client may ask of the server; times are in seconds.

    Attributes:
        max_pictures: of one request, and of one call of the reward.
        max_bytes: of a request's body, and of the pictures that it unpacks to.
        max_prompt: characters of a prompt; a tokenizer reads all of it before it cuts.
        max_ratio: a picture's longer side over its shorter one; a reward's resize of thinner ones needs gigabytes.
        max_waiting: requests that may wait; the next is told to come back.
        max_held_bytes: bodies that are being received or scored, together; the next is told to come back.
        timeout: for a body to arrive, and again for its scores.
        idle: for a connection to begin a request.
        head: for a request's headers to arrive.
        grace: after which a body must have come at `min_rate`.
        min_rate: bytes a second of a body, on average.
        ending: for a client to read its answer and send the rest of what was refused.
        max_connections: at one time; a new one takes the place of one that asks for nothing.
    """

    max_pictures: int = 64
    max_bytes: int = 256 * 2**20
    max_prompt: int = LONGEST_TEXT
    max_ratio: float = 10.0
    max_waiting: int = 64
    max_held_bytes: int = 2**31
    timeout: float = 300.0
    idle: float = 15.0
    head: float = 10.0
    grace: float = 10.0
    min_rate: float = 16_384.0
    ending: float = 10.0
    max_connections: int = 512


def connections_that_fit(limits: Limits) -> int:
    """Count the connections that may be open at one time: `max_connections`, or fewer where files are limited.

    The limit of this process is raised as far as it may be. Without a free file nobody is accepted any more, however
    idle the others are.

    Raises:
        UserError: hardly any fit.
    """
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return limits.max_connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return limits.max_connections
    files = soft - _open_files() - _RESERVED_FILES
    # Those that are just being accepted come on top.
    fitting = files - min(_MOST_AT_ONCE, files // 3)
    if fitting < _FEWEST_CONNECTIONS:
        raise UserError(
            f"this process may hold {soft} files open, which leaves {max(fitting, 0)} for connections; the server "
            f"needs {_FEWEST_CONNECTIONS}: raise the limit (ulimit -n 1024)"
        )
    return min(limits.max_connections, fitting)


def accepted_at_once(connections: int) -> int:
    """Count the new connections in one turn of the event loop, of so many at one time.

    Fewer than half of them, so that those before had a turn to say what they ask for, and are not taken for silent.
    """
    return max(1, min(_MOST_AT_ONCE, connections // 2 - 1))


def _open_files() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return _RESERVED_FILES
