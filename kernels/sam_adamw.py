"""Restore, unscale, clip and AdamW in one pass: the weight is read from where restoring would read it.

A first, tiny kernel turns hyper-parameters, step counts and the two passes' norms into eight numbers a tensor; the
second streams. Floor: 28 bytes a parameter, for fp32 with backup and for bf16 weights with a float32 master alike.
"""

import torch
import triton
import triton.language as tl

from rsaft_fast.ops.scalars import COEFFICIENTS, HYPER
from rsaft_fast.ops.table import CHUNK, ROW, TensorTable

from .common import (
    DTYPES,
    OPTIONS,
    address_of,
    chunk_span,
    load,
    on,
    pointer_to,
    restore_block,
    rounded,
    store,
    vector_part,
)

BLOCK = 2048
TENSORS_BLOCK = 256
N_HYPER, N_COEFFICIENTS = len(HYPER), len(COEFFICIENTS)


@triton.jit(do_not_specialize=["tensors"])
def adamw_coefficients_kernel(
    addresses,
    group,
    steps,
    coefficients,
    hyper,
    norm,
    second_inf,
    first_inf,
    scaler_inf,
    grad_scale,
    skip_out,
    skipped,
    tensors,
    ROW_GRAD: tl.constexpr,
    N_HYPER: tl.constexpr,
    N_COEFFICIENTS: tl.constexpr,
    SCALED: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    skip = tl.maximum(tl.maximum(tl.load(second_inf), tl.load(first_inf)), tl.load(scaler_inf))
    if tl.program_id(0) == 0:
        tl.store(skip_out, skip)
        if COUNT:
            tl.store(skipped, tl.load(skipped) + tl.where(skip != 0, 1, 0))
    factor = tl.full([], 1.0, tl.float64)
    if SCALED:
        factor = 1.0 / tl.load(grad_scale).to(tl.float64)

    i_tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_tensor = i_tensor < tensors
    present = tl.load(addresses + ROW_GRAD * tensors + i_tensor, mask=m_tensor, other=0) != 0
    advance = tl.where(skip == 0, 1.0, 0.0)
    b_step = tl.load(steps + i_tensor, mask=m_tensor, other=0.0) + tl.where(present, advance, 0.0)
    tl.store(steps + i_tensor, b_step, mask=m_tensor)
    b_step = b_step.to(tl.float64)

    p_hyper = hyper + N_HYPER * tl.load(group + i_tensor, mask=m_tensor, other=0)
    b_lr = tl.load(p_hyper)
    b_beta1 = tl.load(p_hyper + 1)
    b_beta2 = tl.load(p_hyper + 2)
    b_clip = tl.minimum(tl.load(p_hyper + 5) / (tl.load(norm) * factor + 1e-6), 1.0)
    b_bias1 = 1.0 - tl.exp(b_step * tl.log(b_beta1))
    b_bias2 = 1.0 - tl.exp(b_step * tl.log(b_beta2))
    p_out = coefficients + N_COEFFICIENTS * i_tensor
    tl.store(p_out, b_clip * factor, mask=m_tensor)
    tl.store(p_out + 1, 1.0 - b_lr * tl.load(p_hyper + 4), mask=m_tensor)
    tl.store(p_out + 2, 1.0 - b_beta1, mask=m_tensor)
    tl.store(p_out + 3, b_beta2, mask=m_tensor)
    tl.store(p_out + 4, 1.0 - b_beta2, mask=m_tensor)
    tl.store(p_out + 5, tl.sqrt(b_bias2), mask=m_tensor)
    tl.store(p_out + 6, tl.load(p_hyper + 3), mask=m_tensor)
    tl.store(p_out + 7, b_lr / b_bias1, mask=m_tensor)


@triton.jit
def _update(
    a_weight,
    a_grad,
    a_source,
    a_exp_avg,
    a_exp_avg_sq,
    start,
    offsets,
    count,
    p_row,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    SOURCE: tl.constexpr,
    MASTER: tl.constexpr,
    VECTOR: tl.constexpr,
):
    source = pointer_to(a_source, start, SOURCE, VECTOR)
    exp_avg = pointer_to(a_exp_avg, start, tl.float32, VECTOR)
    exp_avg_sq = pointer_to(a_exp_avg_sq, start, tl.float32, VECTOR)
    b_g = load(pointer_to(a_grad, start, GRAD, VECTOR), offsets, count, VECTOR).to(tl.float32)
    b_g = b_g * tl.load(p_row).to(tl.float32)
    b_m = load(exp_avg, offsets, count, VECTOR)
    b_m = b_m + (b_g - b_m) * tl.load(p_row + 2).to(tl.float32)
    store(exp_avg, offsets, count, b_m, VECTOR)
    b_v = load(exp_avg_sq, offsets, count, VECTOR) * tl.load(p_row + 3).to(tl.float32)
    b_v = b_v + (b_g * b_g) * tl.load(p_row + 4).to(tl.float32)
    store(exp_avg_sq, offsets, count, b_v, VECTOR)
    b_denominator = tl.div_rn(tl.sqrt_rn(b_v), tl.load(p_row + 5).to(tl.float32)) + tl.load(p_row + 6).to(tl.float32)
    b_w = load(source, offsets, count, VECTOR).to(tl.float32) * tl.load(p_row + 1).to(tl.float32)
    b_w = b_w - tl.load(p_row + 7).to(tl.float32) * tl.div_rn(b_m, b_denominator)
    if MASTER:
        store(source, offsets, count, b_w, VECTOR)
    store(pointer_to(a_weight, start, WEIGHT, VECTOR), offsets, count, rounded(b_w, WEIGHT), VECTOR)


@triton.jit(do_not_specialize=["tensors"])
def sam_adamw_kernel(
    addresses,
    numel,
    chunk_tensor,
    chunk_index,
    coefficients,
    skip,
    first_inf,
    tensors,
    ROW_WEIGHT: tl.constexpr,
    ROW_GRAD: tl.constexpr,
    ROW_SOURCE: tl.constexpr,
    ROW_EXP_AVG: tl.constexpr,
    ROW_EXP_AVG_SQ: tl.constexpr,
    N_COEFFICIENTS: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    SOURCE: tl.constexpr,
    MASTER: tl.constexpr,
    RESTORE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``ROW_SOURCE``: the master, the backup, or (nothing to restore) the weight itself."""
    i_tensor, start, count = chunk_span(numel, chunk_tensor, chunk_index, CHUNK)
    a_weight = address_of(addresses, ROW_WEIGHT, tensors, i_tensor)
    a_grad = address_of(addresses, ROW_GRAD, tensors, i_tensor)
    a_source = address_of(addresses, ROW_SOURCE, tensors, i_tensor)
    a_exp_avg = address_of(addresses, ROW_EXP_AVG, tensors, i_tensor)
    a_exp_avg_sq = address_of(addresses, ROW_EXP_AVG_SQ, tensors, i_tensor)
    p_row = coefficients + N_COEFFICIENTS * i_tensor
    updates = (tl.load(skip) == 0.0) & (a_grad != 0)
    if updates:
        vector = vector_part(a_weight | a_grad | a_source | a_exp_avg | a_exp_avg_sq, count, BLOCK)
        for first in range(0, vector, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            _update(
                a_weight, a_grad, a_source, a_exp_avg, a_exp_avg_sq, start, offsets, count, p_row,
                WEIGHT, GRAD, SOURCE, MASTER, True,
            )  # fmt: skip
        for first in range(vector, count, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            _update(
                a_weight, a_grad, a_source, a_exp_avg, a_exp_avg_sq, start, offsets, count, p_row,
                WEIGHT, GRAD, SOURCE, MASTER, False,
            )  # fmt: skip
    elif RESTORE:
        # After a perturbation that was a no-op the weights are intact and the backup is not.
        count = tl.where(tl.load(first_inf) == 0.0, count, 0)
        vector = vector_part(a_weight | a_source, count, BLOCK)
        for first in range(0, vector, BLOCK):
            restore_block(a_weight, a_source, start, first + tl.arange(0, BLOCK), count, WEIGHT, SOURCE, True)
        for first in range(vector, count, BLOCK):
            restore_block(a_weight, a_source, start, first + tl.arange(0, BLOCK), count, WEIGHT, SOURCE, False)


def adamw_coefficients(
    table: TensorTable,
    norm,
    scalars,
    first,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    count: bool,
) -> None:
    with on(table.device):
        adamw_coefficients_kernel[(triton.cdiv(len(table), TENSORS_BLOCK),)](
            table.addresses,
            table.group,
            table.steps,
            table.coefficients,
            scalars.hyper,
            norm.norm,
            norm.found_inf,
            norm.found_inf if first is None else first.found_inf,
            norm.found_inf if found_inf is None else found_inf,
            norm.norm if grad_scale is None else grad_scale,
            scalars.skip,
            scalars.skipped,
            len(table),
            ROW_GRAD=ROW["grad"],
            N_HYPER=N_HYPER,
            N_COEFFICIENTS=N_COEFFICIENTS,
            SCALED=grad_scale is not None,
            COUNT=count,
            BLOCK=TENSORS_BLOCK,
            **OPTIONS,
        )


def sam_adamw_step_(table: TensorTable, scalars, first, restore: bool) -> None:
    if not table.chunks:
        return
    has_master = "master" in table
    source = "master" if has_master else "backup" if restore else "weight"
    with on(table.device):
        sam_adamw_kernel[(table.chunks,)](
            table.addresses,
            table.numel,
            table.chunk_tensor,
            table.chunk_index,
            table.coefficients,
            scalars.skip,
            scalars.skip if first is None else first.found_inf,
            len(table),
            ROW_WEIGHT=ROW["weight"],
            ROW_GRAD=ROW["grad"],
            ROW_SOURCE=ROW[source],
            ROW_EXP_AVG=ROW["exp_avg"],
            ROW_EXP_AVG_SQ=ROW["exp_avg_sq"],
            N_COEFFICIENTS=N_COEFFICIENTS,
            WEIGHT=DTYPES[table.dtypes["weight"]],
            GRAD=DTYPES[table.dtypes["grad"]],
            SOURCE=DTYPES[table.dtypes[source]],
            MASTER=has_master,
            RESTORE=restore,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            **OPTIONS,
        )
