"""Times that can be compared: device events, a cold L2, and what one call puts on the device."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

FLUSH_BYTES = 256 << 20  # several times the largest L2 (H100: 50 MB, B200: 126 MB)
_MOST_HEAD_START = 64  # flushes, about 6 ms on an H100


@dataclass(frozen=True)
class Part:
    """A function that can be repeated, and what must happen before each call without being timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None

    def __call__(self) -> object:
        self.prepare()
        return self.run()


@dataclass
class Times:
    """Milliseconds of each call: on the device (`ms`), and until the host was free again (`host_ms`)."""

    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    def extend(self, other: Times) -> None:
        self.ms += other.ms
        self.host_ms += other.host_ms

    def row(self) -> dict[str, float | int]:
        """The fields of a result row."""
        times = {f"ms_p{p}": float(np.percentile(self.ms, p)) for p in (20, 50, 80)}
        return times | {"host_ms": float(np.median(self.host_ms)), "calls": len(self.ms)}


class Timer:
    """Times calls with a cold L2, behind enough other work that launching them is not what is timed."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        if self.on_gpu:
            self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
            self._cold(2)
            self._flush_ms = min(self._once(lambda: self._cold(1))[0] for _ in range(3))

    def times(self, part: Part, repeats: int = 20, seconds: float = 1.0, host_alone: bool = False) -> Times:
        """Times of so many calls, of fewer but at least three where they would take more than `seconds`; `host_alone`:
        until the call returns, the device idle before and never waited for within."""
        flushes, calls = self._plan(part, repeats, seconds)
        found = Times()
        gc.disable()  # a garbage collection within a call of 50 us would be most of it
        try:
            for _ in range(calls):
                part.prepare()
                self.synchronize() if host_alone else self._cold(flushes)
                ms, host_ms = self._once(part.run, host_alone)
                found.ms.append(ms)
                found.host_ms.append(host_ms)
        finally:
            gc.enable()
        self.synchronize()
        return found

    def median(self, run: Callable[[], object], repeats: int = 10) -> float:
        """Milliseconds of the device for one call."""
        return self.times(Part(run), repeats).row()["ms_p50"]

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _plan(self, part: Part, repeats: int, seconds: float) -> tuple[int, int]:
        """Call a part twice: flushes that keep the device busy while the host launches, as a backward pass does, and
        how many calls there is time for."""
        part()
        self.synchronize()
        part.prepare()
        begun = time.perf_counter()
        host_ms = _host_ms(part.run)
        self.synchronize()
        whole_ms = 1e3 * (time.perf_counter() - begun)
        flushes = min(_MOST_HEAD_START, 1 + math.ceil(1.5 * host_ms / self._flush_ms)) if self.on_gpu else 0
        return flushes, min(repeats, max(3, int(1e3 * seconds / max(whole_ms, 1e-3))))

    def _cold(self, times: int) -> None:
        """Reads leave the L2 full of clean lines; written ones would be written back at the next kernel's cost."""
        for _ in range(times):
            self._flush.sum()

    def _once(self, run: Callable[[], object], host_alone: bool = False) -> tuple[float, float]:
        """Milliseconds of the device and of the host, which are the same without a device."""
        if not self.on_gpu or host_alone:
            return (_host_ms(run),) * 2
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        host_ms = _host_ms(run)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), host_ms


def device_kernels(run: Callable[[], object]) -> list[tuple[str, float]]:
    """Names and microseconds of all that a call puts on the GPU; empty where the profiler cannot see it."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
    except (RuntimeError, AssertionError):  # no CUPTI, or none that this machine lets us use
        return []
    # Annotations (record_function around torch's optimizers) are listed beside the work they span.
    on_device = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, e.device_time_total) for e in on_device if not getattr(e, "is_user_annotation", False)]


def launches(part: Part, device: torch.device) -> dict[str, int | None]:
    """Kernels, and copies and fills, that one call puts on the device; None on the CPU or where nothing was seen."""
    names = []
    if device.type == "cuda":
        part()
        torch.cuda.synchronize()
        part.prepare()
        names = [name for name, _ in device_kernels(part.run)]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"launches": len(names) - copies, "copies": copies} if names else {"launches": None, "copies": None}


def extra_bytes(part: Part, device: torch.device) -> int | None:
    """Memory that one call allocates beyond what was there, at its peak; None on the CPU."""
    if device.type != "cuda":
        return None
    part.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    part.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _host_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
