"""Helpers of all kernels: table look-up, loads with and without a mask, rounding, launch options.

Names: `a_` addresses, `i_` indices, `b_` blocks of values, `p_` pointers, UPPER compile-time constants.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}

# Multiply-adds stay unfused, so that every backend rounds alike; memory is the limit, not arithmetic. Set here because
# Triton's default differs between versions.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def on(device: torch.device):
    """Make the tensors' device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch_span(table, tensor: int | None) -> tuple[int, int]:
    """Give first chunk and number of chunks of a launch over one tensor of the table, or over all."""
    return (0, table.chunks) if tensor is None else (table.first_chunk[tensor], table.chunks_of[tensor])


def unspecialised(function):
    """Apply `triton.jit`, with one compiled form whatever the run-time arguments' values and alignments."""
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])


class Launcher:
    """A kernel with its compile-time arguments: compiled at the first launch, launched without Triton's dispatch after.

    Triton looks at every argument of every launch to find the compiled form, which takes longer than small launches
    run. Here the form follows from the constants alone: kernels are `unspecialised`, and run-time arguments, which
    come first in their signatures, keep their types. Tensors are passed as addresses: of a tensor Triton asks the
    driver, again in every launch, whether it is on the device, which the first launch has settled.
    """

    def __init__(self, kernel, constants: dict):
        self.kernel, self.constants = kernel, constants
        self.values = [constants[name] for name in kernel.arg_names if name in constants]
        self.compiled = None

    def __call__(self, grid: tuple[int, int, int], *arguments) -> None:
        if self.compiled is None:  # always so in the interpreter, which returns nothing
            self.compiled = self.kernel[grid](*arguments, **self.constants)
        else:
            addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            self.compiled[grid](*addresses, *self.values)


@cache
def launcher(variant: Callable[..., tuple], device: torch.device, *choices) -> Launcher:
    """Make the `Launcher` of `variant(*choices)`, a kernel and its constants; one compiled form a device."""
    return Launcher(*variant(*choices))


@triton.jit
def chunk_span(i_chunk, numel, chunk_tensor, chunk_index, CHUNK: tl.constexpr):
    """Look up a chunk: its tensor, its first element, and how many elements it has."""
    i_tensor = tl.load(chunk_tensor + i_chunk)
    start = tl.load(chunk_index + i_chunk).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(numel + i_tensor) - start, CHUNK).to(tl.int32)
    return i_tensor, start, count


@triton.jit
def address_of(addresses, ROW: tl.constexpr, tensors, i_tensor):
    """Load the address of a tensor in one list of the table; 0 where the list lacks it."""
    return tl.load(addresses + ROW * tensors + i_tensor)


@triton.jit
def vector_part(joined_addresses, count, BLOCK: tl.constexpr):
    """Count the elements in whole 16-byte-aligned blocks; 0 if any list (addresses or-ed) is misaligned.

    Chunks are multiples of 16 bytes long, so the base addresses decide.
    """
    whole = (count // BLOCK) * BLOCK
    return tl.where(joined_addresses % 16 == 0, whole, 0)


@triton.jit
def pointer_to(address, start, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Turn an address into a pointer to the element `start`, with the alignment hint of vector accesses."""
    # The hint counts only after the cast to a pointer; on the integer the compiler drops it.
    return advance(address.to(tl.pointer_type(DTYPE)), start, VECTOR)


@triton.jit
def advance(pointer, start, VECTOR: tl.constexpr):
    """Move a pointer by `start` elements, with the alignment hint of vector accesses."""
    pointer += start
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


NO_POLICY = tl.constexpr("")  # Triton 3.6 wants a default wrapped


@triton.jit
def load(pointer, offsets, count, VECTOR: tl.constexpr, KEEP: tl.constexpr = NO_POLICY):
    """Load a block, masked unless VECTOR.

    `KEEP`: an eviction policy, what the cache should do with these values.
    """
    if VECTOR:
        return tl.load(pointer + offsets, eviction_policy=KEEP)
    return tl.load(pointer + offsets, mask=offsets < count, other=0, eviction_policy=KEEP)


@triton.jit
def store(pointer, offsets, count, values, VECTOR: tl.constexpr, KEEP: tl.constexpr = NO_POLICY):
    """Store a block, masked unless VECTOR; `KEEP` as in `load`."""
    if VECTOR:
        tl.store(pointer + offsets, values, eviction_policy=KEEP)
    else:
        tl.store(pointer + offsets, values, mask=offsets < count, eviction_policy=KEEP)


@triton.jit
def rounded(b_x, DTYPE: tl.constexpr):
    """Round float32 to DTYPE, to nearest even.

    bf16 goes through integers: Triton's interpreter truncates that cast, and one source must give one result.
    """
    if DTYPE == tl.bfloat16:
        return nearest_bf16(b_x.to(tl.uint32, bitcast=True)).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(DTYPE)


@triton.jit
def nearest_bf16(b_bits):
    """Round the bits of float32 numbers to those of the nearest bf16 numbers."""
    b_up = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
    return tl.where((b_bits & 0x7FFFFFFF) > 0x7F800000, (b_bits >> 16) | 0x40, b_up)


@triton.jit
def _restore_block(
    a_weight,
    a_source,
    start,
    offsets,
    count,
    WEIGHT: tl.constexpr,
    SOURCE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    b_w = load(pointer_to(a_source, start, SOURCE, VECTOR), offsets, count, VECTOR)
    if SOURCE != WEIGHT:  # a backup is copied as it is: NaN payloads survive
        b_w = rounded(b_w, WEIGHT)
    store(pointer_to(a_weight, start, WEIGHT, VECTOR), offsets, count, b_w, VECTOR)


@triton.jit
def restore_chunk(
    a_weight, a_source, start, count, first_inf, WEIGHT: tl.constexpr, SOURCE: tl.constexpr, BLOCK: tl.constexpr
):
    """Restore a chunk of a weight from its source.

    Does nothing after a perturbation that was a no-op (`first_inf`: the source holds something else), or without a
    source.
    """
    count = tl.where((first_inf == 0.0) & (a_source != 0), count, 0)
    vector = vector_part(a_weight | a_source, count, BLOCK)
    for first in range(0, vector, BLOCK):
        _restore_block(a_weight, a_source, start, first + tl.arange(0, BLOCK), count, WEIGHT, SOURCE, True)
    for first in range(vector, count, BLOCK):
        _restore_block(a_weight, a_source, start, first + tl.arange(0, BLOCK), count, WEIGHT, SOURCE, False)
