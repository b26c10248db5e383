"""What the card itself reaches in this run: the best of several ways to copy, and of several ways to only read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rsaft_fast.benchmarks.timing import Timer

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_CPU_BYTES = 1 << 26
_CUDA_BYTES = 4 << 30
"""Read by a copy, and written by it. What a copy writes last is still in the L2 when it ends (25 to 40 MB on an H100):
of 1 GiB that would make the card 1.2 to 2 % faster than it is, of 4 GiB at most half a percent."""


def bandwidths(timer: Timer) -> dict[str, object]:
    """GB/s (10^9 bytes) of copying (bytes read and written) and of reading: the best way of each, its name, and all."""
    n = bytes_copied(timer.device)
    source = torch.rand(n // 4, device=timer.device)
    target, rows = torch.empty_like(source), source.view(-1, 1 << 14)
    copies = {
        "torch copy_ (memcpy)": lambda: target.copy_(source),
        "torch neg (a kernel)": lambda: torch.neg(source, out=target),
    }
    # Reductions to one number may be limited by their tree, so several shapes of them, and a kernel of our own.
    reads = {
        "torch sum": lambda: source.sum(),
        "torch sum of rows": lambda: rows.sum(1),
        "torch amax of rows": lambda: rows.amax(1),
        "torch vector_norm": lambda: torch.linalg.vector_norm(source),
    }
    if source.is_cuda and triton is not None:
        reads["a Triton kernel"] = _reader(source)
    found: dict[str, object] = {}
    for kind, moved, ways in (("copy", 2 * n, copies), ("read", n, reads)):
        rates = {way: moved / timer.median(run) / 1e6 for way, run in ways.items()}
        best = max(rates, key=rates.__getitem__)
        found |= {f"{kind}_gbps": rates[best], f"{kind}_way": best, f"{kind}_ways": rates}
    return found


def bytes_copied(device: torch.device) -> int:
    """Bytes that a copy reads and writes: on a GPU 4 GiB, on one that has little free a quarter of that."""
    if device.type != "cuda":
        return _CPU_BYTES
    quarter = torch.cuda.mem_get_info(device)[0] // 4
    return min(_CUDA_BYTES, quarter - quarter % _CPU_BYTES)


if triton is not None:

    @triton.jit
    def _read(p_source, p_sums, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
        """Each program sums BLOCKS blocks, whose independent loads keep enough bytes in flight, to one number."""
        i_program = tl.program_id(0).to(tl.int64)
        b_sum = tl.zeros([BLOCK], tl.float32)
        for i_block in tl.static_range(BLOCKS):
            o = (i_program * BLOCKS + i_block) * BLOCK + tl.arange(0, BLOCK)
            b_sum += tl.load(p_source + o)
        tl.store(p_sums + i_program, tl.sum(b_sum))


def _reader(source: torch.Tensor) -> Callable[[], None]:
    """A call that reads `source` once: fp32, its number of elements a multiple of 2^15, as `bytes_copied` gives it."""
    sums = torch.empty(source.numel() >> 15, device=source.device)
    return lambda: _read[(len(sums),)](source, sums, 4096, 8, num_warps=8)
