"""Random bits of stochastic rounding by Philox4x32-10 (Salmon et al., SC 2011), a function of what is rounded alone.

The counter is (pack of eight elements, parameter, step and purpose), the key the seed. So the bits of an update do not
change with chunking, backend, launch order or steps that were skipped.
"""

import torch

PERTURBATION, UPDATE = 0, 1
"""What is rounded: the two purposes draw from streams of their own."""

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply two unsigned 32-bit numbers, held in int64; give the product's high and low 32 bits."""
    high, low = a * (b >> 16), a * (b & 0xFFFF)
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _MASK


def philox(counter: tuple[torch.Tensor, ...], seed: int) -> tuple[torch.Tensor, ...]:
    """Draw four words of 32 random bits (in int64) for each counter of four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def random16(numel: int, seed: int, step: torch.Tensor, parameter: int, purpose: int, start: int = 0) -> torch.Tensor:
    """Draw 16 random bits for each of `numel` elements of a tensor, in memory order: int64 `(numel,)`.

    Args:
        step: scalar on the device: steps that this tensor has taken, the one being made included for an update.
        parameter: index of the tensor in its optimizer. start: the first element within it, a multiple of 8.
    """
    device = step.device
    pack = torch.arange(start // 8, -(-(start + numel) // 8), dtype=torch.int64, device=device)
    counter = (
        pack & _MASK,
        pack >> 32,
        torch.full_like(pack, parameter),
        (2 * step.long() + purpose).expand_as(pack) & _MASK,
    )
    words = torch.stack(philox(counter, seed), dim=1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).view(-1)[:numel]


def round_stochastically(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Round float32 to bf16, up with the probability of the part cut off; `bits`: 16 random ones each, int64."""
    raw = x.view(torch.int32).long() & _MASK
    rounded = ((raw + bits) >> 16).to(torch.int32)
    rounded = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isfinite(x), rounded, x.to(torch.bfloat16))
