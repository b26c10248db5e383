"""Restore: the weight's old bits from the backup, or the float32 master rounded again. Nothing after a no-op."""

from functools import cache

import torch
import triton
import triton.language as tl

from rsaft_fast.ops.table import CHUNK, ROW, TensorTable

from .common import DTYPES, OPTIONS, address_of, chunk_span, launch_span, on, restore_chunk

BLOCK = 4096


@triton.jit(do_not_specialize=["first_chunk", "tensors"])
def sam_restore_kernel(
    addresses,
    numel,
    chunk_tensor,
    chunk_index,
    found_inf,
    first_chunk,
    tensors,
    ROW_WEIGHT: tl.constexpr,
    ROW_SOURCE: tl.constexpr,
    WEIGHT: tl.constexpr,
    SOURCE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_chunk = first_chunk + tl.program_id(0)
    i_tensor, start, count = chunk_span(i_chunk, numel, chunk_tensor, chunk_index, CHUNK)
    a_weight = address_of(addresses, ROW_WEIGHT, tensors, i_tensor)
    a_source = address_of(addresses, ROW_SOURCE, tensors, i_tensor)
    restore_chunk(a_weight, a_source, start, count, tl.load(found_inf), WEIGHT, SOURCE, BLOCK)


@cache
def launch_constants(weight: torch.dtype, source: str, source_dtype: torch.dtype, block: int) -> dict:
    rows = dict(ROW_WEIGHT=ROW["weight"], ROW_SOURCE=ROW[source])
    return rows | dict(WEIGHT=DTYPES[weight], SOURCE=DTYPES[source_dtype], CHUNK=CHUNK, BLOCK=block) | OPTIONS


def sam_restore_(table: TensorTable, norm, tensor: int | None = None) -> None:
    first_chunk, chunks = launch_span(table, tensor)
    if not chunks:
        return
    source = "master" if "master" in table else "backup"
    constants = launch_constants(table.dtypes["weight"], source, table.dtypes[source], BLOCK)
    with on(table.device):
        sam_restore_kernel[(chunks,)](
            table.addresses,
            table.numel,
            table.chunk_tensor,
            table.chunk_index,
            norm.found_inf,
            first_chunk,
            len(table),
            **constants,
        )
