"""Image perturbation: a norm a sample, then one pass that writes `images + delta` or `delta` alone.

Two launches over (sample, chunk) for each group of samples whose gradients fit into the L2 cache, where the second
finds them. It adds a sample's slots again, in fixed order, so no third launch is needed and the bits depend neither on
timing nor on the grouping. Floor: 16 bytes an element in fp32 and 8 in bf16 with every gradient read twice, 12 and 6
with the second read from the cache.
"""

import torch
import triton
import triton.language as tl

from rsaft_fast.abi.table import CHUNK
from rsaft_fast.kernels.common import DTYPES, OPTIONS, advance, launcher, load, on, rounded, store, unspecialised

BLOCK = 2048
GROUP_BYTES = 24 * 2**20
"""Gradients between norm and move: half the L2 cache of an H100 (50 MB), since images and results pass through it."""

GRID_LIMIT = 65535  # of a grid's second dimension


@unspecialised
def rsaft_sample_sums_kernel(
    grad, slots, elements: tl.int64, first_sample, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the squares of each (sample, chunk) of the gradient into its slot."""
    i_sample, i_chunk = first_sample + tl.program_id(1), tl.program_id(0)
    start = i_chunk.to(tl.int64) * CHUNK
    p_grad = advance(grad, i_sample.to(tl.int64) * elements + start, ALIGNED)
    count = tl.minimum(elements - start, CHUNK).to(tl.int32)
    whole = (count // BLOCK) * BLOCK
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, whole, BLOCK):
        b_g = load(p_grad, first + tl.arange(0, BLOCK), count, True).to(tl.float32)
        b_sum += b_g * b_g
    for first in range(whole, count, BLOCK):
        b_g = load(p_grad, first + tl.arange(0, BLOCK), count, False).to(tl.float32)
        b_sum += b_g * b_g
    tl.store(slots + i_sample * tl.num_programs(0) + i_chunk, tl.sum(b_sum).to(tl.float64))


@triton.jit
def _move(
    p_out,
    p_images,
    p_grad,
    offsets,
    count,
    scale,
    OUT: tl.constexpr,
    IMAGES: tl.constexpr,
    SIGN: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The last read of everything here: what leaves the cache first should be this, not the gradients still needed.
    b_g = load(p_grad, offsets, count, VECTOR, "evict_first").to(tl.float32)
    if SIGN:
        b_g = tl.where(b_g > 0, 1.0, tl.where(b_g < 0, -1.0, 0.0))
    # A sample without a usable gradient has scale 0; a product would turn its infinities into NaN.
    b_out = tl.where(scale == 0, 0.0, b_g * scale)
    if IMAGES:
        b_out += load(p_images, offsets, count, VECTOR, "evict_first").to(tl.float32)
    store(p_out, offsets, count, rounded(b_out, OUT), VECTOR, "evict_first")


@unspecialised
def rsaft_perturb_images_kernel(
    out,
    images,
    grad,
    slots,
    radius: tl.float32,
    elements: tl.int64,
    first_sample,
    OUT: tl.constexpr,
    IMAGES: tl.constexpr,
    SIGN: tl.constexpr,
    SLOTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write `images + delta`, or `delta` alone, for one (sample, chunk).

    `radius`: already negative and, for rms, times the square root of the elements.
    """
    # Backwards: of a sample too large for the L2 cache, its end is what is left there after the norm.
    i_sample, i_chunk = first_sample + tl.program_id(1), tl.num_programs(0) - 1 - tl.program_id(0)
    i_slot = tl.arange(0, SLOTS)
    p_slots = slots + i_sample * tl.num_programs(0)
    sum_sq = tl.sum(tl.load(p_slots + i_slot, mask=i_slot < tl.num_programs(0), other=0.0))
    usable = (sum_sq > 0) & (sum_sq < float("inf"))
    length = 1.0 if SIGN else tl.sqrt(tl.where(usable, sum_sq, 1.0))
    scale = tl.where(usable, radius / length, 0.0).to(tl.float32)

    start = i_chunk.to(tl.int64) * CHUNK
    base = i_sample.to(tl.int64) * elements + start
    p_out, p_images, p_grad = advance(out, base, ALIGNED), advance(images, base, ALIGNED), advance(grad, base, ALIGNED)
    count = tl.minimum(elements - start, CHUNK).to(tl.int32)
    whole = (count // BLOCK) * BLOCK
    for first in range(0, whole, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        _move(p_out, p_images, p_grad, offsets, count, scale, OUT, IMAGES, SIGN, True)
    for first in range(whole, count, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        _move(p_out, p_images, p_grad, offsets, count, scale, OUT, IMAGES, SIGN, False)


def sums_variant(grad: torch.dtype, aligned: bool, block: int) -> tuple:
    """Choose kernel and constants of the first launch for `launcher`."""
    return rsaft_sample_sums_kernel, dict(ALIGNED=aligned, CHUNK=CHUNK, BLOCK=block) | OPTIONS


def variant(
    out: torch.dtype, grad: torch.dtype, images: torch.dtype | None, aligned: bool, sign: bool, slots: int, block: int
) -> tuple:
    """Choose kernel and constants of the second launch.

    `slots`: a power of two that is not below the chunks of a sample.
    """
    kinds = dict(OUT=DTYPES[out], IMAGES=images is not None, SIGN=sign, SLOTS=slots, ALIGNED=aligned)
    return rsaft_perturb_images_kernel, kinds | dict(CHUNK=CHUNK, BLOCK=block) | OPTIONS


def step_against_(out: torch.Tensor, images: torch.Tensor | None, grad: torch.Tensor, radius: float, norm: str) -> None:
    """Write `out = images + delta`, or `out = delta` without images; see `rsaft_fast.ops.image_delta`."""
    if out.numel() == 0:
        return
    if not all(_sample_after_sample(tensor, out) for tensor in (out, grad, images) if tensor is not None):
        plain = torch.empty_like(out, memory_format=torch.contiguous_format)
        step_against_(plain, None if images is None else images.contiguous(), grad.contiguous(), radius, norm)
        out.copy_(plain)
        return
    samples, elements = len(out), out.numel() // len(out)
    chunks = triton.cdiv(elements, CHUNK)
    slots = torch.empty(samples, chunks, dtype=torch.float64, device=out.device)
    length = -radius * (elements**0.5 if norm == "rms" else 1.0)
    images_dtype, images = None if images is None else images.dtype, grad if images is None else images
    aligned = elements % 16 == 0 and (out.data_ptr() | images.data_ptr() | grad.data_ptr()) % 16 == 0
    sums = launcher(sums_variant, out.device, grad.dtype, aligned, BLOCK)
    kinds = out.dtype, grad.dtype, images_dtype, aligned, norm == "linf"
    move = launcher(variant, out.device, *kinds, triton.next_power_of_2(chunks), BLOCK)
    group = min(max(1, GROUP_BYTES // (elements * grad.element_size())), GRID_LIMIT)
    with on(out.device):
        for first in range(0, samples, group):
            grid = chunks, min(group, samples - first), 1
            sums(grid, grad, slots, elements, first)
            move(grid, out, images, grad, slots, length, elements, first)


def _sample_after_sample(tensor: torch.Tensor, out: torch.Tensor) -> bool:
    """Tell whether samples lie one after the other without holes, their elements in the order of `out`'s."""
    if tensor.is_contiguous() and out.is_contiguous():
        return True
    if tensor.stride() != out.stride():
        return False
    expected = 1
    inner = sorted((stride, size) for size, stride in zip(tensor.shape[1:], tensor.stride()[1:]) if size > 1)
    for stride, size in inner:
        if stride != expected:
            return False
        expected *= size
    return len(tensor) == 1 or tensor.stride(0) == expected
