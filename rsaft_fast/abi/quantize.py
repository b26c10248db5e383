"""8-bit codes of optimizer state: bitsandbytes' dynamic map (arXiv 1511.04561, arXiv 2110.02861), in closed form.

A block of `BLOCK` elements shares a float32 `absmax`; a code stands for a fraction of it. The map has seven
decades, 10^-6 to 1. Signed, decade `10^(n-6)` holds 2^n values, n = 0..6, evenly spaced over [0.1, 1] of it, and
their negatives; unsigned, `10^(n-7)` holds 2^n, n = 1..7. Zero and 1 have codes of their own. So code and value are
arithmetic of each other: with q = |code - 127| (signed) or code + 1 (unsigned), q = 2^n + f names the value
`10^e (0.1 + 0.9 (f + 0.5) / 2^n)` of decade e.

The kernels do the same float32 operations in the same order.
"""

import torch

BLOCK = 256
"""Elements that share an absmax, in memory order, counted from the start of a tensor."""

MIN_SIZE = 4096
"""Below so many elements 8 bits save nothing worth their error: bitsandbytes' default."""

DECADES = 7


def decade_limits(signed: bool) -> list[float]:
    """Compute where decade j ends and j + 1 begins: half way between their neighbouring values."""
    return [10.0 ** (j - 6) * (1 + 0.9 / 2 ** (j if signed else j + 1)) for j in range(DECADES - 1)]


def zero_limit(signed: bool) -> float:
    """Compute the magnitude below which zero is nearer than the smallest value."""
    return 0.5e-6 * (0.1 + (0.45 if signed else 0.225))


def one_limit(signed: bool) -> float:
    """Compute the magnitude from which 1 is nearer than the largest value of the last decade."""
    return 1 - 0.225 / (64 if signed else 128)


def _bit(d: torch.Tensor, bit: int, factor: float) -> torch.Tensor:
    return torch.where((d & bit) != 0, factor, 1.0)


def dequantize(codes: torch.Tensor, signed: bool) -> torch.Tensor:
    """Decode uint8 codes to float32 fractions of the absmax, in [-1, 1] (signed) or [0, 1]; any shape."""
    c = codes.int()
    q = (c - 127).abs() if signed else c + 1
    mantissa, exponent = torch.frexp(q.float().clamp(min=1.0))  # q = mantissa 2^exponent, mantissa in [0.5, 1)
    n = exponent.int() - 1
    half_step = torch.ldexp(torch.full_like(mantissa, 0.5), -n)
    d = (6 if signed else 7) - n
    power = _bit(d, 1, 0.1) * _bit(d, 2, 0.01) * _bit(d, 4, 1e-4)
    value = power * (0.1 + 0.9 * ((2 * mantissa - 1) + half_step))
    value = torch.where(c == 255, 1.0, value)
    value = torch.where(c == (127 if signed else 0), 0.0, value)
    return torch.where(c < 127, -value, value) if signed else value


def quantize(x: torch.Tensor, signed: bool) -> torch.Tensor:
    """Encode float32 fractions of the absmax as the nearest uint8 codes; any shape.

    Values beyond 1 take the last code.
    """
    a = x.float().abs()
    decade = torch.zeros_like(a, dtype=torch.int32)
    for limit in decade_limits(signed):
        decade += a >= limit
    n = decade if signed else decade + 1
    d = (DECADES - 1) - decade
    scaled = a * (_bit(d, 1, 10.0) * _bit(d, 2, 100.0) * _bit(d, 4, 1e4))
    steps = torch.ldexp(torch.ones_like(a), n)
    f = (((scaled - 0.1) * (1 / 0.9)) * steps).int()
    q = steps.int() + torch.minimum(f.clamp(min=0), steps.int() - 1)
    code = torch.where(x < 0, 127 - q, 127 + q) if signed else q - 1
    code = torch.where(a < zero_limit(signed), 127 if signed else 0, code)
    return torch.where(x >= one_limit(signed), 255, code).to(torch.uint8)


def blocks(numel: int) -> int:
    """Count the absmax values of a tensor with `numel` elements."""
    return -(-numel // BLOCK)


def dequantize_blocks(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """Decode flat codes `(n,)` and absmax `(blocks(n),)` to float32 values `(n,)`."""
    return dequantize(codes, signed) * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def quantize_blocks(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode float32 values `(n,)` as codes `(n,)` and absmax `(blocks(n),)`.

    A block whose absmax is subnormal becomes zero: its reciprocal would overflow, and no update could see it.
    """
    padded = torch.nn.functional.pad(x.float(), (0, blocks(x.numel()) * BLOCK - x.numel())).view(-1, BLOCK)
    absmax = padded.abs().amax(1) if len(padded) else padded.new_zeros(0)
    inverse = torch.where(absmax >= torch.finfo(torch.float32).tiny, 1 / absmax, 0.0)
    codes = quantize(padded * inverse[:, None], signed)
    return codes.view(-1)[: x.numel()], absmax
