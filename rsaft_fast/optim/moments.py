"""AdamW's state of one parameter: which tensors it has, how they begin, and how they are read from a checkpoint."""

from collections.abc import Mapping

import torch

from rsaft_fast.ops import quantize
from rsaft_fast.ops.table import ABSMAX

MOMENTS = ("exp_avg", "exp_avg_sq")
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}
_ZERO = {"exp_avg": 127, "exp_avg_sq": 0}
"""The code of 0."""

# What bitsandbytes calls them. Recent versions keep them one level deeper.
_BITSANDBYTES = {
    "state1": "exp_avg",
    "state2": "exp_avg_sq",
    "absmax1": "exp_avg_absmax",
    "absmax2": "exp_avg_sq_absmax",
}
_BITSANDBYTES_NEST = "__bnb_optimizer_quant_state__"


def state_names(master: bool, eight_bit: bool) -> tuple[str, ...]:
    """The lists that a parameter's state fills, besides ``step``."""
    return MOMENTS + (ABSMAX if eight_bit else ()) + (("master",) if master else ())


def empty_state(
    param: torch.Tensor, name: str, eight_bit: bool, device: torch.device | str | None = None
) -> torch.Tensor:
    """A tensor that holds ``name`` of a parameter before its first step: the master is the weight, all else zero.

    ``device``: where it lies; beside the parameter by default.
    """
    wide, device = torch.promote_types(param.dtype, torch.float32), device or param.device
    if name in ABSMAX:
        return torch.zeros(quantize.blocks(param.numel()), device=device)
    if name == "master":
        return param.detach().to(device, wide, copy=True)
    if eight_bit:
        return torch.full_like(param, _ZERO[name], dtype=torch.uint8, device=device, requires_grad=False)
    return torch.zeros_like(param, dtype=wide, device=device, requires_grad=False)


def load_moments(state: dict[str, torch.Tensor], saved: Mapping, eight_bit: bool) -> None:
    """Write the moments of a checkpoint into ``state``, whatever held them: float32, 8 bits, or bitsandbytes' names.

    8-bit moments of the same memory layout are taken code by code; anything else goes through its values.
    """
    saved = {**saved, **saved.get(_BITSANDBYTES_NEST, {})}
    saved = {_BITSANDBYTES.get(name, name): value for name, value in saved.items()}
    for name in MOMENTS:
        target, absmax, value = state[name], name + "_absmax", saved.get(name)
        if value is None:
            target.fill_(_ZERO[name] if eight_bit else 0)
            if eight_bit:
                state[absmax].zero_()
            continue
        codes = value.dtype == torch.uint8
        if codes and eight_bit and value.stride() == target.stride():
            target.copy_(value)
            state[absmax].copy_(saved[absmax])
            continue
        if codes:
            value = _decoded(value, saved[absmax].to(value.device), name)
        if eight_bit:
            _encode(value.to(target.device), target, state[absmax], name)
        else:
            target.copy_(value)


def _memory_order(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _decoded(codes: torch.Tensor, absmax: torch.Tensor, name: str) -> torch.Tensor:
    values = torch.empty_like(codes, dtype=torch.float32)
    _memory_order(values).copy_(quantize.dequantize_blocks(_memory_order(codes), absmax, _SIGNED[name]))
    return values


def _encode(values: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, name: str) -> None:
    arranged = torch.empty_like(codes, dtype=torch.float32).copy_(values)
    flat, largest = quantize.quantize_blocks(_memory_order(arranged), _SIGNED[name])
    _memory_order(codes).copy_(flat)
    absmax.copy_(largest)
