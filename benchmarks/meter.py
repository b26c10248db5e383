"""Peak memory and time of one update, phase by phase, without waiting for the device within it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps

import torch

from rsaft_fast import phases
from rsaft_fast.algorithms import reward_gradient as step_module
from rsaft_fast.estimate.live import LiveBytes


@dataclass
class Measured:
    """One update.

    Attributes:
        ms: until the device had done it, by the host's clock.
        peak: bytes; torch's max_memory_allocated, or the CPU's storages as `LiveBytes` counts them, None where it did
            not (it slows the CPU down).
        reserved: bytes that torch's allocator held at most; None on the CPU.
        peaks: bytes, by phase. phase_ms: device time, by phase; the CPU's own there.
    """

    ms: float
    peak: int | None
    reserved: int | None
    peaks: dict[str, int] = field(default_factory=dict)
    phase_ms: dict[str, float] = field(default_factory=dict)


class Meter:
    """Measures updates on a device.

    Args:
        standing: what is there before an update; the CPU's counter must be shown it. None leaves it out.
    """

    def __init__(self, device: torch.device, standing: Callable[[], Iterable[torch.Tensor]] | None):
        self.device, self.standing = device, standing

    def __call__(self, update: Callable[[], object], optimizer: torch.optim.Optimizer | None = None) -> Measured:
        """Run `update`; with the optimizer of `rsaft_step`, phase by phase."""
        marks = _DeviceMarks(self.device) if self.device.type == "cuda" else _HostMarks()
        with marks.counting(self.standing):
            start = time.perf_counter()
            marks.begin(phases.REST)
            with _phases(marks.begin, optimizer):
                update()
            marks.synchronize()
            ms = 1e3 * (time.perf_counter() - start)
        return marks.measured(ms)


@contextmanager
def _phases(begin: Callable[[str], None], optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Tell `begin` of every phase of `rsaft_step` as it starts, and of the rest as it ends.

    The functions that phases are named after are wrapped where the step calls them; of nested ones the outermost names
    the phase, as in `memory.phases`.
    """
    depth = 0

    def marked(function: Callable, phase: str) -> Callable:
        @wraps(function)
        def run(*args, **kwargs):
            nonlocal depth
            depth += 1
            if depth == 1:
                begin(phase)
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    begin(phases.REST)

        return run

    places = [] if optimizer is None else [(step_module, name) for name in phases.FUNCTIONS]
    places += [] if optimizer is None else [(optimizer, name) for name in ("perturb", "step")]
    before = [(place, name, place.__dict__.get(name)) for place, name in places if hasattr(place, name)]
    for place, name, _ in before:
        setattr(place, name, marked(getattr(place, name), phases.FUNCTIONS[name]))
    try:
        yield
    finally:
        for place, name, own in before:
            if own is None:  # a method of the class
                delattr(place, name)
            else:
                setattr(place, name, own)


class _DeviceMarks:
    """Phases by events on the stream, their peaks by the allocator's own counter."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, torch.cuda.Event]] = []
        self.peaks: dict[str, int] = {}
        self.reserved = 0

    @contextmanager
    def counting(self, standing: Callable[[], Iterable[torch.Tensor]] | None) -> Iterator[None]:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield

    def begin(self, phase: str) -> None:
        self._close()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((phase, event))

    def _close(self) -> None:
        """The counters speak of the host's order of allocations, so reading them waits for nothing."""
        if self.marks:
            name = self.marks[-1][0]
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device))
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)

    def synchronize(self) -> None:
        self.begin(phases.REST)
        torch.cuda.synchronize(self.device)

    def measured(self, ms: float) -> Measured:
        spent: dict[str, float] = {}
        for (name, start), (_, end) in zip(self.marks, self.marks[1:]):
            spent[name] = spent.get(name, 0.0) + start.elapsed_time(end)
        return Measured(ms, max(self.peaks.values()), self.reserved, self.peaks, spent)


class _HostMarks:
    """The same where there is no device: to see that the code runs, at tiny size."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, float]] = []
        self.live = LiveBytes("cpu")

    @contextmanager
    def counting(self, standing: Callable[[], Iterable[torch.Tensor]] | None) -> Iterator[None]:
        if standing is not None:
            self.live.see(standing())
        with self.live if standing is not None else nullcontext():
            yield

    def begin(self, phase: str) -> None:
        self.marks.append((phase, time.perf_counter()))

    def synchronize(self) -> None:
        self.begin(phases.REST)

    def measured(self, ms: float) -> Measured:
        spent: dict[str, float] = {}
        for (name, start), (_, end) in zip(self.marks, self.marks[1:]):
            spent[name] = spent.get(name, 0.0) + 1e3 * (end - start)
        peaks = {name: peak.total for name, peak in self.live.peaks.items()}
        return Measured(ms, self.live.peak or None, None, peaks, spent)
