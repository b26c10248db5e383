"""Frozen blocks of a denoiser in host memory, streamed to the device just before each use.

A streamed block's weights lie in one page-locked buffer on the host. Its forward pass, and the recomputation of it in
the backward pass, copy that buffer to the device and compute with views of the copy; the copy of the block that comes
next runs meanwhile on a stream of its own. Nothing is copied back: frozen weights are never written.

The copy belongs to whoever computes with it. Under checkpointing the forward pass drops it at the block's end; in the
backward pass the recomputed graph saves views of it, and it dies with the last of them, when the block's gradient is
done. So at most `buffers` copies are alive at once, and no gradient can meet other weights than its forward pass had
(which is what goes wrong where a module's `param.data` is swapped under a graph).

What it costs: each network call moves the streamed bytes once, and each backward pass once more. FLUX.1 in bf16 has
22.0 GiB in 57 blocks; all of them at 50 GB/s (PCIe 5) take 0.47 s a call, at 25 GB/s (PCIe 4) 0.95 s, hidden behind the
computation of the blocks as far as that takes as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rsaft_fast.errors import UserError
from rsaft_fast.ops.transfer import CopyStream, Packing, host_buffer, record_event, wait_for

BUFFERS = 2
"""Copies alive at once: the block that computes, and the one that comes next."""


def transformer_blocks(denoiser: nn.Module) -> dict[str, nn.Module]:
    """List the blocks that can be streamed, by name.

    They are the entries of every list called `*transformer_blocks`, and of those whose class diffusers calls repeated:
    these are what diffusers checkpoints one by one, and hold nearly all weights: 57 with 99 % of them in FLUX.1, 24 or
    38 in SD3 and 3.5, 34 in Z-Image, 70 with 85 % in SDXL's UNet (inside its down, mid and up blocks).
    """
    repeated = getattr(denoiser, "_repeated_blocks", None) or ()

    def holds_blocks(name: str, module: nn.Module) -> bool:
        if name.endswith("transformer_blocks"):
            return True
        kinds = {type(block).__name__ for block in module} if isinstance(module, nn.ModuleList) else set()
        return bool(kinds) and kinds <= {*repeated}

    lists = {name: m for name, m in denoiser.named_modules() if holds_blocks(name, m)}
    return {f"{name}.{i}": block for name, blocks in lists.items() for i, block in enumerate(blocks)}


def spread(count: int, among: int) -> list[int]:
    """Choose `count` of `among` places, evenly: a copy then has the time of as many resident blocks as possible."""
    return [(2 * i + 1) * among // (2 * count) for i in range(count)]


class _Block:
    """Block whose parameters and buffers lie in one host buffer."""

    def __init__(self, name: str, module: nn.Module, device: torch.device):
        self.name = name
        holders = [(held, key) for m in module.modules() for held in (m._parameters, m._buffers) for key in held]
        self.slots = [(held, key) for held, key in holders if held[key] is not None]
        tensors = [held[key] for held, key in self.slots]
        for tensor in tensors:
            _check_plain(name, tensor)
        self.packing = Packing(tensors)
        self.host = host_buffer(self.packing.nbytes, device)
        self.kept: list[torch.Tensor] = []
        for (held, key), view in zip(self.slots, self.packing.views(self.host)):
            view.copy_(held[key])
            kept = nn.Parameter(view, requires_grad=False) if isinstance(held[key], nn.Parameter) else view
            held[key] = kept
            self.kept.append(kept)

    @contextmanager
    def computing_with(self, buffer: torch.Tensor) -> Iterator[None]:
        """Let the module's tensors be views of this buffer, inside the `with` block."""
        for (held, key), view in zip(self.slots, self.packing.views(buffer)):
            held[key] = view
        try:
            yield
        finally:
            for (held, key), kept in zip(self.slots, self.kept):
                held[key] = kept


def _check_plain(name: str, tensor: torch.Tensor) -> None:
    if tensor.requires_grad:
        raise UserError(f"{name} is trained, and offloaded blocks are never written: offload before adapters attach")
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        raise UserError(
            f"{name} holds a {type(tensor).__name__}, which is more than its bytes: such a block cannot be offloaded"
        )


