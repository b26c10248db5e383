"""Attention kernels by name, for one model and not for the process.

diffusers' `set_attention_backend` changes the default of every model in the process, and reaches FLUX.1's processors
alone: those of the UNets and of SD3 call torch's attention by themselves. Here each attention layer of one model runs
under its own choice, whatever its processor is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from rsaft_fast.errors import UserError, first_line

TORCH_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_MENDS = {
    "xformers": "install a build of xformers for this torch and its CUDA",
    "flash3": "build FlashAttention's hopper folder (flash_attn_interface), compute in bf16 or fp16, on Hopper",
}


def _xformers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def _flash3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(query, key, value)
    return out[0] if isinstance(out, tuple) else out  # older builds return the log-sum-exp too


PACKAGES: dict[str, Callable] = {"xformers": _xformers, "flash3": _flash3}
"""Kernels of other packages, each of (B, L, H, D) queries, keys and values."""
MASKLESS = ("flash", *PACKAGES)
"""Those that take no mask."""
_MASKED_BLOCKS = ("ZImageTransformerBlock",)
"""Blocks whose attention gets a mask where a batch's texts differ in length."""


class _AttentionReplaced(TorchFunctionMode):
    """Another function in the place of torch's attention."""

    def __init__(self, attend: Callable):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if attn_mask is not None or dropout_p or is_causal or scale is not None or enable_gqa:
            raise NotImplementedError("attention with a mask, dropout, a scale or grouped heads: speed.attention=auto")
        return self.attend(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)


def _with_kernel(name: str) -> Callable[[], AbstractContextManager]:
    """Give a context in which torch's attention is the kernel of that name."""
    if name in TORCH_KERNELS:
        return partial(sdpa_kernel, TORCH_KERNELS[name])
    return partial(_AttentionReplaced, PACKAGES[name]) if name in PACKAGES else nullcontext


class _ForwardWithKernel:
    """Stand-in for an attention layer's `forward`, under its choice.

    Entered at each call, so that recomputation is under it too.
    """

    def __init__(self, forward: Callable, choice: Callable[[], AbstractContextManager]):
        # The bound method: torch.compile cannot look `type(layer).forward` up, as diffusers allows the class in graphs.
        self.forward, self.choice = forward, choice

    def __call__(self, *args, **kwargs):
        with self.choice():
            return self.forward(*args, **kwargs)


def set_attention(model: nn.Module, name: str) -> None:
    """Let every attention layer of a diffusers model compute by the kernel `name`, and no other model's.

    Raises:
        UserError: the kernel does not run here, or not at this model's head sizes.
    """
    if name in MASKLESS and any(type(m).__name__ in _MASKED_BLOCKS for m in model.modules()):
        raise UserError(
            f"speed.attention is {name}, which takes no mask, and {type(model).__name__} masks the ends of shorter "
            "texts: take efficient or cudnn, or set speed.attention=auto"
        )
    layers = [m for m in model.modules() if isinstance(m, Attention | AttentionModuleMixin)]
    parameter = next(model.parameters())
    if parameter.device.type != "meta":
        check_attention(name, parameter.device, parameter.dtype, {_head_dim(m) for m in layers})
    for layer in layers:
        if hasattr(layer.processor, "_attention_backend"):  # else the environment could name another
            layer.processor._attention_backend = "native"
        if name != "sdpa":
            layer.forward = _ForwardWithKernel(layer.forward, _with_kernel(name))


def _head_dim(layer: Any) -> int:
    """Channels of one head: newer classes of diffusers say it themselves."""
    return layer.head_dim if hasattr(layer, "head_dim") else layer.inner_dim // layer.heads


def check_attention(name: str, device: torch.device, dtype: torch.dtype, head_dims: Iterable[int] = (64,)) -> None:
    """Check that a kernel runs, forward and backward, on a few tokens.

    Raises:
        UserError: it does not run: not installed, not on this device, or not for this precision or head size.
    """
    for head_dim in sorted(head_dims):
        query, key, value = torch.zeros(3, 1, 2, 128, head_dim, device=device, dtype=dtype, requires_grad=True)
        try:
            with torch.enable_grad(), _with_kernel(name)():
                functional.scaled_dot_product_attention(query, key, value).sum().backward()
        except (ImportError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
            raise UserError(
                f"speed.attention is {name}, which does not run on {device} in {str(dtype).removeprefix('torch.')} at "
                f"{head_dim} channels a head ({first_line(error)}); "
                f"{_MENDS.get(name, 'take another kernel')}, or set speed.attention=auto"
            ) from error
