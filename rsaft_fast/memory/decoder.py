"""Exact backward through a diffusers VAE decoder in a fraction of the memory: `backbone.checkpoint: decoder-strips`.

The decoder is walked by hand, picture by picture, as a chain of layers that work in row strips (`memory.strips`), so
that no layer needs a full-size tensor beside its input, its output and, in a resnet, the one between. Of a forward pass
only what each resolution starts from is kept, and of the last resolution each layer's input; backward, one resolution
after the other is recomputed from its start, every gradient is written over the activation that it belongs to, and
everything is dropped after its last use.

For the decoder that SD1.5, SDXL, SD3 and FLUX.1 share, at 1024x1024 in bf16: 1.4 GiB at the peak, whatever the batch,
where checkpointing per resnet takes 4.9 GiB a picture. Tiling takes less, but normalises each tile by itself, which is
another function with another gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.autograd.function import once_differentiable

from rsaft_fast.errors import UserError
from rsaft_fast.memory.checkpointing import Checkpointing, ReplacedForward
from rsaft_fast.memory.strips import STRIP_ELEMENTS, NormSiluConv, Recomputed, Resnet, Tail, Upsample


class Layer(Protocol):
    """Layer of one picture (1, C, H, W).

    `backward` may write over x, which is not used again.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    def backward(self, x: torch.Tensor, gradient: torch.Tensor, room: int) -> torch.Tensor: ...


class Chain:
    """Sequence of layers; a layer itself."""

    def __init__(self, layers: list[Layer]):
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # By single layers: a chain within would hold its input to its end.
        for layer in self.single_layers():
            x = layer.forward(x)
        return x

    def single_layers(self) -> Iterator[Layer]:
        for layer in self.layers:
            yield from layer.single_layers() if isinstance(layer, Chain) else (layer,)

    def inputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Compute the input of every layer; the last layer is not run."""
        found = [x]
        for layer in self.layers[:-1]:
            found.append(layer.forward(found[-1]))
        return found

    def backward(self, x: torch.Tensor, gradient: torch.Tensor, room: int) -> torch.Tensor:
        return self.backward_from(self.inputs(x), gradient, room)

    def backward_from(self, inputs: list[torch.Tensor], gradient: torch.Tensor, room: int) -> torch.Tensor:
        """Compute the gradient at the input from all layers' inputs; `inputs` is emptied from its end."""
        for layer in reversed(self.layers):
            x = inputs.pop()
            gradient = layer.backward(x, gradient, room - sum(t.numel() for t in inputs))
        return gradient


class _StripDecoder:
    """Decoder as chains, one for each resolution, and what to keep on the way through them."""

    def __init__(self, decoder: Decoder, strip_elements: int):
        self.segments = _segments(decoder, strip_elements)
        norms = [m.num_channels for m in decoder.up_blocks[-1].modules() if isinstance(m, nn.GroupNorm)]
        self.widest = max([decoder.conv_out.in_channels, *norms])

    def images(self, latents: torch.Tensor, last: _KeptActivations | None = None) -> torch.Tensor:
        """Decode one picture after the other; of the last one, `last` keeps what its backward pass starts from."""
        images = None
        for index in _pictures(latents):
            if last is not None and index == len(latents) - 1:
                self.keep(_picture(latents, index), last)
                image = self.segments[-1].layers[-1].forward(last.inputs[-1])
            else:
                image = Chain(self.segments).forward(_picture(latents, index))
            if images is None:
                images = latents.new_empty((len(latents), *image.shape[1:]))
            images[index] = image[0]
            del image
        return images

    def keep(self, x: torch.Tensor, kept: _KeptActivations) -> None:
        """Run all but the last layer, and keep the inputs of each chain."""
        for segment in self.segments[:-1]:
            kept.starts.append(x)
            x = segment.forward(x)
        kept.inputs = self.segments[-1].inputs(x)

    def latent_gradient(self, kept: _KeptActivations, gradient: torch.Tensor) -> torch.Tensor:
        """Compute the gradient at one picture's latent; `kept` is emptied."""
        # What the first resnet of the last resolution cannot do without: its input and two tensors of half the size,
        # beside what the resolution starts from. Others may fill up to that with what saves them time.
        room = kept.inputs[0].numel() + 2 * self.widest * gradient[0, 0].numel()
        gradient = self.segments[-1].backward_from(kept.inputs, gradient, room)
        for segment in reversed(self.segments[:-1]):
            gradient = segment.backward(kept.starts.pop(), gradient, room)
        return gradient


