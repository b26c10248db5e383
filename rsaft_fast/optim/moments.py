"""AdamW's state of one parameter: which tensors it has, how they begin, and how they are read from a checkpoint."""

from collections.abc import Mapping

import torch

from rsaft_fast.abi import quantize
from rsaft_fast.abi.table import ABSMAX, order

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


STRIDES = "strides"
"""The key beside 8-bit moments in a checkpoint that says in which layout they were written."""


def state_names(master: bool, eight_bit: bool) -> tuple[str, ...]:
    """Name the lists that a parameter's state fills, besides `step`."""
    return MOMENTS + (ABSMAX if eight_bit else ()) + (("master",) if master else ())


def empty_state(
    param: torch.Tensor, name: str, eight_bit: bool, device: torch.device | str | None = None
) -> torch.Tensor:
    """Make the tensor `name` of a parameter before its first step: the master is the weight, all else zero.

    `device`: where it lies; beside the parameter by default.
    """
    wide, device = torch.promote_types(param.dtype, torch.float32), device or param.device
    if name in ABSMAX:
        return torch.zeros(quantize.blocks(param.numel()), device=device)
    if name == "master":
        return param.detach().to(device, wide, copy=True)
    if eight_bit:
        return torch.full_like(param, _ZERO[name], dtype=torch.uint8, device=device, requires_grad=False)
    return torch.zeros_like(param, dtype=wide, device=device, requires_grad=False)


def fit_state(
    param: torch.Tensor,
    state: dict[str, torch.Tensor],
    master: bool,
    eight_bit: bool,
    device: torch.device | str | None = None,
) -> None:
    """Change `state` into one that the parameter can have as it is now, keeping the values.

    A parameter may have got another layout, dtype or device since; tensors that then lie otherwise are replaced by
    converted ones, missing ones begin, and those of another kind of storage go.

    Args:
        device: where the state lies; beside the parameter by default.

    Raises:
        ValueError: state of another shape than the parameter's.
    """
    check_shapes(param, state)
    names, device = state_names(master, eight_bit), torch.device(device or param.device)
    like = {name: empty_state(torch.empty_like(param, device="meta"), name, eight_bit) for name in names}
    old = {name: state.pop(name) for name in (*MOMENTS, *ABSMAX, "master") if name in state}
    kept = {name: value for name, value in old.items() if name in like and _lies_as(value, like[name], device)}
    for name in names:
        state[name] = kept[name] if name in kept else empty_state(param, name, eight_bit, device)
    for name in MOMENTS:
        if name in old and not kept.keys() >= {name, name + "_absmax"} & like.keys():
            _load_moment(state, old, name, eight_bit)
    if master and "master" in old and "master" not in kept:
        state["master"].copy_(old["master"])


def _lies_as(tensor: torch.Tensor, like: torch.Tensor, device: torch.device) -> bool:
    same = tensor.dtype is like.dtype and tensor.shape == like.shape and tensor.device == device
    return same and order(tensor.shape, tensor.stride()) == order(like.shape, like.stride())


def check_shapes(param: torch.Tensor, state: Mapping) -> None:
    """Raise ValueError for state of another shape than the parameter's, in this module's names."""
    for name in (*MOMENTS, "master"):
        value = state.get(name)
        if value is not None and value.shape != param.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}: the state belongs to "
                "another parameter. Clear it (optimizer.state.pop(parameter)), or build a new optimizer"
            )


def named_state(saved: Mapping) -> dict:
    """Give a parameter's state from a checkpoint in this module's names, whoever wrote it.

    Codes come in the layout that they were written in: their blocks follow it, and a format that keeps no strides
    (safetensors) has lost it.
    """
    saved = {**saved, **saved.get(_BITSANDBYTES_NEST, {})}
    saved = {_BITSANDBYTES.get(name, name): value for name, value in saved.items()}
    strides = saved.pop(STRIDES, None)
    for name in MOMENTS if strides else ():
        if saved[name].stride() != tuple(strides):
            saved[name] = saved[name].new_empty_strided(saved[name].shape, strides).copy_(saved[name])
    return saved


def with_strides(state: dict) -> dict:
    """Add the strides of a parameter's codes to its state for a checkpoint, unless they follow from the shape."""
    codes = state.get(MOMENTS[0])
    if codes is None or codes.dtype is not torch.uint8 or codes.is_contiguous():
        return state
    return {**state, STRIDES: tuple(codes.stride())}


def decoded_state(state: Mapping) -> dict:
    """Give a parameter's state with float32 moments in place of 8-bit ones; 8 bits again round them once more."""
    decoded = {name: value for name, value in state.items() if name not in ABSMAX}
    for name in MOMENTS:
        if name in state and state[name].dtype is torch.uint8:
            decoded[name] = _decoded(state[name], state[name + "_absmax"], name)
    return decoded


def load_moments(state: dict[str, torch.Tensor], saved: Mapping, eight_bit: bool) -> None:
    """Write the moments of a checkpoint into `state`, whatever held them: float32 or 8 bits (see `named_state`).

    8-bit moments of the same memory layout are taken code by code; anything else goes through its values.
    """
    for name in MOMENTS:
        _load_moment(state, saved, name, eight_bit)


def _load_moment(state: dict[str, torch.Tensor], saved: Mapping, name: str, eight_bit: bool) -> None:
    target, absmax, value = state[name], name + "_absmax", saved.get(name)
    if value is None:
        target.fill_(_ZERO[name] if eight_bit else 0)
        if eight_bit:
            state[absmax].zero_()
        return
    codes = value.dtype == torch.uint8
    if codes and eight_bit and value.stride() == target.stride():
        target.copy_(value)
        state[absmax].copy_(saved[absmax])
        return
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
