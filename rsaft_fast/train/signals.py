"""SIGTERM and Ctrl-C ask the loop to stop; the loop decides when."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from rsaft_fast.distributed import World
from rsaft_fast.progress import is_silent


class Interrupted(KeyboardInterrupt):
    """A signal that is not to wait; `signal` is which."""

    def __init__(self, received: signal.Signals):
        super().__init__(received.name)
        self.signal = received


class StopSignals:
    """Handler of the first SIGTERM or Ctrl-C, which sets `received` and says what is finished first.

    A second one, of either, raises `Interrupted` at once.

    A handler that saved by itself could run in the middle of an update, with perturbed weights. The previous handlers
    come back on exit. Outside the main thread, where Python allows no handlers, nothing is installed.

    Among several ranks a signal counts from the next `agree` on, on all of them alike: what one would leave out alone,
    the others would wait for.

    Attributes:
        received: the first signal, or None.
        finishing: what will be finished first, in words; None: there is nothing to save yet, and the first signal
            raises too.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.received: signal.Signals | None = None
        self._agreed = False
        self.finishing: str | None = "stopping soon"
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame) -> None:
        received = signal.Signals(number)
        at_once = self.received is not None or self.finishing is None
        self.received = self.received or received
        if at_once:
            raise Interrupted(received)
        _tell(f"{received.name}: {self.finishing}; again to stop at once")

    def agree(self) -> bool:
        """Take over a signal that any rank has received; return whether there is one."""
        number = self.world.largest(self.received or 0)
        if number and self.received is None:
            self.received = signal.Signals(number)
        self._agreed = number > 0
        return bool(self)

    def __bool__(self) -> bool:
        return self._agreed if self.world.size > 1 else self.received is not None


def _tell(line: str) -> None:
    """Past the stream's buffer: the handler may have interrupted a write to it."""
    if is_silent():
        return
    try:
        descriptor = sys.stderr.fileno()
        os.write(descriptor, f"{chr(10) * os.isatty(descriptor)}rsaft-fast: {line}\n".encode())
    except (AttributeError, OSError, ValueError):
        pass  # no terminal, or none any more
