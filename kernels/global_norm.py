"""Global gradient norm: one float32 sum a chunk in its own slot, then one program adds the slots in float64.

The order of every addition follows from the chunk list alone, so the bits do not depend on the GPU's size or on timing.
Floor: 4 bytes a parameter in fp32, 2 in bf16.
"""

import torch
import triton
import triton.language as tl

from rsaft_fast.ops.table import CHUNK, ROW, TensorTable

from .common import DTYPES, OPTIONS, address_of, chunk_span, load, on, pointer_to, vector_part

BLOCK = 4096
SLOT_BLOCK = 4096


@triton.jit
def _squares(grad, weight, offsets, count, ADAPTIVE: tl.constexpr, VECTOR: tl.constexpr):
    b_g = load(grad, offsets, count, VECTOR).to(tl.float32)
    if ADAPTIVE:
        b_g = b_g * load(weight, offsets, count, VECTOR).to(tl.float32)
    return b_g * b_g


@triton.jit(do_not_specialize=["tensors"])
def sum_of_squares_kernel(
    addresses,
    numel,
    chunk_tensor,
    chunk_index,
    slots,
    tensors,
    ROW_WEIGHT: tl.constexpr,
    ROW_GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_tensor, start, count = chunk_span(numel, chunk_tensor, chunk_index, CHUNK)
    a_grad = address_of(addresses, ROW_GRAD, tensors, i_tensor)
    a_weight = address_of(addresses, ROW_WEIGHT, tensors, i_tensor)
    count = tl.where(a_grad == 0, 0, count)
    vector = vector_part((a_grad | a_weight) if ADAPTIVE else a_grad, count, BLOCK)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, vector, BLOCK):
        grad = pointer_to(a_grad, start, GRAD, True)
        weight = pointer_to(a_weight, start, WEIGHT, True)
        b_sum += _squares(grad, weight, first + tl.arange(0, BLOCK), count, ADAPTIVE, True)
    for first in range(vector, count, BLOCK):
        grad = pointer_to(a_grad, start, GRAD, False)
        weight = pointer_to(a_weight, start, WEIGHT, False)
        b_sum += _squares(grad, weight, first + tl.arange(0, BLOCK), count, ADAPTIVE, False)
    tl.store(slots + tl.program_id(0), tl.sum(b_sum).to(tl.float64))


@triton.jit(do_not_specialize=["count", "groups"])
def finish_norm_kernel(
    slots, count, values, rho, found_inf, groups, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """``values``: sum of squares, norm, scales; as GradientNorm lays them out."""
    b_sum = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, count, BLOCK):
        i_slot = first + tl.arange(0, BLOCK)
        b_sum += tl.load(slots + i_slot, mask=i_slot < count, other=0.0)
    sum_sq = tl.sum(b_sum)
    if not FIRST:
        sum_sq += tl.load(values)
    tl.store(values, sum_sq)
    if LAST:
        norm = tl.sqrt(sum_sq)
        finite = norm < float("inf")  # false for NaN too
        tl.store(values + 1, norm)
        tl.store(found_inf, tl.where(finite, 0.0, 1.0))
        for group in range(0, groups):
            scale = tl.load(rho + group) / (norm + 1e-12)
            tl.store(values + 2 + group, tl.where(finite & (norm > 0), scale, 0.0))


def sum_of_squares(table: TensorTable, adaptive: bool) -> None:
    if not table.chunks:
        return
    with on(table.device):
        sum_of_squares_kernel[(table.chunks,)](
            table.addresses,
            table.numel,
            table.chunk_tensor,
            table.chunk_index,
            table.sum_sq,
            len(table),
            ROW_WEIGHT=ROW["weight"],
            ROW_GRAD=ROW["grad"],
            WEIGHT=DTYPES[table.dtypes["weight"]],
            GRAD=DTYPES[table.dtypes["grad"]],
            ADAPTIVE=adaptive,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            **OPTIONS,
        )


def finish_norm(slots: list[torch.Tensor], norm, rho: torch.Tensor) -> None:
    last = len(slots) - 1
    with on(norm.values.device):
        for index, table_slots in enumerate(slots):
            finish_norm_kernel[(1,)](
                table_slots,
                table_slots.numel(),
                norm.values,
                rho,
                norm.found_inf,
                rho.numel(),
                FIRST=index == 0,
                LAST=index == last,
                BLOCK=SLOT_BLOCK,
                **OPTIONS,
            )
