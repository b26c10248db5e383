"""Restore: the weight's old bits from the backup, or the float32 master rounded again. Nothing after a no-op."""

import triton
import triton.language as tl

from rsaft_fast.ops.table import CHUNK, ROW, TensorTable

from .common import DTYPES, OPTIONS, address_of, chunk_span, on, restore_block, vector_part

BLOCK = 4096


@triton.jit(do_not_specialize=["tensors"])
def sam_restore_kernel(
    addresses,
    numel,
    chunk_tensor,
    chunk_index,
    found_inf,
    tensors,
    ROW_WEIGHT: tl.constexpr,
    ROW_SOURCE: tl.constexpr,
    WEIGHT: tl.constexpr,
    SOURCE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_tensor, start, count = chunk_span(numel, chunk_tensor, chunk_index, CHUNK)
    a_weight = address_of(addresses, ROW_WEIGHT, tensors, i_tensor)
    a_source = address_of(addresses, ROW_SOURCE, tensors, i_tensor)
    count = tl.where(tl.load(found_inf) == 0.0, count, 0)
    vector = vector_part(a_weight | a_source, count, BLOCK)
    for first in range(0, vector, BLOCK):
        restore_block(a_weight, a_source, start, first + tl.arange(0, BLOCK), count, WEIGHT, SOURCE, True)
    for first in range(vector, count, BLOCK):
        restore_block(a_weight, a_source, start, first + tl.arange(0, BLOCK), count, WEIGHT, SOURCE, False)


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
            ROW_WEIGHT=ROW["weight"],
            ROW_SOURCE=ROW[source],
            WEIGHT=DTYPES[table.dtypes["weight"]],
            SOURCE=DTYPES[table.dtypes[source]],
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            **OPTIONS,
        )
