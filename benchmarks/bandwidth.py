"""What the card itself reaches in this run: the best of several ways to copy, and of several ways to only read."""

from __future__ import annotations

import torch

from rsaft_fast.benchmarks.timing import Part, Timer

_CPU_BYTES = 1 << 26

_CUDA_BYTES = 4 << 30
"""Read by a copy, and written by it. What a copy writes last is still in the L2 when it ends (25 to 40 MB on an H100):
of 1 GiB that would make the card 1.2 to 2 % faster than it is, of 4 GiB at most half a percent."""


def bandwidths(timer: Timer) -> dict[str, object]:
    """GB/s (10^9 bytes), and the way that was best.

    Returns:
        copy_gbps: bytes read and bytes written over time. read_gbps: bytes read over time. copy_way, read_way: by what.
        copy_ways, read_ways: GB/s of each.
    """
    n = bytes_copied(timer.device)
    source = torch.rand(n // 4, device=timer.device)
    target = torch.empty_like(source)
    found: dict[str, object] = {}
    for kind, moved, ways in (("copy", 2 * n, _copies(source, target)), ("read", n, _reads(source))):
        times = timer.alternate({way: Part(run) for way, run in ways.items()}, repeats=10)
        rates = {way: moved / t.row()["ms_p50"] / 1e6 for way, t in times.items()}
        best = max(rates, key=rates.__getitem__)
        found |= {f"{kind}_gbps": rates[best], f"{kind}_way": best, f"{kind}_ways": rates}
    return found


def bytes_copied(device: torch.device) -> int:
    """Bytes that a copy reads and writes: on a GPU 4 GiB, on one that has little free a quarter of that."""
    if device.type != "cuda":
        return _CPU_BYTES
    quarter = torch.cuda.mem_get_info(device)[0] // 4
    return min(_CUDA_BYTES, quarter - quarter % _CPU_BYTES)


def _copies(source: torch.Tensor, target: torch.Tensor) -> dict[str, object]:
    return {
        "torch copy_ (memcpy)": lambda: target.copy_(source),
        "torch neg (a kernel)": lambda: torch.neg(source, out=target),
    }


def _reads(source: torch.Tensor) -> dict[str, object]:
    """Reductions to one number may be limited by their tree, so several shapes of them, and a kernel of our own."""
    rows = source.view(-1, 1 << 14)
    ways = {
        "torch sum": lambda: source.sum(),
        "torch sum of rows": lambda: rows.sum(1),
        "torch amax of rows": lambda: rows.amax(1),
        "torch vector_norm": lambda: torch.linalg.vector_norm(source),
    }
    if source.is_cuda and (read := _triton_read(source)) is not None:
        ways["a Triton kernel"] = read
    return ways


def _triton_read(source: torch.Tensor):
    try:
        from rsaft_fast.benchmarks.read_kernel import reader
    except ImportError:  # no triton
        return None
    return reader(source)