class _KeptActivations:
    """Activations of one picture that wait for its backward pass.

    Attributes:
        starts: the input of every resolution but the last. inputs: of every layer of the last.
    """

    def __init__(self):
        self.starts: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []


def _pictures(batch: torch.Tensor) -> range:
    """Choose the pictures to decode.

    Where shapes alone count, two show what all of them take, and estimates stay quick.
    """
    return range(max(0, len(batch) - 2) if batch.is_meta else 0, len(batch))


def _picture(batch: torch.Tensor, index: int) -> torch.Tensor:
    return batch[index : index + 1].contiguous(memory_format=torch.channels_last)


class _Decode(torch.autograd.Function):
    """Decoder of one call's pictures, (B, C, h, w) -> (B, 3, H, W).

    One picture's activations are alive at a time: the last one's stay from the forward to the backward pass, where the
    others are decoded again.
    """

    @staticmethod
    def forward(ctx, latents: torch.Tensor, walk: _StripDecoder) -> torch.Tensor:
        ctx.walk, ctx.kept = walk, _KeptActivations()
        ctx.save_for_backward(latents)
        return walk.images(latents, ctx.kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        (latents,) = ctx.saved_tensors
        found = torch.empty_like(latents)
        for index in reversed(_pictures(latents)):
            kept, ctx.kept = ctx.kept, None
            if kept is None:
                kept = _KeptActivations()
                ctx.walk.keep(_picture(latents, index), kept)
            found[index] = ctx.walk.latent_gradient(kept, _picture(gradient, index))[0]
        return found, None


def _segments(decoder: Decoder, strip_elements: int) -> list[Chain]:
    """Split the decoder's layers by resolution.

    A layer after an upsampling takes it into itself: of the two, the input that is kept is the smaller one.
    """
    segments = [Chain([Recomputed(decoder.conv_in)])]

    def append(layer: Layer) -> None:
        layers = segments[-1].layers
        if len(layers) == 1 and isinstance(layers[0], Upsample):
            layers[0] = Chain([layers[0], layer])
        else:
            layers.append(layer)

    for module in _modules(decoder):
        layer = _layer(module, strip_elements)
        if isinstance(layer, Upsample):
            segments.append(Chain([layer]))
        else:
            append(layer)
    append(_tail(decoder, strip_elements))
    return segments


def _modules(decoder: Decoder) -> Iterator[nn.Module]:
    """List the modules between `conv_in` and the tail: resnets, attentions and upsamplers of the known kinds."""
    mid = decoder.mid_block
    if _is_plain(mid, UNetMidBlock2D):
        yield mid.resnets[0]
        for attention, resnet in zip(mid.attentions, mid.resnets[1:]):
            yield from (resnet,) if attention is None else (attention, resnet)
    else:
        yield mid
    for block in decoder.up_blocks:
        if _is_plain(block, UpDecoderBlock2D):
            yield from (*block.resnets, *(block.upsamplers or ()))
        else:
            yield block


def _layer(module: nn.Module, strip_elements: int) -> Layer:
    if _is_plain(module, ResnetBlock2D):
        parts = _resnet_parts(module)
        if parts is not None:
            first, second, shortcut = parts
            return Resnet(NormSiluConv(*first, strip_elements), NormSiluConv(*second, strip_elements), shortcut)
    if _is_plain(module, Upsample2D):
        as_known = (module.use_conv, module.use_conv_transpose, module.norm, module.interpolate, module.name)
        if as_known == (True, False, None, True, "conv") and _is_3x3(module.conv):
            return Upsample(module.conv, strip_elements)
    if isinstance(module, Attention | Upsample2D):
        return Recomputed(module)
    return Recomputed(partial(_with_no_embedding, module))


def _resnet_parts(resnet: ResnetBlock2D) -> tuple | None:
    """Give a resnet's two layers and its shortcut; None if it is of another kind."""
    known = (
        resnet.time_emb_proj is None
        and resnet.time_embedding_norm in ("default", "group")  # without an embedding the same
        and resnet.upsample is None
        and resnet.downsample is None
        and resnet.output_scale_factor == 1
        and not (resnet.training and resnet.dropout.p > 0)
        and _is_plain(resnet.nonlinearity, nn.SiLU)
        and _is_norm(resnet.norm1)
        and _is_norm(resnet.norm2)
        and _is_3x3(resnet.conv1)
        and _is_3x3(resnet.conv2)
        and (resnet.conv_shortcut is None or _is_1x1(resnet.conv_shortcut))
    )
    return ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2), resnet.conv_shortcut) if known else None


