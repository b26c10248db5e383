"""The dtype of a network's weights: one for all, but for what its class keeps in fp32."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from torch import nn

_HALF = (torch.float16, torch.bfloat16)


def cast_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a network's weights in place, as `from_pretrained` of diffusers would load them in `dtype`.

    Of Krea-2 the normalisations stay in fp32 under bf16 and fp16: a weight there is a scale less 1, and with the 1
    added it would lose the digits that it has alone.
    """
    kept = _kept_in_fp32(network) if dtype in _HALF else ()
    if not kept:
        # diffusers' own `to` warns of layers to keep in fp32 though there are none.
        return nn.Module.to(network, dtype) if isinstance(network, ModelMixin) else network.to(dtype)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if name in kept else dtype)
    return network


def has_dtype(network: nn.Module, dtype: torch.dtype) -> bool:
    """Tell whether `cast_network` would change nothing."""
    kept = _kept_in_fp32(network)
    if not kept:
        return network.dtype == dtype
    wide = torch.float32 if dtype in _HALF else dtype
    tensors = (*network.named_parameters(), *network.named_buffers())
    return all(t.dtype == (wide if name in kept else dtype) for name, t in tensors if t.is_floating_point())


def _kept_in_fp32(network: nn.Module) -> frozenset[str]:
    """Names of the tensors that diffusers keeps so: those below a module of the names that their class lists."""
    listed = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if isinstance(network, ModelMixin) else set()
    tensors = (*network.named_parameters(), *network.named_buffers()) if listed else ()
    return frozenset(name for name, _ in tensors if listed.intersection(name.split(".")))
