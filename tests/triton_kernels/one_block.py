"""What the kernels call within, as kernels of one block, so that a test can call it."""

import triton
import triton.language as tl

from rsaft_fast.kernels.quantize import dequantize, quantize
from rsaft_fast.kernels.rounding import UPDATE, random16


@triton.jit
def dequantize_kernel(codes, values, SIGNED: tl.constexpr, LENGTH: tl.constexpr):
    i = tl.arange(0, LENGTH)
    tl.store(values + i, dequantize(tl.load(codes + i), SIGNED))


@triton.jit
def quantize_kernel(values, codes, SIGNED: tl.constexpr, LENGTH: tl.constexpr):
    i = tl.arange(0, LENGTH)
    tl.store(codes + i, quantize(tl.load(values + i), SIGNED))


@triton.jit
def random16_kernel(out, seed, parameter, step, first, LENGTH: tl.constexpr):
    bits = random16(seed, tl.load(parameter), tl.load(step), UPDATE, first, LENGTH)
    tl.store(out + tl.arange(0, LENGTH), bits.to(tl.int64))
