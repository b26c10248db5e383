"""Stochastic rounding to bf16 by Philox4x32-10: the bits of `rsaft_fast.abi.philox`.

One call of the generator serves eight elements, which lie in one thread's registers where a block has eight elements a
thread: drawing costs about ten multiplications an element, hidden behind memory.
"""

import triton
import triton.language as tl

from rsaft_fast.abi import philox
from rsaft_fast.kernels.common import rounded

PERTURBATION, UPDATE = tl.constexpr(philox.PERTURBATION), tl.constexpr(philox.UPDATE)


def rounding_seed(table) -> int | None:
    """Give the key where this table's weights are rounded stochastically (those without a master), else None."""
    return None if table.rounding_seed is None or "master" in table else table.rounding_seed % 2**64


@triton.jit
def random16(seed, parameter, step, PURPOSE: tl.constexpr, first, BLOCK: tl.constexpr):
    """Draw 16 random bits, in uint32, for each of BLOCK elements from `first` (int64, a multiple of 8) on."""
    pack = first // 8 + tl.arange(0, BLOCK // 8)
    draw = (2 * step.to(tl.int64) + PURPOSE).to(tl.uint32)
    counter = pack.to(tl.uint32), (pack >> 32).to(tl.uint32), parameter.to(tl.uint32), draw
    w0, w1, w2, w3 = tl.philox(seed, counter[0], counter[1], counter[2], counter[3])
    # Element k of a pack takes half k & 1 of word k >> 1; each join adds the next lower bit of k.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK])


@triton.jit
def round_stochastically(b_x, b_random):
    """Round float32 to bf16: up with the probability of the part cut off.

    An infinity stays one under any addition below 2^16; all NaN become one.
    """
    b_bits = (b_x.to(tl.uint32, bitcast=True) + b_random) >> 16
    return tl.where(b_x == b_x, b_bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rounded_as_asked(
    b_x,
    DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    seed,
    parameter,
    step,
    PURPOSE: tl.constexpr,
    first,
    BLOCK: tl.constexpr,
):
    """Round float32 to DTYPE, to nearest or stochastically; `b_x`: BLOCK elements in any shape."""
    if STOCHASTIC:
        b_random = random16(seed, parameter, step, PURPOSE, first, BLOCK)
        return round_stochastically(b_x, tl.reshape(b_random, b_x.shape))
    return rounded(b_x, DTYPE)
