"""8-bit codes of optimizer state in closed form: the float32 operations of ``rsaft_fast.ops.quantize``, in its order.

A value costs three comparisons instead of a search through 256 entries: the bits of its decade, from the highest down,
each compared with a limit that the bits before it select.
"""

import triton
import triton.language as tl

from rsaft_fast.ops import quantize as definition

from .common import load, pointer_to, store

BLOCK_8BIT = tl.constexpr(definition.BLOCK)
_SIGNED_LIMITS, _UNSIGNED_LIMITS = (tl.constexpr(tuple(definition.decade_limits(signed))) for signed in (True, False))
_SIGNED_ZERO, _UNSIGNED_ZERO = (tl.constexpr(definition.zero_limit(signed)) for signed in (True, False))
_SIGNED_ONE, _UNSIGNED_ONE = (tl.constexpr(definition.one_limit(signed)) for signed in (True, False))
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def power_of_two(b_n):
    return ((b_n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def dequantize(b_codes, SIGNED: tl.constexpr):
    """uint8 codes to float32 fractions of the absmax."""
    b_c = b_codes.to(tl.int32)
    b_q = tl.abs(b_c - 127) if SIGNED else b_c + 1
    b_bits = b_q.to(tl.float32).to(tl.int32, bitcast=True)
    b_n = (b_bits >> 23) - 127
    b_mantissa = ((b_bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # q / 2^n, in [1, 2)
    b_d = (6 if SIGNED else 7) - b_n
    b_power = tl.where((b_d & 1) != 0, 0.1, 1.0) * tl.where((b_d & 2) != 0, 0.01, 1.0)
    b_power = b_power * tl.where((b_d & 4) != 0, 1e-4, 1.0)
    b_value = b_power * (0.1 + 0.9 * ((b_mantissa - 1.0) + power_of_two(-1 - b_n)))
    b_value = tl.where(b_c == 255, 1.0, b_value)
    b_value = tl.where(b_c == (127 if SIGNED else 0), 0.0, b_value)
    return tl.where(b_c < 127, -b_value, b_value) if SIGNED else b_value


@triton.jit
def quantize(b_x, SIGNED: tl.constexpr):
    """float32 fractions of the absmax to the nearest uint8 code."""
    L: tl.constexpr = _SIGNED_LIMITS if SIGNED else _UNSIGNED_LIMITS
    ZERO: tl.constexpr = _SIGNED_ZERO if SIGNED else _UNSIGNED_ZERO
    ONE: tl.constexpr = _SIGNED_ONE if SIGNED else _UNSIGNED_ONE
    b_a = tl.abs(b_x)
    # The decade is 6 - d. A comparison that is true takes a bit from d; with bits 4 and 2 both set, d is 6.
    b_four = b_a < L[2]
    b_two = b_a < tl.where(b_four, L[0], L[4])
    b_one = b_a < tl.where(b_four, tl.where(b_two, 0.0, L[1]), tl.where(b_two, L[3], L[5]))
    b_factor = tl.where(b_one, 10.0, 1.0) * tl.where(b_two, 100.0, 1.0)
    b_factor = b_factor * tl.where(b_four, 1e4, 1.0)
    b_n = (6 if SIGNED else 7) - tl.where(b_four, 4, 0) - tl.where(b_two, 2, 0) - tl.where(b_one, 1, 0)
    b_f = (((b_a * b_factor - 0.1) * (1 / 0.9)) * power_of_two(b_n)).to(tl.int32)
    b_steps = 1 << b_n
    b_q = b_steps + tl.minimum(tl.maximum(b_f, 0), b_steps - 1)
    b_code = tl.where(b_x < 0, 127 - b_q, 127 + b_q) if SIGNED else b_q - 1
    b_code = tl.where(b_a < ZERO, 127 if SIGNED else 0, b_code)
    return tl.where(b_x >= ONE, 255, b_code).to(tl.uint8)


@triton.jit
def rows_of(first, BLOCK: tl.constexpr):
    """Elements ``first`` and on as (rows, 256): one block of state a row. Within a warp, for the sizes that we use."""
    i_row = tl.arange(0, BLOCK // BLOCK_8BIT)
    return first + i_row[:, None] * BLOCK_8BIT + tl.arange(0, BLOCK_8BIT)[None, :]


@triton.jit
def load_moments(
    a_codes, a_absmax, start, first, count, SIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """Codes to float32 values ``(rows, 256)``."""
    i_row = first // BLOCK_8BIT + tl.arange(0, BLOCK // BLOCK_8BIT)
    absmax = pointer_to(a_absmax, start // BLOCK_8BIT, tl.float32, False)
    b_absmax = load(absmax, i_row, tl.cdiv(count, BLOCK_8BIT), VECTOR)
    b_codes = load(pointer_to(a_codes, start, tl.uint8, VECTOR), rows_of(first, BLOCK), count, VECTOR)
    return dequantize(b_codes, SIGNED) * b_absmax[:, None]


@triton.jit
def store_moments(
    a_codes, a_absmax, start, first, count, b_x, SIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = rows_of(first, BLOCK)
    if not VECTOR:
        b_x = tl.where(offsets < count, b_x, 0.0)
    b_absmax = tl.max(tl.abs(b_x), axis=1)
    # The reciprocal of a subnormal number would overflow: such a block becomes zero.
    b_inverse = tl.where(b_absmax >= _TINY, tl.div_rn(1.0, b_absmax), 0.0)
    b_codes = quantize(b_x * b_inverse[:, None], SIGNED)
    store(pointer_to(a_codes, start, tl.uint8, VECTOR), offsets, count, b_codes, VECTOR)
    i_row = first // BLOCK_8BIT + tl.arange(0, BLOCK // BLOCK_8BIT)
    absmax = pointer_to(a_absmax, start // BLOCK_8BIT, tl.float32, False)
    store(absmax, i_row, tl.cdiv(count, BLOCK_8BIT), b_absmax, VECTOR)
