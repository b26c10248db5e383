"""A decoder walked by hand, picture by picture: what is kept on the way, and its backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from rsaft_fast.memory.strips import Upsample


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


class StripDecoder:
    """Decoder as chains, one for each resolution, and what to keep on the way through them."""

    def __init__(self, segments: list[Chain], widest: int):
        """
        Args:
            segments: of one resolution each.
            widest: most channels of the last one.
        """
        self.segments, self.widest = segments, widest

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
    def forward(ctx, latents: torch.Tensor, walk: StripDecoder) -> torch.Tensor:
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


def decode(walk: StripDecoder, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, C, h, w) to (B, 3, H, W), with a gradient where one is wanted."""
    if torch.is_grad_enabled() and latents.requires_grad:
        return _Decode.apply(latents, walk)
    with torch.no_grad():
        return walk.images(latents)


def modules_between(decoder: nn.Module, middle: type[nn.Module], block: type[nn.Module]) -> Iterator[nn.Module]:
    """List the modules between `conv_in` and the tail: resnets, attentions and upsamplers of the known kinds.

    Args:
        middle, block: classes of the middle and of an upsampling block that are taken apart; another is one module.
    """
    mid = decoder.mid_block
    if is_plain(mid, middle):
        yield mid.resnets[0]
        for attention, resnet in zip(mid.attentions, mid.resnets[1:]):
            yield from (resnet,) if attention is None else (attention, resnet)
    else:
        yield mid
    for part in decoder.up_blocks:
        if is_plain(part, block):
            yield from (*part.resnets, *(part.upsamplers or ()))
        else:
            yield part


def segments(first: Layer, layers: Iterable[Layer], tail: Layer) -> list[Chain]:
    """Split a decoder's layers by resolution.

    A layer after an upsampling takes it into itself: of the two, the input that is kept is the smaller one.
    """
    found = [Chain([first])]
    for layer in (*layers, tail):
        own = found[-1].layers
        if isinstance(layer, Upsample):
            found.append(Chain([layer]))
        elif len(own) == 1 and isinstance(own[0], Upsample):
            own[0] = Chain([own[0], layer])
        else:
            own.append(layer)
    return found


def only_latents(decoder: nn.Module, device: torch.device) -> bool:
    """Tell whether nothing but the latents could want a gradient, nothing random is drawn, and nothing is cast."""
    drawn = decoder.training and any(m.p > 0 for m in decoder.modules() if isinstance(m, nn.Dropout))
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters())
    casts = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return not (drawn or trained or casts)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a module is of that class itself, without hooks or another forward."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module) is kind and "forward" not in module.__dict__ and not any(hooks)
