"""SIGTERM and Ctrl-C ask the loop to stop; the loop decides when."""

from __future__ import annotations

import signal
import threading


class StopSignals:
    """While entered, SIGTERM and the first Ctrl-C only set `received`; a second Ctrl-C interrupts at once.

    A handler that saved by itself could run in the middle of an update, with perturbed weights. The previous handlers
    come back on exit. Outside the main thread, where Python allows no handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

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
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.received is not None
