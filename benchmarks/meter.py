"""Peak memory, time and kernels of one update, phase by phase, without waiting for the device within it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from rsaft_fast import phases
from rsaft_fast.benchmarks.timing import device_kernels
from rsaft_fast.estimate.live import LiveBytes

KINDS = {
    "attention": re.compile(r"flash|fmha|attention|sdpa", re.I),
    "products": re.compile(r"gemm|gemv|cutlass|nvjet|xmma|cublas|conv|wgrad|dgrad|winograd|implicit", re.I),
}
"""Kernels by their names; the first kind that matches. The rest are norms, elementwise work and copies."""
REST, IDLE = "elementwise, norms, copies", "idle"


@dataclass
class Measured:
    """One update.

    Attributes:
        ms: until the device had done it, by the host's clock.
        peak: bytes; torch's max_memory_allocated, or the CPU's storages as `LiveBytes` counts them, None where it did
            not (it slows the CPU down). standing: bytes that were there before.
        reserved: bytes that torch's allocator held at most; None on the CPU.
        peaks: bytes, by phase. phase_ms: device time, by phase; the CPU's own there.
    """

    ms: float = 0.0
    peak: int | None = None
    standing: int | None = None
    reserved: int | None = None
    peaks: dict[str, int] = field(default_factory=dict)
    phase_ms: dict[str, float] = field(default_factory=dict)


def measure(
    device: torch.device, update: Callable[[], object], standing: Callable[[], Iterable[torch.Tensor]] | None = None
) -> Measured:
    """Run an update once.

    Args:
        standing: gives the tensors that are there before, which the CPU's counter must be shown; None leaves it out.
    """
    found, marks = Measured(), []
    on_gpu = device.type == "cuda"
    live = LiveBytes("cpu") if standing is not None and not on_gpu else nullcontext()

    def begin(phase: str) -> None:
        """End a phase and begin another. Counters speak of the host's order of allocations: this waits for nothing."""
        if not on_gpu:
            marks.append((phase, time.perf_counter()))
            return
        if marks:
            name = marks[-1][0]
            found.peaks[name] = max(found.peaks.get(name, 0), torch.cuda.max_memory_allocated(device))
            found.reserved = max(found.reserved or 0, torch.cuda.max_memory_reserved(device))
        torch.cuda.reset_peak_memory_stats(device)
        marks.append((phase, torch.cuda.Event(enable_timing=True)))
        marks[-1][1].record()

    if on_gpu:
        torch.cuda.synchronize(device)
        found.standing = torch.cuda.memory_allocated(device)
    elif standing is not None:
        found.standing = live.see(standing())
    with live:
        start = time.perf_counter()
        begin(phases.REST)
        with phases.listening(begin):
            update()
        begin(phases.REST)
        if on_gpu:
            torch.cuda.synchronize(device)
        found.ms = 1e3 * (time.perf_counter() - start)
    for (name, begun), (_, ended) in zip(marks, marks[1:]):
        ms = begun.elapsed_time(ended) if on_gpu else 1e3 * (ended - begun)
        found.phase_ms[name] = found.phase_ms.get(name, 0.0) + ms
    if standing is not None and not on_gpu:
        found.peaks = {name: peak.total for name, peak in live.peaks.items()}
    found.peak = max(found.peaks.values(), default=None)
    return found


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), REST)


def kernel_shares(run: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """Fractions of the wall time by kind of kernel; idle is what no kernel covers. None without a GPU or CUPTI.

    The profiler slows the host down, so the wall time is that of calls without it.
    """
    run()
    if device.type != "cuda":
        return None
    wall_us = 1e3 * min(measure(device, run).ms for _ in range(3))
    spent = dict.fromkeys((*KINDS, REST), 0.0)
    for name, us in device_kernels(run):
        spent[kind_of(name)] += us
    if not any(spent.values()):
        return None
    return {kind: us / wall_us for kind, us in spent.items()} | {IDLE: max(0.0, 1 - sum(spent.values()) / wall_us)}
