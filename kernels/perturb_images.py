"""Image perturbation: a norm a sample, then one pass that writes ``images + delta`` or ``delta`` alone.

Two launches over (sample, chunk). The second reads a sample's slots again in fixed order, so no third launch is needed
and the bits do not depend on timing. Floor: 16 bytes an element in fp32, 8 in bf16.
"""

import torch
import triton
import triton.language as tl

from rsaft_fast.ops.table import CHUNK

from .common import DTYPES, OPTIONS, load, on, rounded, store

BLOCK = 2048


@triton.jit
def sample_sums_kernel(grad, slots, elements, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    i_chunk = tl.program_id(0)
    start = i_chunk.to(tl.int64) * CHUNK
    p_grad = grad + tl.program_id(1).to(tl.int64) * elements + start
    count = tl.minimum(elements - start, CHUNK).to(tl.int32)
    whole = (count // BLOCK) * BLOCK
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, whole, BLOCK):
        b_g = load(p_grad, first + tl.arange(0, BLOCK), count, True).to(tl.float32)
        b_sum += b_g * b_g
    for first in range(whole, count, BLOCK):
        b_g = load(p_grad, first + tl.arange(0, BLOCK), count, False).to(tl.float32)
        b_sum += b_g * b_g
    tl.store(slots + tl.program_id(1) * tl.num_programs(0) + i_chunk, tl.sum(b_sum).to(tl.float64))


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
    b_g = load(p_grad, offsets, count, VECTOR).to(tl.float32)
    if SIGN:
        b_g = tl.where(b_g > 0, 1.0, tl.where(b_g < 0, -1.0, 0.0))
    # A sample without a usable gradient has scale 0; a product would turn its infinities into NaN.
    b_out = tl.where(scale == 0, 0.0, b_g * scale)
    if IMAGES:
        b_out += load(p_images, offsets, count, VECTOR).to(tl.float32)
    store(p_out, offsets, count, rounded(b_out, OUT), VECTOR)


@triton.jit
def perturb_images_kernel(
    out,
    images,
    grad,
    slots,
    radius,
    elements,
    OUT: tl.constexpr,
    IMAGES: tl.constexpr,
    SIGN: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``radius``: already negative and, for rms, times the square root of the elements."""
    i_chunk = tl.program_id(0)
    i_slot = tl.arange(0, SLOTS)
    p_slots = slots + tl.program_id(1) * tl.num_programs(0)
    sum_sq = tl.sum(tl.load(p_slots + i_slot, mask=i_slot < tl.num_programs(0), other=0.0))
    usable = (sum_sq > 0) & (sum_sq < float("inf"))
    length = 1.0 if SIGN else tl.sqrt(tl.where(usable, sum_sq, 1.0))
    scale = tl.where(usable, radius / length, 0.0).to(tl.float32)

    start = i_chunk.to(tl.int64) * CHUNK
    base = tl.program_id(1).to(tl.int64) * elements + start
    count = tl.minimum(elements - start, CHUNK).to(tl.int32)
    whole = (count // BLOCK) * BLOCK
    for first in range(0, whole, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        _move(out + base, images + base, grad + base, offsets, count, scale, OUT, IMAGES, SIGN, True)
    for first in range(whole, count, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        _move(out + base, images + base, grad + base, offsets, count, scale, OUT, IMAGES, SIGN, False)


def step_against_(out: torch.Tensor, images: torch.Tensor | None, grad: torch.Tensor, radius: float, norm: str) -> None:
    if out.numel() == 0:
        return
    if not all(_sample_after_sample(tensor, out) for tensor in (out, grad, images) if tensor is not None):
        plain = torch.empty_like(out, memory_format=torch.contiguous_format)
        step_against_(plain, None if images is None else images.contiguous(), grad.contiguous(), radius, norm)
        out.copy_(plain)
        return
    samples, elements = len(out), out[0].numel()
    chunks = triton.cdiv(elements, CHUNK)
    slots = torch.empty(samples, chunks, dtype=torch.float64, device=out.device)
    length = -radius * (elements**0.5 if norm == "rms" else 1.0)
    with on(out.device):
        sample_sums_kernel[(chunks, samples)](grad, slots, elements, CHUNK=CHUNK, BLOCK=BLOCK, **OPTIONS)
        perturb_images_kernel[(chunks, samples)](
            out,
            grad if images is None else images,
            grad,
            slots,
            length,
            elements,
            OUT=DTYPES[out.dtype],
            IMAGES=images is not None,
            SIGN=norm == "linf",
            SLOTS=triton.next_power_of_2(chunks),
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            **OPTIONS,
        )


def _sample_after_sample(tensor: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether samples lie one after the other without holes, their elements in the order of ``out``'s."""
    if tensor.stride() != out.stride():
        return False
    expected = 1
    inner = sorted((stride, size) for size, stride in zip(tensor.shape[1:], tensor.stride()[1:]) if size > 1)
    for stride, size in inner:
        if stride != expected:
            return False
        expected *= size
    return len(tensor) == 1 or tensor.stride(0) == expected
