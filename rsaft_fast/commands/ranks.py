"""Commands whose pictures are shared by the processes that a launcher starts."""

from __future__ import annotations

import os
from collections.abc import Callable

from rsaft_fast.distributed import World
from rsaft_fast.distributed.launch import find_place, launched
from rsaft_fast.distributed.world import PeerError

TIMEOUT = 1800.0
"""Seconds that a process waits for another; as `distributed.timeout` is by default."""


def shared(device: str, work: Callable[[World], int]) -> int:
    """Do the work of a command on every process among which it is shared, or on this one alone; return its exit code.

    What is wrong is said once.
    """
    try:
        with launched(find_place(os.environ), device, TIMEOUT) as world:
            return work(world)
    except PeerError:
        return 2
