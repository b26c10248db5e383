"""An fp32 matrix as bf16 parts that add up to it: tensor cores multiply these exactly, and add in fp32."""

import torch

from rsaft_fast.ops import backends, reference

PARTS = (0, 1, 2)


def bf16_parts(wide: torch.Tensor, order: tuple[int, ...] = PARTS) -> torch.Tensor:
    """Split an fp32 matrix into three bf16 ones, stacked along the rows in that order: (r, n) to (len(order) * r, n).

    Their sum is the matrix, bit for bit, down to 2^-110: a bf16 number has 8 significant bits and fp32's exponents.

    Args:
        wide: fp32, any strides. order: of parts 0 (the nearest bf16), 1 (that of the rest) and 2; may repeat them.
    """
    if _has_kernel(wide):
        return backends.triton_kernels().bf16_parts(wide, order)
    return reference.bf16_parts(wide, order)


def _has_kernel(wide: torch.Tensor) -> bool:
    """Whether one Triton launch does it; the CUDA library has no such kernel, and compiled code is traced from plain
    operations."""
    if not wide.is_cuda or torch.compiler.is_compiling() or wide.numel() >= 2**31:
        return False
    return backends.forced() != "torch" and backends.why_not("triton", wide.device) is None
