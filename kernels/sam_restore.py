"""Restore: the weight's old bits from the backup, or the float32 master rounded again; nothing after a no-op."""

import torch
import triton.language as tl

from rsaft_fast.abi.table import CHUNK, ROW, TensorTable
from rsaft_fast.kernels.common import (
    DTYPES,
    OPTIONS,
    address_of,
    chunk_span,
    launch_span,
    launcher,
    on,
    restore_chunk,
    unspecialised,
)

BLOCK = 4096


@unspecialised
def rsaft_sam_restore_kernel(
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
    """Restore one chunk."""
    i_chunk = first_chunk + tl.program_id(0)
    i_tensor, start, count = chunk_span(i_chunk, numel, chunk_tensor, chunk_index, CHUNK)
    a_weight = address_of(addresses, ROW_WEIGHT, tensors, i_tensor)
    a_source = address_of(addresses, ROW_SOURCE, tensors, i_tensor)
    restore_chunk(a_weight, a_source, start, count, tl.load(found_inf), WEIGHT, SOURCE, BLOCK)


def variant(weight: torch.dtype, source: str, source_dtype: torch.dtype, block: int) -> tuple:
    """Choose kernel and constants for `launcher`."""
    rows = dict(ROW_WEIGHT=ROW["weight"], ROW_SOURCE=ROW[source])
    dtypes = dict(WEIGHT=DTYPES[weight], SOURCE=DTYPES[source_dtype])
    return rsaft_sam_restore_kernel, rows | dtypes | dict(CHUNK=CHUNK, BLOCK=block) | OPTIONS


def sam_restore_(table: TensorTable, norm, tensor: int | None = None) -> None:
    """Restore the weights of a table, or of its one `tensor`."""
    first_chunk, chunks = launch_span(table, tensor)
    if not chunks:
        return
    source = "master" if "master" in table else "backup"
    launch = launcher(variant, table.device, table.dtypes["weight"], source, table.dtypes[source], BLOCK)
    with on(table.device):
        launch(
            (chunks, 1, 1),
            table.addresses,
            table.numel,
            table.chunk_tensor,
            table.chunk_index,
            norm.found_inf,
            first_chunk,
            len(table),
        )
