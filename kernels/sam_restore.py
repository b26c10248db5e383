"""Restore: the weight's old bits from the backup, or the float32 master rounded again. Nothing after a no-op."""

import triton
import triton.language as tl

from rsaft_fast.ops.table import CHUNK, ROW, TensorTable

from .common import DTYPES, OPTIONS, address_of, chunk_span, load, on, pointer_to, rounded, store, vector_part

BLOCK = 4096


@triton.jit
def _restore(
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
def sam_restore_kernel(
    addresses,
    numel,
    chunk_tensor,
    chunk_index,
    found_inf,
    tensors,
    row_weight,
    row_source,
    WEIGHT: tl.constexpr,
    SOURCE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_tensor, start, count = chunk_span(numel, chunk_tensor, chunk_index, CHUNK)
    a_weight = address_of(addresses, row_weight, tensors, i_tensor)
    a_source = address_of(addresses, row_source, tensors, i_tensor)
    count = tl.where(tl.load(found_inf) == 0.0, count, 0)
    vector = vector_part(a_weight | a_source, count, BLOCK)
    for first in range(0, vector, BLOCK):
        _restore(a_weight, a_source, start, first + tl.arange(0, BLOCK), count, WEIGHT, SOURCE, True)
    for first in range(vector, count, BLOCK):
        _restore(a_weight, a_source, start, first + tl.arange(0, BLOCK), count, WEIGHT, SOURCE, False)


def sam_restore_(table: TensorTable, norm) -> None:
    if not table.chunks:
        return
    source = "master" if "master" in table else "backup"
    with on(table.device):
        sam_restore_kernel[(table.chunks,)](
            table.addresses,
            table.numel,
            table.chunk_tensor,
            table.chunk_index,
            norm.found_inf,
            len(table),
            ROW["weight"],
            ROW[source],
            WEIGHT=DTYPES[table.dtypes["weight"]],
            SOURCE=DTYPES[table.dtypes[source]],
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            **OPTIONS,
        )
