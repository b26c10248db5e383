"""Global gradient norm: one float32 sum a chunk in its own slot, then one program adds the slots in float64.

The order of every addition follows from the chunk list alone, so the bits do not depend on the GPU's size or on timing.
Floor: 4 bytes a parameter in fp32, 2 in bf16.
"""

import torch
import triton
import triton.language as tl

from rsaft_fast.abi.table import CHUNK, ROW, TensorTable
from rsaft_fast.kernels.coefficients import (
    adamw_coefficients,
    constants,
    kinds,
    note_skip,
    skip_flag,
    step_arguments,
    table_arguments,
    unscaling,
    write_coefficients,
)
from rsaft_fast.kernels.common import (
    DTYPES,
    OPTIONS,
    address_of,
    chunk_span,
    launcher,
    load,
    on,
    pointer_to,
    unspecialised,
    vector_part,
)

BLOCK = 4096
SLOT_BLOCK = 4096


@triton.jit
def _squares(grad, weight, offsets, count, ADAPTIVE: tl.constexpr, VECTOR: tl.constexpr):
    b_g = load(grad, offsets, count, VECTOR).to(tl.float32)
    if ADAPTIVE:
        b_g = b_g * load(weight, offsets, count, VECTOR).to(tl.float32)
    return b_g * b_g


@unspecialised
def rsaft_sum_of_squares_kernel(
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
    """Sum the squares of each chunk's gradient into the chunk's slot."""
    i_chunk = tl.program_id(0)
    i_tensor, start, count = chunk_span(i_chunk, numel, chunk_tensor, chunk_index, CHUNK)
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
    tl.store(slots + i_chunk, tl.sum(b_sum).to(tl.float64))


@triton.jit
def _finish(slots, count, values, rho, found_inf, groups, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Add the slots to `values` (sum of squares, norm, scales: GradientNorm's layout); return norm and flag."""
    b_sum = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, count, BLOCK):
        i_slot = first + tl.arange(0, BLOCK)
        b_sum += tl.load(slots + i_slot, mask=i_slot < count, other=0.0)
    sum_sq = tl.sum(b_sum)
    if not FIRST:
        sum_sq += tl.load(values)
    tl.store(values, sum_sq)
    norm = tl.sqrt(sum_sq)
    finite = norm < float("inf")  # false for NaN too
    flag = tl.where(finite, 0.0, 1.0)
    if LAST:
        tl.store(values + 1, norm)
        tl.store(found_inf, flag)
        for group in range(0, groups):
            scale = tl.load(rho + group) / (norm + 1e-12)
            tl.store(values + 2 + group, tl.where(finite & (norm > 0), scale, 0.0))
    return norm, flag


@unspecialised
def rsaft_finish_norm_kernel(
    slots, values, rho, found_inf, count, groups, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the slots up to norm, scales and found_inf, in one program."""
    _finish(slots, count, values, rho, found_inf, groups, FIRST, LAST, BLOCK)


@unspecialised
def rsaft_finish_step_kernel(
    slots,
    values,
    rho,
    found_inf,
    count,
    groups,
    first_inf,
    scaler_inf,
    grad_scale,
    skip_out,
    skipped,
    hyper,
    addresses,
    group,
    steps,
    coefficients,
    tensors,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_GRAD: tl.constexpr,
    N_HYPER: tl.constexpr,
    N_COEFFICIENTS: tl.constexpr,
    RELEASED: tl.constexpr,
    TENSORS_BLOCK: tl.constexpr,
):
    """Run `rsaft_finish_norm_kernel`, then `rsaft_adamw_coefficients_kernel` for a table, in one program."""
    norm, skip = _finish(slots, count, values, rho, found_inf, groups, FIRST, True, BLOCK)
    skip = skip_flag(skip, first_inf, scaler_inf)
    note_skip(skip, skip_out, skipped)
    factor = unscaling(grad_scale)
    for first in range(0, tensors, TENSORS_BLOCK):
        write_coefficients(
            addresses, group, steps, coefficients, hyper, tensors, first, norm, skip, factor,
            ROW_GRAD, N_HYPER, N_COEFFICIENTS, RELEASED, TENSORS_BLOCK,
        )  # fmt: skip


def variant(weight: torch.dtype, grad: torch.dtype, adaptive: bool, block: int) -> tuple:
    """Choose kernel and constants of `sum_of_squares` for `launcher`."""
    rows = dict(ROW_WEIGHT=ROW["weight"], ROW_GRAD=ROW["grad"])
    dtypes = dict(WEIGHT=DTYPES[weight], GRAD=DTYPES[grad])
    return rsaft_sum_of_squares_kernel, rows | dtypes | dict(ADAPTIVE=adaptive, CHUNK=CHUNK, BLOCK=block) | OPTIONS


def sum_of_squares(table: TensorTable, adaptive: bool) -> None:
    """Fill `table.sum_sq`: each chunk's sum of squares in its own slot."""
    if not table.chunks:
        return
    launch = launcher(variant, table.device, table.dtypes["weight"], table.dtypes["grad"], adaptive, BLOCK)
    with on(table.device):
        launch(
            (table.chunks, 1, 1),
            table.addresses,
            table.numel,
            table.chunk_tensor,
            table.chunk_index,
            table.sum_sq,
            len(table),
        )


def norm_variant(first: bool, last: bool) -> tuple:
    """Choose kernel and constants of a launch that finishes the norm alone."""
    return rsaft_finish_norm_kernel, dict(FIRST=first, LAST=last, BLOCK=SLOT_BLOCK) | OPTIONS


def step_variant(first_inf, scaler_inf, grad_scale, released: bool, first: bool) -> tuple:
    """Choose kernel and constants of the launch that finishes the norm and writes AdamW's coefficients."""
    return rsaft_finish_step_kernel, constants(released) | dict(FIRST=first, BLOCK=SLOT_BLOCK)


def finish_norm(slots: list[torch.Tensor], norm, rho: torch.Tensor, tables=None, inputs=None) -> None:
    """Add all slots up in float64 to norm, scale and found_inf.

    With `tables` and `inputs`: the last launch writes the last table's coefficients too.
    """
    device = norm.values.device
    with on(device):
        for index, table_slots in enumerate(slots):
            first, last = index == 0, index == len(slots) - 1
            arguments = table_slots, norm.values, rho, norm.found_inf, table_slots.numel(), rho.numel()
            if last and inputs is not None:
                arguments += step_arguments(inputs) + table_arguments(tables[-1])
                launcher(step_variant, device, *kinds(inputs), first)((1, 1, 1), *arguments)
            else:
                launcher(norm_variant, device, first, last)((1, 1, 1), *arguments)
    if inputs is not None:
        adamw_coefficients(tables[:-1], norm, inputs, count=False)
