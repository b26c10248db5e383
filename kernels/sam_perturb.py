"""Perturbation in place: `w + scale * g`, the old bits to a backup, or rounded from a float32 master.

Also sums, in registers, what was applied at the weight's precision against what was wanted. Floor: 16 bytes a parameter
in fp32 with backup, 8 with bf16 weights and a master.
"""

import torch
import triton
import triton.language as tl

from rsaft_fast.abi.table import CHUNK, ROW, TensorTable
from rsaft_fast.kernels.common import (
    DTYPES,
    OPTIONS,
    address_of,
    chunk_span,
    launcher,
    load,
    on,
    pointer_to,
    rounded,
    store,
    unspecialised,
    vector_part,
)
from rsaft_fast.kernels.rounding import PERTURBATION, rounded_as_asked, rounding_seed

BLOCK = 2048


@triton.jit
def _perturb(
    a_weight,
    a_grad,
    a_source,
    start,
    first,
    count,
    scale,
    seed,
    parameter,
    step,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one block; return applied and wanted perturbation.

    `a_source`: the master, or where the backup goes.
    """
    offsets = first + tl.arange(0, BLOCK)
    weight = pointer_to(a_weight, start, WEIGHT, VECTOR)
    b_g = load(pointer_to(a_grad, start, GRAD, VECTOR), offsets, count, VECTOR).to(tl.float32)
    if MASTER:
        b_base = load(pointer_to(a_source, start, tl.float32, VECTOR), offsets, count, VECTOR)
        b_old = rounded(b_base, WEIGHT)
    else:
        b_old = load(weight, offsets, count, VECTOR)
        b_base = b_old.to(tl.float32)
        # After the gradient was read, whose memory this may be. On the vector path one thread reads and writes an
        # element; elsewhere Triton may give stores another layout than loads.
        if not VECTOR:
            tl.debug_barrier()
        store(pointer_to(a_source, start, WEIGHT, VECTOR), offsets, count, b_old, VECTOR)
    b_wanted = scale * b_g
    if ADAPTIVE:
        b_wanted = b_wanted * (b_base * b_base)
    b_new = rounded_as_asked(
        b_base + b_wanted, WEIGHT, STOCHASTIC, seed, parameter, step, PERTURBATION, start + first, BLOCK
    )
    store(weight, offsets, count, b_new, VECTOR)
    return b_new.to(tl.float32) - b_old.to(tl.float32), b_wanted


@triton.jit
def _back_up(a_weight, a_backup, start, count, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    weight = pointer_to(a_weight, start, WEIGHT, False)
    backup = pointer_to(a_backup, start, WEIGHT, False)
    for first in range(0, count, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        tl.store(backup + offsets, tl.load(weight + offsets, mask=offsets < count), mask=offsets < count)


@unspecialised
def rsaft_sam_perturb_kernel(
    addresses,
    numel,
    chunk_tensor,
    chunk_index,
    group,
    scales,
    found_inf,
    sums,
    parameter,
    steps,
    seed: tl.uint64,
    tensors,
    ROW_WEIGHT: tl.constexpr,
    ROW_GRAD: tl.constexpr,
    ROW_SOURCE: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Perturb one chunk, back up its old bits, and sum applied², applied·wanted and wanted²."""
    # Backwards: the end of the gradients may still be in the L2 cache after the norm.
    i_chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    i_tensor, start, count = chunk_span(i_chunk, numel, chunk_tensor, chunk_index, CHUNK)
    a_weight = address_of(addresses, ROW_WEIGHT, tensors, i_tensor)
    a_grad = address_of(addresses, ROW_GRAD, tensors, i_tensor)
    a_source = address_of(addresses, ROW_SOURCE, tensors, i_tensor)
    count = tl.where((tl.load(found_inf) == 0.0) & (a_source != 0), count, 0)
    if not MASTER:
        if a_grad == 0:
            _back_up(a_weight, a_source, start, count, WEIGHT, BLOCK)
    count = tl.where(a_grad != 0, count, 0)
    scale = tl.load(scales + tl.load(group + i_tensor)).to(tl.float32)
    this = tl.load(parameter + i_tensor) if STOCHASTIC else 0
    step = tl.load(steps + i_tensor) if STOCHASTIC else 0

    b_applied_sq = tl.zeros([BLOCK], dtype=tl.float32)
    b_dot = tl.zeros([BLOCK], dtype=tl.float32)
    b_wanted_sq = tl.zeros([BLOCK], dtype=tl.float32)
    vector = vector_part(a_weight | a_grad | a_source, count, BLOCK)
    for first in range(0, vector, BLOCK):
        b_applied, b_wanted = _perturb(
            a_weight, a_grad, a_source, start, first, count, scale, seed, this, step,
            WEIGHT, GRAD, MASTER, ADAPTIVE, STOCHASTIC, True, BLOCK,
        )  # fmt: skip
        b_applied_sq += b_applied * b_applied
        b_dot += b_applied * b_wanted
        b_wanted_sq += b_wanted * b_wanted
    for first in range(vector, count, BLOCK):
        b_applied, b_wanted = _perturb(
            a_weight, a_grad, a_source, start, first, count, scale, seed, this, step,
            WEIGHT, GRAD, MASTER, ADAPTIVE, STOCHASTIC, False, BLOCK,
        )  # fmt: skip
        b_applied_sq += b_applied * b_applied
        b_dot += b_applied * b_wanted
        b_wanted_sq += b_wanted * b_wanted
    tl.store(sums + 3 * i_chunk, tl.sum(b_applied_sq).to(tl.float64))
    tl.store(sums + 3 * i_chunk + 1, tl.sum(b_dot).to(tl.float64))
    tl.store(sums + 3 * i_chunk + 2, tl.sum(b_wanted_sq).to(tl.float64))


def variant(
    weight: torch.dtype, grad: torch.dtype, master: bool, adaptive: bool, stochastic: bool, block: int
) -> tuple:
    """Choose kernel and constants for `launcher`."""
    rows = dict(ROW_WEIGHT=ROW["weight"], ROW_GRAD=ROW["grad"], ROW_SOURCE=ROW["master" if master else "backup"])
    choices = dict(MASTER=master, ADAPTIVE=adaptive, STOCHASTIC=stochastic)
    sizes = dict(CHUNK=CHUNK, BLOCK=block, maxnreg=80)  # registers for three blocks on a multiprocessor
    return rsaft_sam_perturb_kernel, rows | choices | dict(WEIGHT=DTYPES[weight], GRAD=DTYPES[grad]) | sizes | OPTIONS


def sam_perturb_(table: TensorTable, norm) -> None:
    """Perturb the weights of a table by `norm.scale`; do nothing where `norm.found_inf` is set."""
    if not table.chunks:
        return
    seed = rounding_seed(table)
    choices = table.dtypes["weight"], table.dtypes["grad"], "master" in table, table.adaptive, seed is not None, BLOCK
    launch = launcher(variant, table.device, *choices)
    with on(table.device):
        launch(
            (table.chunks, 1, 1),
            table.addresses,
            table.numel,
            table.chunk_tensor,
            table.chunk_index,
            table.group,
            norm.scale,
            norm.found_inf,
            table.perturbation_sums,
            table.parameter,
            table.steps,
            seed or 0,
            len(table),
        )
