"""Low-rank adapters that keep their layer's input as it is: y = base(x) + scale * B(A x), A and B in fp32.

peft casts a bf16 input to the adapter's fp32 and keeps that copy for the backward pass, once for each of the query, key
and value that read the same input. Here the input itself is kept, one storage however many layers read it.

The adapters must count in all 24 bits of their significands: the perturbation of a sharpness-aware step is about 1e-6
of an element, which bf16 and TF32 products lose. Tensor cores multiply bf16 numbers exactly and add in fp32, so an fp32
matrix is taken apart into three bf16 ones, which together are it to the last bit, and a bf16 input needs no taking
apart: W x = W0 x + W1 x + W2 x is one product with the parts stacked along the rank. Of the nine products of two such
matrices, the three below 2^-24 are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

from rsaft_fast.ops import bf16_parts
from rsaft_fast.ops.split_bf16 import PARTS

_MORE = "second adapter"
"""Where a layer has it, in its `__dict__`."""

LEFT, RIGHT = (0, 0, 0, 1, 1, 2), (0, 1, 2, 0, 1, 0)
"""Parts of two matrices whose products are not below the last bit, in the order in which they are stacked."""


class SplitProducts:
    """Products on tensor cores, for bf16 inputs and fp32 adapters."""

    @staticmethod
    def mixed(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
        """wide (r, n) fp32 times narrow (n, m) bf16, in fp32."""
        stacked = _multiply_in_fp32(bf16_parts(wide), narrow)
        return stacked.view(len(PARTS), wide.shape[0], narrow.shape[1]).sum(0)

    @staticmethod
    def expand(left: torch.Tensor, right: torch.Tensor, onto: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """left^T right of (r, N) and (r, m), both fp32, added onto (N, m) where there is one, rounded once to bf16."""
        left, right = bf16_parts(left, LEFT).T, bf16_parts(right, RIGHT)
        if left.device.type == "cpu":
            product = _multiply_in_fp32(left, right)
            return (product if onto is None else onto + product).to(dtype)
        return left @ right if onto is None else torch.addmm(onto, left, right)


def _multiply_in_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Of bf16 matrices, added up in fp32 and left there."""
    if left.device.type == "cpu":
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


class PlainProducts:
    """Products in the adapters' own dtype."""

    @staticmethod
    def mixed(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
        return wide @ narrow.to(wide.dtype)

    @staticmethod
    def expand(left: torch.Tensor, right: torch.Tensor, onto: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        product = left.T @ right
        return (product if onto is None else product.add_(onto)).to(dtype)


def products_for(x: torch.Tensor, adapter: torch.Tensor) -> type[SplitProducts] | type[PlainProducts]:
    """How to multiply; meta tensors stand for those of a GPU."""
    splits = x.dtype == torch.bfloat16 and adapter.dtype == torch.float32 and x.device.type in ("cuda", "meta")
    return SplitProducts if splits else PlainProducts


class _AddLowRank(torch.autograd.Function):
    """onto + scale * x A^T B^T; matrices are kept with the rank first, (r, N)."""

    @staticmethod
    def forward(ctx, onto, x, a, b, scale, products):
        rows, base = x.reshape(-1, x.shape[-1]), onto.reshape(-1, onto.shape[-1])
        hidden = products.mixed(a, rows.T)
        out = products.expand(hidden, _scaled(b, scale).T, base, onto.dtype)
        ctx.save_for_backward(x, hidden, a, b)
        ctx.scale, ctx.products = scale, products
        return out.view(onto.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, hidden, a, b = ctx.saved_tensors
        needs_onto, needs_x, needs_a, needs_b = ctx.needs_input_grad[:4]
        products, rows, grads = ctx.products, x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = grad_b = None
        if needs_x or needs_a:
            grad_hidden = products.mixed(_scaled(b, ctx.scale).T, grads.T)
            if needs_a:
                grad_a = products.mixed(grad_hidden, rows)
            if needs_x:
                grad_x = products.expand(grad_hidden, a, None, x.dtype).view(x.shape)
        if needs_b:
            grad_b = products.mixed(_scaled(hidden, ctx.scale), grads).T
        return grad if needs_onto else None, grad_x, grad_a, grad_b, None, None


def _scaled(matrix: torch.Tensor, scale: float) -> torch.Tensor:
    return matrix if scale == 1 else matrix * scale


def add_low_rank(
    onto: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    products: type[SplitProducts] | type[PlainProducts] | None = None,
) -> torch.Tensor:
    """`onto + scale * x A^T B^T`, added in the adapters' precision and rounded once to the dtype of `onto`.

    Gradients of A and B are summed up in their own dtype, that of x is rounded to x's. Kept for the backward pass: x
    itself and x A^T. Differentiable once.

    Args:
        onto: (..., out). x: (..., in), any shape in front, any dtype. a: (r, in). b: (r -> out) as (out, r).
        products: how to multiply; None takes what the device and the dtypes ask for.
    """
    return _AddLowRank.apply(onto, x, a, b, scale, products or products_for(x, a))


def keep_inputs(denoiser: nn.Module) -> None:
    """Let every low-rank layer that peft has put into the network compute by `add_low_rank`.

    peft keeps the structure, the names and the files. What it can do beyond one plain adapter (several, merged,
    disabled, with dropout or a bias, DoRA) it goes on doing itself, and so does anything under autocast.
    """
    for module in denoiser.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            module.forward = MethodType(_forward, module)


def _forward(self: LoraLayer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    name = _plain_adapter(self)
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # torch knows none on the meta device
    more = self.__dict__.get(_MORE)
    if name is None or args or kwargs or autocast:
        out = type(self).forward(self, x, *args, **kwargs)
        return out if more is None else add_low_rank(out, x, *more, next(iter(self.scaling.values())))
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    if more is not None:  # one product of twice the rank, rounded once
        a, b = torch.cat([a, more[0]]), torch.cat([b, more[1]], dim=1)
    return add_low_rank(self.base_layer(x), x, a, b, self.scaling[name])


def takes_more(module: nn.Module) -> bool:
    """Whether a second adapter can stand beside the module's own: a low-rank linear layer after `keep_inputs`."""
    return (
        isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear) and "forward" in vars(module)
    )


@contextmanager
def beside(module: nn.Module, a: torch.Tensor, b: torch.Tensor) -> Iterator[None]:
    """Let a layer of `takes_more` compute with another adapter beside its own, scaled like it, inside the block.

    Args:
        a: (r, in). b: (out, r). No parameters of the module: nothing saves or trains them.
    """
    module.__dict__[_MORE] = (a, b)
    try:
        yield
    finally:
        del module.__dict__[_MORE]


def _plain_adapter(layer: LoraLayer) -> str | None:
    """Name of the layer's only active adapter, where it is a plain one."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    (name,) = active
    plain = isinstance(layer.lora_dropout[name], nn.Identity) and layer.lora_B[name].bias is None
    return name if plain and name not in getattr(layer, "lora_variant", {}) else None
