"""Times that can be compared: device events, cold L2, and the card's own copy bandwidth from the same run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Part = Callable[[], object]
QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}


class Timer:
    """Milliseconds of a function's device work (host time on the CPU)."""

    def __init__(self, device: torch.device):
        self.device = device
        # Larger than any L2: writing it leaves nothing of the operands there.
        self._flush = torch.empty(64 << 20, dtype=torch.float32, device=device) if device.type == "cuda" else None

    def __call__(self, part: Part, repeats: int = 20, warmup: int = 3) -> dict[str, float]:
        """Quantiles over `repeats` runs, each after the caches were flushed."""
        for _ in range(warmup):
            part()
        times = torch.tensor([self._once(part) for _ in range(repeats)], dtype=torch.float64)
        return {name: float(times.quantile(q)) for name, q in QUANTILES.items()}

    def _once(self, part: Part) -> float:
        if self._flush is None:
            start = time.perf_counter()
            part()
            return 1e3 * (time.perf_counter() - start)
        self._flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        part()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def bandwidths(device: torch.device) -> dict[str, float]:
    """GB/s (10^9 bytes) of a device copy (read and write counted) and of a read (a sum), in this run."""
    n = 1 << 30 if device.type == "cuda" else 1 << 26
    source, target = torch.ones(n // 4, device=device), torch.empty(n // 4, device=device)
    timer = Timer(device)
    copy = timer(lambda: target.copy_(source), repeats=10)["p50"]
    read = timer(lambda: source.sum(), repeats=10)["p50"]
    return {"copy_gbps": 2 * n / copy / 1e6, "read_gbps": n / read / 1e6}


def launches(part: Part, device: torch.device) -> int | None:
    """Kernels and copies that one call puts on the device; None on the CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    part()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        part()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def extra_bytes(part: Part, device: torch.device) -> int | None:
    """Memory that one call allocates beyond what was there, at its peak; None on the CPU."""
    if device.type != "cuda":
        return None
    part()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    part()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