class OffloadedBlocks:
    """Evenly spread blocks of a frozen denoiser, streamed from the host. Attach before adapters and checkpointing.

    Everything else of the denoiser is moved to the device.

    Args:
        denoiser: a diffusers transformer or UNet, frozen, in its final dtype, wherever its weights are.
        count: how many of its `transformer_blocks`. device: where it computes.
        buffers: copies that may be alive at once: one computes, the others are on their way.

    Attributes:
        names: of the streamed blocks, in the order of the first call.
        host: their host buffers. fetches: how many copies to the device there have been.

    Raises:
        UserError: more blocks than there are, or weights that are trained or more than plain tensors.
    """

    def __init__(self, denoiser: nn.Module, count: int, device: torch.device | str, buffers: int = BUFFERS):
        self.device = torch.device(device)
        self.ahead = buffers - 1
        found = transformer_blocks(denoiser)
        if not 1 <= count <= len(found):
            raise UserError(
                f"backbone.offload_blocks is {count}; this {type(denoiser).__name__} has {len(found)} that can be "
                f"streamed; set it from 0 to {len(found)}"
            )
        chosen = [list(found.items())[i] for i in spread(count, len(found))]
        with torch.no_grad():
            self._blocks = [_Block(name, module, self.device) for name, module in chosen]
            self._move_the_rest(denoiser)
        self.host = [block.host for block in self._blocks]
        self.fetches = 0
        self._copies = CopyStream(self.device)
        self._coming: dict[int, tuple[torch.Tensor, Any]] = {}
        # Registration order to begin with (a UNet registers its middle last); after a call, the order it had.
        self._order = list(range(count))
        self._called: list[int] = []
        for index, (_, module) in enumerate(chosen):
            module.forward = _StreamedForward(self, index, module)
        denoiser.register_forward_pre_hook(lambda *_: self._begin_call())
        denoiser.register_forward_hook(lambda module, args, output: self._end_call(output))

    @property
    def names(self) -> list[str]:
        return [self._blocks[index].name for index in self._order]

    def _move_the_rest(self, denoiser: nn.Module) -> None:
        streamed = {id(tensor) for block in self._blocks for tensor in block.kept}
        for module in denoiser.modules():
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is None or id(tensor) in streamed or tensor.device == self.device:
                        continue
                    if isinstance(tensor, nn.Parameter):
                        tensor.data = tensor.data.to(self.device)
                    else:
                        held[key] = tensor.to(self.device)

    @contextmanager
    def weights_of(self, index: int) -> Iterator[None]:
        """Let the block compute with a copy on the device, while the next blocks' weights are copied."""
        buffer, arrived = self._coming.pop(index, None) or self._fetch(index)
        wait_for(arrived, self.device)
        with torch.no_grad():
            self._look_ahead(index)
        if not _in_backward():
            self._called.append(index)
        with self._blocks[index].computing_with(buffer):
            del buffer  # the views keep it, and nothing else does
            yield

    def _fetch(self, index: int) -> tuple[torch.Tensor, Any]:
        block = self._blocks[index]
        with torch.no_grad():
            buffer = torch.empty(block.packing.nbytes, dtype=torch.uint8, device=self.device)
            # The memory may be that of a tensor that kernels still in the queue read.
            arrived = self._copies.copy(buffer, block.host, after=[record_event(self.device)])
        self.fetches += 1
        return buffer, arrived

    def _look_ahead(self, index: int) -> None:
        place = self._order.index(index)
        before, after = self._order[:place][::-1], self._order[place + 1 :]
        self._expect((before if _in_backward() else after)[: self.ahead])

    def _expect(self, indices: list[int]) -> None:
        for index in [i for i in self._coming if i not in indices]:
            # Its memory goes back to the computation's pool, so that must not run ahead of the copy.
            wait_for(self._coming.pop(index)[1], self.device)
        for index in indices:
            if index not in self._coming:
                self._coming[index] = self._fetch(index)

    def _begin_call(self) -> None:
        self._called = []
        self._expect(self._order[: self.ahead])

    def _end_call(self, output: Any) -> None:
        if sorted(self._called) == sorted(self._order):
            self._order = self._called
        self._expect([])
        first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        if first.requires_grad:  # the last block's weights come while what follows it goes backward
            first.register_hook(lambda grad: self._expect(self._order[::-1][: self.ahead]))


def _in_backward() -> bool:
    """Tell whether this is a recomputation: autograd runs a graph in this thread."""
    return torch._C._current_graph_task_id() != -1


class _StreamedForward:
    """Stand-in for a block's `forward`, between the arrival of its weights and their end."""

    def __init__(self, stream: OffloadedBlocks, index: int, module: nn.Module):
        self.stream, self.index = stream, index
        self.inner: Callable[..., Any] = module.forward

    @torch.compiler.disable(reason="the weights are others at each call")
    def __call__(self, *args, **kwargs):
        with self.stream.weights_of(self.index):
            return self.inner(*args, **kwargs)
