"""Where a call's time on the device goes: matrix products, attention, everything else, and waiting for the host."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch

KINDS = {
    "attention": re.compile(r"flash|fmha|attention|sdpa", re.I),
    "products": re.compile(r"gemm|gemv|cutlass|nvjet|xmma|cublas|conv|wgrad|dgrad|winograd|implicit", re.I),
}
"""Kernels by their names; the first kind that matches. The rest are norms, elementwise work and copies."""
REST, IDLE = "elementwise, norms, copies", "idle"


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), REST)


def kernel_shares(run: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """Fractions of the wall time by kind of kernel; idle is what no kernel covers. None without a GPU or CUPTI.

    The profiler slows the host down, so the wall time is that of calls without it.
    """
    run()
    if device.type != "cuda":
        return None
    wall_us = min(_wall_us(run) for _ in range(3))
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
    except (RuntimeError, AssertionError):
        return None
    spent = dict.fromkeys((*KINDS, REST), 0.0)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            spent[kind_of(event.name)] += event.device_time_total
    if not any(spent.values()):
        return None
    return {kind: us / wall_us for kind, us in spent.items()} | {IDLE: max(0.0, 1 - sum(spent.values()) / wall_us)}


def limit_of(shares: dict[str, float] | None) -> str:
    """What to change first to make it faster, in a phrase."""
    if shares is None:
        return "not known"
    if shares[IDLE] > 0.15:
        return f"the host: the device waits {shares[IDLE]:.0%} of the time for launches"
    name, share = max(((name, value) for name, value in shares.items() if name != IDLE), key=lambda pair: pair[1])
    others = ", ".join(f"{other} {value:.0%}" for other, value in shares.items() if other not in (name, IDLE))
    return f"{name} {share:.0%} ({others})"


def _wall_us(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start)
