"""Times that can be compared: device events, a cold L2, providers in turn, and what one call puts on the device."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
FLUSH_BYTES = 256 << 20
"""Several times the largest L2 (H100: 50 MB, B200: 126 MB)."""

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

    def add(self, ms: list[float], host_ms: list[float]) -> None:
        self.ms += ms
        self.host_ms += host_ms

    def row(self) -> dict[str, float | int]:
        """The fields of a result row."""
        ms, host_ms = (torch.tensor(values, dtype=torch.float64) for values in (self.ms, self.host_ms))
        found = {f"ms_{name}": float(ms.quantile(q)) for name, q in QUANTILES.items()}
        return found | {"host_ms": float(host_ms.median()), "calls": len(self.ms)}


class Timer:
    """Times parts in turn: A, B, C, A, B, C, ... so that a card that warms up or throttles does so for all of them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flush = None
        self._flush_ms = 0.0
        if device.type == "cuda":
            self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
            self._cold(2)
            self._flush_ms = min(self._events(lambda: self._cold(1))[0] for _ in range(3))

    def alternate(self, parts: Mapping[str, Part], repeats: int = 20, seconds: float = 1.0) -> dict[str, Times]:
        """Times of every part over `repeats` rounds after two calls that are not counted.

        A part that would take longer than `seconds` in all is called less often, but at least three times.
        """
        times = {name: Times() for name in parts}
        starts, limits = {}, {}
        for name, part in parts.items():
            part()
            self.synchronize()
            part.prepare()
            begun = time.perf_counter()
            part.run()
            host_ms = 1e3 * (time.perf_counter() - begun)
            self.synchronize()
            whole_ms = 1e3 * (time.perf_counter() - begun)
            starts[name] = self._head_start(host_ms)
            limits[name] = min(repeats, max(3, int(1e3 * seconds / max(whole_ms, 1e-3))))
        with _no_collection():
            for round_ in range(repeats):
                for name, part in parts.items():
                    if round_ < limits[name]:
                        part.prepare()
                        self._cold(starts[name])
                        ms, host_ms = self._events(part.run)
                        times[name].add([ms], [host_ms])
        return times

    def host_only(self, parts: Mapping[str, Part], repeats: int = 100, seconds: float = 3.0) -> dict[str, Times]:
        """Host time until a call returns, the device idle before and never waited for within.

        Rounds end after `seconds`, but not before the third.
        """
        times = {name: Times() for name in parts}
        for part in parts.values():
            for _ in range(3):
                part()
        end = time.monotonic() + seconds
        with _no_collection():
            for round_ in range(repeats):
                if round_ >= 3 and time.monotonic() > end:
                    break
                for name, part in parts.items():
                    part.prepare()
                    self.synchronize()
                    ms = _host_ms(part.run)
                    times[name].add([ms], [ms])
        self.synchronize()
        return times

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _head_start(self, host_ms: float) -> int:
        """Flushes that keep the device busy while the host launches: behind a backward pass it is ahead as well."""
        if self._flush is None:
            return 0
        return min(_MOST_HEAD_START, 1 + math.ceil(1.5 * host_ms / self._flush_ms))

    def _cold(self, times: int) -> None:
        """Reads leave the L2 full of clean lines; written ones would be written back at the next kernel's cost."""
        for _ in range(times if self._flush is not None else 0):
            self._flush.sum()

    def _events(self, run: Callable[[], object]) -> tuple[float, float]:
        if self.device.type != "cuda":
            ms = _host_ms(run)
            return ms, ms
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


@contextmanager
def _no_collection() -> Iterator[None]:
    """A garbage collection within a call of 50 us would be most of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
