"""A frozen denoiser in few bits: the weights of its blocks in 4 or 8, made whole again a layer at a time.

Only storage shrinks. A layer computes with its weight in the input's dtype, which it makes from the codes in the
forward pass and again in the backward pass, and drops at once: what autograd keeps are the codes. Adapters stay in
fp32 beside it.

Which layers: the linear ones of the transformer blocks, 85 % of SDXL's weights and 99 % of FLUX.1's and SD3's (28 % of
SD1.5's, most of which are convolutions). The rest keeps its dtype, since it is small and the whole picture goes through
it: convolutions, the embeddings of time, text and size, the first and last projections. The layers that make a block's
scales, shifts and gates from the timestep (adaLN's) are among the blocks' and are taken, as in the NF4 checkpoints that
people train on: diffusers' BitsAndBytesConfig takes every linear layer (quantizers/bitsandbytes/utils.py), and in
FLUX.1 these alone would take 6.0 GiB in bf16, more than all the rest in NF4. (fp8 without scales is another matter:
diffusers' layerwise casting leaves out `norm` and `pos_embed`, see `_skip_layerwise_casting_patterns`.)

Root mean square error of normally distributed weights, relative to theirs: NF4 9.2 %, fp8 2.6 %, int8 0.8 to 0.9 %,
which grows with the largest weight of a row.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rsaft_fast.errors import UserError
from rsaft_fast.memory.offload import transformer_blocks

Quantization = Literal["nf4", "int8", "fp8"]
Stored = dict[str, torch.Tensor]
"""What a layer keeps in place of its weight, by name; "weight" holds the codes."""


class Int8:
    """Whole numbers -127 to 127 times a scale in fp32 for each output channel, its largest weight / 127."""

    @staticmethod
    def encode(weight: torch.Tensor) -> Stored:
        scale = weight.abs().amax(1, keepdim=True).float() / 127
        codes = (weight.float() / _not_zero(scale)).round_().to(torch.int8)
        return {"weight": codes, "scale": scale}

    @staticmethod
    def decode(stored: Stored, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        # A code is exact in every dtype, and the product is rounded to it once.
        return stored["weight"].to(dtype).mul_(stored["scale"])


class Fp8:
    """e4m3 numbers times a scale in fp32 for each output channel, its largest weight / 448 (e4m3's largest number)."""

    @staticmethod
    def encode(weight: torch.Tensor) -> Stored:
        scale = weight.abs().amax(1, keepdim=True).float() / 448
        return {"weight": (weight.float() / _not_zero(scale)).to(torch.float8_e4m3fn), "scale": scale}

    decode = Int8.decode


class NF4:
    """NF4 of bitsandbytes (QLoRA, arXiv 2305.14314): 4.13 bits a weight.

    16 quantiles of a normal distribution times the largest weight of 64, which is itself kept in 8 bits.
    """

    BLOCK, ABSMAX_BLOCK = 64, 256

    @staticmethod
    def encode(weight: torch.Tensor) -> Stored:
        bnb = _bitsandbytes()
        weight = weight.float() if weight.dtype == torch.float64 else weight  # which bitsandbytes does not know
        codes, state = bnb.quantize_4bit(weight, blocksize=NF4.BLOCK, quant_type="nf4", compress_statistics=False)
        offset = state.absmax.mean()
        absmax, nested = bnb.quantize_blockwise(
            state.absmax - offset, code=_dynamic_map(weight.device), blocksize=NF4.ABSMAX_BLOCK
        )
        return {"weight": codes, "absmax": absmax, "absmax_scale": nested.absmax, "absmax_offset": offset}

    @staticmethod
    def decode(stored: Stored, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        bnb, codes = _bitsandbytes(), stored["weight"]
        absmax = bnb.dequantize_blockwise(
            stored["absmax"],
            absmax=stored["absmax_scale"],
            code=_dynamic_map(codes.device),
            blocksize=NF4.ABSMAX_BLOCK,
        ).add_(stored["absmax_offset"])
        made = torch.float32 if dtype == torch.float64 else dtype
        state = bnb.QuantState(absmax=absmax, shape=shape, dtype=made, blocksize=NF4.BLOCK, quant_type="nf4")
        return bnb.dequantize_4bit(codes, state).to(dtype)


FORMATS = {"nf4": NF4, "int8": Int8, "fp8": Fp8}


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _bitsandbytes():
    from bitsandbytes import functional as bnb

    return bnb


@cache
def _dynamic_map(device: torch.device) -> torch.Tensor:
    """bitsandbytes' 8-bit numbers. Its own copy of them stays on the device that asked first, "meta" too."""
    return _bitsandbytes().create_dynamic_map().to(device)


def why_not(quantization: Quantization) -> str | None:
    """Why these weights cannot be had here; None where they can."""
    if quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return 'bitsandbytes is not installed: pip install "rsaft_fast[low-bit]"'
    if quantization == "fp8" and not hasattr(torch, "float8_e4m3fn"):
        return f"torch {torch.__version__} has no float8_e4m3fn: use int8"
    return None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept as codes. Otherwise as `nn.Linear`, and differentiable in its input.

    Codes and scales are an ordinary parameter and ordinary buffers, unlike those of bitsandbytes' `Linear4bit`: they
    move, are copied, counted and streamed as any other. They keep their dtypes whatever the module is cast to.

    Attributes:
        quantization: of its weight. compute_dtype: that of the weight before; peft gives it to adapters.
        weight: the codes, in whatever shape the format has them.
    """

    def __init__(self, layer: nn.Linear, quantization: Quantization, device: torch.device | str | None = None):
        """Of a layer, on its own device or another: its weight is encoded there."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.quantization = quantization
        self.compute_dtype = layer.weight.dtype
        with torch.no_grad():
            stored = FORMATS[quantization].encode(layer.weight.detach().to(device))
            bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        self.weight = nn.Parameter(stored.pop("weight"), requires_grad=False)
        self.names = ("weight", *stored)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    def stored(self) -> Stored:
        """The codes and their scales."""
        return {name: getattr(self, name) for name in self.names}

    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight that it computes with, (out, in)."""
        shape = torch.Size((self.out_features, self.in_features))
        return FORMATS[self.quantization].decode(self.stored(), shape, dtype or self.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _FrozenLinear.apply(x, bias, self.quantization, self.out_features, self.names, *self.stored().values())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quantization}"

    def reset_parameters(self) -> None:
        raise NotImplementedError("a quantised layer's weight is not drawn: draw the layer's that it is made of")

    def _apply(self, fn, recurse=True):
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias that keeps the codes of W alone. It keeps the tensors, not the layer: a streamed layer's are others
    at the next call."""

    @staticmethod
    def forward(ctx, x, bias, quantization, out_features, names, *tensors):
        ctx.quantization, ctx.names = quantization, names
        ctx.shape = torch.Size((out_features, x.shape[-1]))
        ctx.save_for_backward(*tensors)
        return functional.linear(x, _FrozenLinear._weight(ctx, tensors, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.matmul(_FrozenLinear._weight(ctx, ctx.saved_tensors, grad.dtype))
        return grad_x, None, None, None, None, *(None for _ in ctx.names)

    @staticmethod
    def _weight(ctx, tensors, dtype):
        return FORMATS[ctx.quantization].decode(dict(zip(ctx.names, tensors)), ctx.shape, dtype)


def quantize_denoiser(
    denoiser: nn.Module, quantization: Quantization, device: torch.device | str | None = None
) -> None:
    """Replace the linear layers of the denoiser's blocks, one at a time.

    Args:
        denoiser: frozen or to be so, in its final dtype, on the host or wherever it is; "meta" gives shapes alone.
        device: where layers are encoded and stay: of the weights in their own dtype, no more than one layer is ever
            there. The rest of the denoiser is left where it is. None is where they are.

    Raises:
        UserError: a package or dtype that is missing here.
    """
    obstacle = why_not(quantization)
    if obstacle is not None:
        raise UserError(f"backbone.quantize is {quantization}, but {obstacle}")
    for block in transformer_blocks(denoiser).values():
        linears = [name for name, module in block.named_modules() if type(module) is nn.Linear]
        for name in linears:
            parent, _, child = name.rpartition(".")
            setattr(
                block.get_submodule(parent), child, QuantizedLinear(block.get_submodule(name), quantization, device)
            )
