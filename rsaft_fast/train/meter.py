"""Where a run's time and memory go, phase by phase; and what it ran on, for whoever looks at it later."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rsaft_fast.files import write_atomically
from rsaft_fast.phases import REST, listening

RUN = "run.json"
"""Of a run folder: `RunFacts`."""


@dataclass
class RunFacts:
    """What a run folder says of itself.

    Attributes:
        software: package to version.
        device: name of the GPU or the processor.
        seconds: phase to its seconds, in all sittings of the run.
        peaks: phase to the bytes of GPU memory in use at its worst, for each phase that set a new peak of the run.
        peak: bytes, of the whole run: of the GPU, or without one of the process.
    """

    software: dict[str, str] = field(default_factory=dict)
    device: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    peak: int = 0


class Meter:
    """Adds up the time of each phase. On a GPU by its own clock: nothing waits for it, neither here nor there."""

    def __init__(self, device: torch.device, software: dict[str, str]):
        self.device = device
        self.cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if self.cuda else platform.processor() or platform.machine()
        self.facts = RunFacts(software=software, device=name)
        self._marks: list[tuple[str, Any]] = []
        self._peak = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure inside the block."""
        self._begin(REST)
        with listening(self._begin):
            yield
        self._begin(REST)

    def _begin(self, name: str) -> None:
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self.device))
            if (peak := torch.cuda.max_memory_allocated(self.device)) > self._peak and self._marks:
                self._peak = self.facts.peaks[self._marks[-1][0]] = peak
        else:
            mark = time.perf_counter()
        self._marks.append((name, mark))
        if len(self._marks) > 1000:
            self._fold()

    def _fold(self) -> None:
        """Turn marks into seconds. The GPU has passed all but the newest ones long ago."""
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:]):
            if self.cuda:
                end.synchronize()
            seconds = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            self.facts.seconds[name] = self.facts.seconds.get(name, 0.0) + seconds
        del self._marks[:-1]

    def write(self, path: Path, resumed: bool) -> None:
        """Write what was measured, once; where the run was resumed, added to what its earlier sittings left there."""
        self._fold()
        earlier, own = read_facts(path) if resumed else RunFacts(), self.facts
        own.peak = self._peak if self.cuda else _process_peak()
        for name, seconds in earlier.seconds.items():
            own.seconds[name] = own.seconds.get(name, 0.0) + seconds
        for name, peak in earlier.peaks.items():
            own.peaks[name] = max(own.peaks.get(name, 0), peak)
        own.peak = max(own.peak, earlier.peak)
        own.seconds = {name: round(seconds, 3) for name, seconds in own.seconds.items()}
        write_atomically(path, json.dumps(asdict(own), indent=1) + "\n")


def read_facts(path: Path) -> RunFacts:
    """Read what `Meter.write` wrote; what is not there, or is something else, is empty."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = RunFacts(**{name: content[name] for name in RunFacts.__dataclass_fields__ if name in content})
        if all(isinstance(seconds, int | float) for seconds in kept.seconds.values()):
            return kept
    return RunFacts()


def _process_peak() -> int:
    """Bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