def _tail(decoder: Decoder, strip_elements: int) -> Layer:
    norm, activation, conv = decoder.conv_norm_out, decoder.conv_act, decoder.conv_out
    if _is_norm(norm) and _is_plain(activation, nn.SiLU) and _is_3x3(conv):
        return Tail(NormSiluConv(norm, conv, strip_elements))
    return Recomputed(nn.Sequential(norm, activation, conv))


def _with_no_embedding(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, None)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a module is of that class itself, without hooks or another forward."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module) is kind and "forward" not in module.__dict__ and not any(hooks)


def _is_norm(module: nn.Module) -> bool:
    return _is_plain(module, nn.GroupNorm) and module.affine


def _is_3x3(module: nn.Module) -> bool:
    return _is_conv(module, (3, 3), (1, 1))


def _is_1x1(module: nn.Module) -> bool:
    return _is_conv(module, (1, 1), (0, 0))


def _is_conv(module: nn.Module, kernel: tuple[int, int], padding: tuple[int, int]) -> bool:
    if not _is_plain(module, nn.Conv2d):
        return False
    found = (module.kernel_size, module.padding, module.stride, module.dilation, module.groups, module.padding_mode)
    return found == (kernel, padding, (1, 1), (1, 1), 1, "zeros")


class StripForward(ReplacedForward):
    """Stand-in for the decoder's `forward`, in strips."""

    def __init__(self, module: nn.Module, strip_elements: int):
        super().__init__(module)
        self.strip_elements = strip_elements

    def __call__(self, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None) -> torch.Tensor:
        if latent_embeds is not None or not self._is_frozen() or _autocast(sample.device):
            return self.run(sample, latent_embeds)
        walk = _StripDecoder(self.module, self.strip_elements)
        if torch.is_grad_enabled() and sample.requires_grad:
            return _Decode.apply(sample, walk)
        with torch.no_grad():
            return walk.images(sample)

    def _is_frozen(self) -> bool:
        """Tell whether nothing but the latents could want a gradient, and nothing random is drawn."""
        drawn = self.module.training and any(m.p > 0 for m in self.module.modules() if isinstance(m, nn.Dropout))
        return not drawn and not (torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()))


def _autocast(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def decode_in_strips(vae: nn.Module, strip_elements: int = STRIP_ELEMENTS) -> Checkpointing:
    """Let a diffusers `AutoencoderKL` decode in row strips, with a backward pass that recomputes all it can.

    Images and latent gradients are those of the plain decoder to rounding. A layer that is not as SD1.5, SDXL, SD3 and
    FLUX.1 have it (another activation, a hook, an adapter) runs as it is and is recomputed as a whole. Where more than
    the latents' gradient may be wanted (trained decoder weights, dropout in training, autocast), the plain decoder
    runs. The backward pass cannot itself be differentiated.

    Args:
        strip_elements: of the widest strip.

    Returns:
        a handle whose `remove()` undoes it; also a context manager.

    Raises:
        UserError: the VAE has another decoder.
    """
    decoder = getattr(vae, "decoder", None)
    if type(decoder) is not Decoder:
        raise UserError(
            f"backbone.checkpoint decoder-strips: this VAE ({type(vae).__name__}) decodes by "
            f"{type(decoder).__name__}, and diffusers' AutoencoderKL decoder alone is known; use decoder instead"
        )
    return Checkpointing([decoder], partial(StripForward, strip_elements=strip_elements))
