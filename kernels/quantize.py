"""8-bit codes of optimizer state in closed form: the float32 operations of `rsaft_fast.abi.quantize`, in its order.

A value costs three comparisons instead of a search through 256 entries: the bits of its decade, from the highest down,
each compared with a limit that the bits before it select.
"""

import struct

import triton
import triton.language as tl

from rsaft_fast.abi import quantize as definition
from rsaft_fast.kernels.common import load, pointer_to, store

BLOCK_8BIT = tl.constexpr(definition.BLOCK)
_SIGNED_LIMITS, _UNSIGNED_LIMITS = (tl.constexpr(tuple(definition.decade_limits(signed))) for signed in (True, False))
_SIGNED_ZERO, _UNSIGNED_ZERO = (tl.constexpr(definition.zero_limit(signed)) for signed in (True, False))
_SIGNED_ONE, _UNSIGNED_ONE = (tl.constexpr(definition.one_limit(signed)) for signed in (True, False))
_TINY = tl.constexpr(2.0**-126)


def _keys(signed: bool) -> tuple[int, ...]:
    """Pack two numbers a decade into one key, so that one selection yields both.

    The bits of the power of ten that lifts the decade to [0.1, 1], and in the lowest nine, which are zero there, the
    exponent of its number of values.
    """
    factors = [struct.unpack("<i", struct.pack("<f", 10.0 ** (6 - decade)))[0] for decade in range(definition.DECADES)]
    return tuple(factor | (127 + decade + (not signed)) for decade, factor in enumerate(factors))


_SIGNED_KEYS, _UNSIGNED_KEYS = (tl.constexpr(_keys(signed)) for signed in (True, False))


@triton.jit
def _with_sign_of(b_magnitude, b_x):
    b_sign = b_x.to(tl.uint32, bitcast=True) & 0x80000000
    return (b_magnitude.to(tl.uint32, bitcast=True) | b_sign).to(tl.float32, bitcast=True)


@triton.jit
def dequantize(b_codes, SIGNED: tl.constexpr):
    """Decode uint8 codes to float32 fractions of the absmax."""
    # To float by adding bits to those of 2^23: a conversion takes four times as long.
    b_c = (b_codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    b_c = b_c - (8388608.0 + (127.0 if SIGNED else -1.0))
    # |c| is q = 2^n + f; the mantissa of q + 1/2 is 1 + (f + 1/2) / 2^n, and never 1.
    b_bits = (tl.abs(b_c) + 0.5).to(tl.int32, bitcast=True)
    b_mantissa = ((b_bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    # The decade is 6 - n (unsigned: 7 - n) below the highest. The exponent is n + 127 and 127 = -1 modulo 8; the
    # difference borrows one for the mantissa.
    b_d = ((6 if SIGNED else 7) << 23) - b_bits
    b_power = tl.where((b_d & (1 << 23)) != 0, 0.1, 1.0) * tl.where((b_d & (2 << 23)) != 0, 0.01, 1.0)
    b_power = b_power * tl.where((b_d & (4 << 23)) != 0, 1e-4, 1.0)
    b_value = b_power * (0.1 + 0.9 * (b_mantissa - 1.0))
    b_value = tl.where(b_c == (128.0 if SIGNED else 256.0), 1.0, b_value)
    b_value = tl.where(b_c == (0.0 if SIGNED else 1.0), 0.0, b_value)
    return _with_sign_of(b_value, b_c) if SIGNED else b_value


@triton.jit
def quantize(b_x, SIGNED: tl.constexpr):
    """Encode float32 fractions of the absmax as the nearest uint8 codes."""
    LIMITS: tl.constexpr = _SIGNED_LIMITS if SIGNED else _UNSIGNED_LIMITS
    KEYS: tl.constexpr = _SIGNED_KEYS if SIGNED else _UNSIGNED_KEYS
    ZERO: tl.constexpr = _SIGNED_ZERO if SIGNED else _UNSIGNED_ZERO
    ONE: tl.constexpr = _SIGNED_ONE if SIGNED else _UNSIGNED_ONE
    b_a = tl.abs(b_x)
    b_key = tl.full(b_x.shape, KEYS[0], tl.int32)
    for j in tl.static_range(6):
        b_key = tl.where(b_a >= LIMITS[j], KEYS[j + 1], b_key)
    b_factor = (b_key & -512).to(tl.float32, bitcast=True)
    b_steps = (b_key << 23).to(tl.float32, bitcast=True)
    # Where it is below 0, so is a below ZERO: the limits between decades lie above the first value of the upper one.
    b_f = ((b_a * b_factor - 0.1) * (1 / 0.9)) * b_steps
    b_q = b_steps + tl.floor(tl.minimum(b_f, b_steps - 0.5))
    b_q = tl.where(b_a < ZERO, 0.0 if SIGNED else 1.0, b_q)
    if SIGNED:
        b_q = _with_sign_of(b_q, b_x)
    b_q = tl.where(b_x >= ONE, 128.0 if SIGNED else 256.0, b_q)
    # 2^23 + code has the code in its lowest bits.
    b_code = b_q + (8388608.0 + (127.0 if SIGNED else -1.0))
    return b_code.to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def rows_of(first, BLOCK: tl.constexpr):
    """Give the offsets of the elements from `first` on as (rows, 256): one block of state a row.

    Within a warp, for the sizes that we use.
    """
    i_row = tl.arange(0, BLOCK // BLOCK_8BIT)
    return first + i_row[:, None] * BLOCK_8BIT + tl.arange(0, BLOCK_8BIT)[None, :]


@triton.jit
def load_moments(
    a_codes, a_absmax, start, first, count, SIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """Load codes and absmax, and decode them to float32 values `(rows, 256)`."""
    i_row = first // BLOCK_8BIT + tl.arange(0, BLOCK // BLOCK_8BIT)
    absmax = pointer_to(a_absmax, start // BLOCK_8BIT, tl.float32, False)
    b_absmax = load(absmax, i_row, tl.cdiv(count, BLOCK_8BIT), VECTOR)
    b_codes = load(pointer_to(a_codes, start, tl.uint8, VECTOR), rows_of(first, BLOCK), count, VECTOR)
    return dequantize(b_codes, SIGNED) * b_absmax[:, None]


@triton.jit
def store_moments(
    a_codes, a_absmax, start, first, count, b_x, SIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """Encode float32 values `(rows, 256)`, and store their codes and absmax."""
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
