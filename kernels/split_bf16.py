"""Split of an fp32 matrix into bf16 parts that add up to it bit for bit, stacked in the order that a product wants.

One launch where plain torch takes six: low-rank layers are so small that launching is what they cost. Elements are read
once, in any strides, and written once for each entry of the order.
"""

import torch
import triton
import triton.language as tl

from rsaft_fast.kernels.common import OPTIONS, launcher, on, unspecialised

BLOCK = 1024


@triton.jit
def _nearest_bf16(b_x):
    """Round to the nearest bf16 number, in fp32; halves go away from zero, which is as near."""
    return ((b_x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _choose(b_high, b_middle, b_low, PART: tl.constexpr):
    if PART == 0:
        return b_high
    elif PART == 1:
        return b_middle
    else:
        return b_low


@unspecialised
def rsaft_split_kernel(
    out,
    wide,
    columns,
    row_stride,
    column_stride,
    elements,
    ORDER: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split BLOCK elements, and write each part where the order asks for it."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    place = (offsets // columns).to(tl.int64) * row_stride + (offsets % columns).to(tl.int64) * column_stride
    b_x = tl.load(wide + place, mask=inside, other=0.0)
    b_high = _nearest_bf16(b_x)
    b_rest = b_x - b_high
    b_middle = _nearest_bf16(b_rest)
    b_low = b_rest - b_middle
    for i in tl.static_range(COUNT):
        b_part = _choose(b_high, b_middle, b_low, (ORDER >> (2 * i)) & 3)
        b_bf16 = (b_part.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        tl.store(out + i * elements.to(tl.int64) + offsets, b_bf16, mask=inside)


def variant(order: tuple[int, ...], block: int) -> tuple:
    """Choose kernel and constants; the order becomes one number, two bits an entry, the first in the lowest."""
    code = sum(part << (2 * i) for i, part in enumerate(order))
    return rsaft_split_kernel, dict(ORDER=code, COUNT=len(order), BLOCK=block) | OPTIONS


def bf16_parts(wide: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Split (r, n) fp32, any strides, fewer than 2^31 elements, into (len(order) * r, n) bf16."""
    rows, columns = wide.shape
    out = torch.empty(len(order) * rows, columns, dtype=torch.bfloat16, device=wide.device)
    if out.numel():
        with on(wide.device):
            launcher(variant, wide.device, order, BLOCK)(
                (triton.cdiv(wide.numel(), BLOCK), 1, 1), out, wide, columns, *wide.stride(), wide.numel()
            )
    return out
