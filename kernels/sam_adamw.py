"""Fused restore, unscaling, clipping and AdamW in one pass: the weight is read from where restoring would read it.

Moments are float32, or 8-bit codes with an absmax for each 256 elements (`quantize`). Floor: 28 bytes a parameter,
for fp32 with backup and for bf16 weights with a float32 master alike; with 8-bit moments 10 for bf16 without a master.
"""

import torch
import triton
import triton.language as tl

from rsaft_fast.abi.scalars import COEFFICIENTS
from rsaft_fast.abi.table import CHUNK, ROW, TensorTable
from rsaft_fast.kernels.common import (
    DTYPES,
    OPTIONS,
    address_of,
    chunk_span,
    launch_span,
    launcher,
    load,
    on,
    pointer_to,
    restore_chunk,
    store,
    unspecialised,
    vector_part,
)
from rsaft_fast.kernels.quantize import load_moments, rows_of, store_moments
from rsaft_fast.kernels.rounding import UPDATE, rounded_as_asked, rounding_seed

# Eight elements a thread: 16 bytes of a bf16 list at once, 8 of codes; and each warp's 256 are one block of 8-bit
# state, whose absmax it finds without the other warps.
BLOCK = 2048
N_COEFFICIENTS = len(COEFFICIENTS)


@triton.jit
def _update(
    a_weight,
    a_grad,
    a_source,
    a_exp_avg,
    a_exp_avg_sq,
    a_avg_absmax,
    a_sq_absmax,
    start,
    first,
    count,
    c,
    seed,
    parameter,
    step,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    SOURCE: tl.constexpr,
    STATE: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block; `c`: the coefficients, in the order of their columns.

    All loads come first, so that they overlap.
    """
    offsets = rows_of(first, BLOCK) if STATE == tl.uint8 else first + tl.arange(0, BLOCK)
    source = pointer_to(a_source, start, SOURCE, VECTOR)
    exp_avg = pointer_to(a_exp_avg, start, tl.float32, VECTOR)
    exp_avg_sq = pointer_to(a_exp_avg_sq, start, tl.float32, VECTOR)
    b_g = load(pointer_to(a_grad, start, GRAD, VECTOR), offsets, count, VECTOR).to(tl.float32)
    b_w = load(source, offsets, count, VECTOR).to(tl.float32)
    if STATE == tl.uint8:
        b_m = load_moments(a_exp_avg, a_avg_absmax, start, first, count, True, VECTOR, BLOCK)
        b_v = load_moments(a_exp_avg_sq, a_sq_absmax, start, first, count, False, VECTOR, BLOCK)
    else:
        b_m = load(exp_avg, offsets, count, VECTOR)
        b_v = load(exp_avg_sq, offsets, count, VECTOR)

    b_g = b_g * c[0]
    b_m = b_m + (b_g - b_m) * c[2]
    b_v = b_v * c[3] + (b_g * b_g) * c[4]
    if STATE == tl.uint8:
        # With codes to make, arithmetic is the limit: root and quotients to a unit or two in the last place.
        b_w = b_w * c[1] - c[7] * (b_m / (tl.sqrt(b_v) * (1.0 / c[5]) + c[6]))
    else:
        b_w = b_w * c[1] - c[7] * tl.div_rn(b_m, tl.div_rn(tl.sqrt_rn(b_v), c[5]) + c[6])

    if STATE == tl.uint8:
        store_moments(a_exp_avg, a_avg_absmax, start, first, count, b_m, True, VECTOR, BLOCK)
        store_moments(a_exp_avg_sq, a_sq_absmax, start, first, count, b_v, False, VECTOR, BLOCK)
    else:
        store(exp_avg, offsets, count, b_m, VECTOR)
        store(exp_avg_sq, offsets, count, b_v, VECTOR)
    if MASTER:
        store(source, offsets, count, b_w, VECTOR)
    b_w = rounded_as_asked(b_w, WEIGHT, STOCHASTIC, seed, parameter, step, UPDATE, start + first, BLOCK)
    store(pointer_to(a_weight, start, WEIGHT, VECTOR), offsets, count, b_w, VECTOR)


@unspecialised
def rsaft_sam_adamw_kernel(
    addresses,
    numel,
    chunk_tensor,
    chunk_index,
    parameter,
    coefficients,
    skip,
    first_inf,
    seed: tl.uint64,
    grad: tl.int64,
    first_chunk,
    tensors,
    ROW_WEIGHT: tl.constexpr,
    ROW_GRAD: tl.constexpr,
    ROW_SOURCE: tl.constexpr,
    ROW_EXP_AVG: tl.constexpr,
    ROW_EXP_AVG_SQ: tl.constexpr,
    ROW_EXP_AVG_ABSMAX: tl.constexpr,
    ROW_EXP_AVG_SQ_ABSMAX: tl.constexpr,
    N_COEFFICIENTS: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    SOURCE: tl.constexpr,
    STATE: tl.constexpr,
    MASTER: tl.constexpr,
    RESTORE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Update one chunk: AdamW where the step is made, else restore.

    `ROW_SOURCE`: the master, the backup, or (nothing to restore) the weight itself.

    `grad`: address of the gradient of the one tensor whose chunks these are; 0: look it up in the table.
    """
    # Backwards: the end of the gradients may still be in the L2 cache after the norm.
    i_chunk = first_chunk + tl.num_programs(0) - 1 - tl.program_id(0)
    i_tensor, start, count = chunk_span(i_chunk, numel, chunk_tensor, chunk_index, CHUNK)
    a_weight = address_of(addresses, ROW_WEIGHT, tensors, i_tensor)
    a_grad = grad.to(tl.int64)  # the interpreter takes a low address for 32 bits, whatever the annotation says
    if a_grad == 0:
        a_grad = address_of(addresses, ROW_GRAD, tensors, i_tensor)
    a_backup = address_of(addresses, ROW_SOURCE, tensors, i_tensor)
    a_source = tl.where(a_backup == 0, a_weight, a_backup)  # no backup: the weight was not perturbed
    if (tl.load(skip) == 0.0) & (a_grad != 0):
        a_exp_avg = address_of(addresses, ROW_EXP_AVG, tensors, i_tensor)
        a_exp_avg_sq = address_of(addresses, ROW_EXP_AVG_SQ, tensors, i_tensor)
        a_avg_absmax = address_of(addresses, ROW_EXP_AVG_ABSMAX, tensors, i_tensor)
        a_sq_absmax = address_of(addresses, ROW_EXP_AVG_SQ_ABSMAX, tensors, i_tensor)
        p_row = coefficients + N_COEFFICIENTS * i_tensor
        c = (
            tl.load(p_row).to(tl.float32),
            tl.load(p_row + 1).to(tl.float32),
            tl.load(p_row + 2).to(tl.float32),
            tl.load(p_row + 3).to(tl.float32),
            tl.load(p_row + 4).to(tl.float32),
            tl.load(p_row + 5).to(tl.float32),
            tl.load(p_row + 6).to(tl.float32),
            tl.load(p_row + 7).to(tl.float32),
        )
        step = tl.load(p_row + 8)
        this = tl.load(parameter + i_tensor)
        vector = vector_part(a_weight | a_grad | a_source | a_exp_avg | a_exp_avg_sq, count, BLOCK)
        for first in range(0, vector, BLOCK):
            _update(
                a_weight, a_grad, a_source, a_exp_avg, a_exp_avg_sq, a_avg_absmax, a_sq_absmax, start, first, count, c,
                seed, this, step, WEIGHT, GRAD, SOURCE, STATE, MASTER, STOCHASTIC, True, BLOCK,
            )  # fmt: skip
        for first in range(vector, count, TAIL):
            _update(
                a_weight, a_grad, a_source, a_exp_avg, a_exp_avg_sq, a_avg_absmax, a_sq_absmax, start, first, count, c,
                seed, this, step, WEIGHT, GRAD, SOURCE, STATE, MASTER, STOCHASTIC, False, TAIL,
            )  # fmt: skip
    elif RESTORE:
        restore_chunk(a_weight, a_backup, start, count, tl.load(first_inf), WEIGHT, SOURCE, BLOCK)


def variant(
    weight: torch.dtype,
    grad: torch.dtype,
    source: str,
    source_dtype: torch.dtype,
    state: torch.dtype,
    restore: bool,
    stochastic: bool,
    block: int,
) -> tuple:
    """Choose kernel and constants for `launcher`."""
    lists = ("weight", "grad", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
    rows = {f"ROW_{name.upper()}": ROW[name] for name in lists} | dict(ROW_SOURCE=ROW[source])
    dtypes = dict(WEIGHT=DTYPES[weight], GRAD=DTYPES[grad], SOURCE=DTYPES[source_dtype], STATE=DTYPES[state])
    choices = dict(MASTER=source == "master", RESTORE=restore, STOCHASTIC=stochastic)
    fixed = rows | dtypes | choices | dict(N_COEFFICIENTS=N_COEFFICIENTS, CHUNK=CHUNK) | OPTIONS
    if state is torch.uint8:
        # 96 registers: five blocks of 128 threads on a multiprocessor, where 256 threads would fit twice.
        return rsaft_sam_adamw_kernel, fixed | dict(BLOCK=block // 2, TAIL=block // 2, num_warps=4, maxnreg=96)
    # A tail is masked element by element: half a block of it needs no more registers than a whole block elsewhere.
    registers = 80 if source == "master" or stochastic else 64
    return rsaft_sam_adamw_kernel, fixed | dict(BLOCK=block, TAIL=block // 2, maxnreg=registers)


def sam_adamw_step_(
    table: TensorTable, scalars, first, restore: bool, tensor: int | None = None, grad: torch.Tensor | None = None
) -> None:
    """Restore and update the weights of a table, or of its one `tensor` from `grad`."""
    first_chunk, chunks = launch_span(table, tensor)
    if not chunks:
        return
    source = "master" if "master" in table else "backup" if restore else "weight"
    seed, dtypes = rounding_seed(table), table.dtypes
    kinds = dtypes["weight"], dtypes["grad"] if grad is None else grad.dtype, source, dtypes[source], dtypes["exp_avg"]
    launch = launcher(variant, table.device, *kinds, restore, seed is not None, BLOCK)
    with on(table.device):
        launch(
            (chunks, 1, 1),
            table.addresses,
            table.numel,
            table.chunk_tensor,
            table.chunk_index,
            table.parameter,
            table.coefficients,
            scalars.skip,
            scalars.skip if first is None else first.found_inf,
            seed or 0,
            0 if grad is None else grad.data_ptr(),
            first_chunk,
            len(table),
        )
