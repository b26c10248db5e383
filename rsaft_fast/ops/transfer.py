"""Page-locked host memory, and copies between it and the device that run beside the computation.

Every function works on any device: without CUDA the copies are real and happen at once, so that what the CPU's tests
see is what the GPU does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

ALIGNMENT = 256
"""Bytes: where a packed tensor may begin. As the CUDA allocator's smallest promise; kernels want 16."""


class Place(NamedTuple):
    """Place of a tensor in a packed buffer: offset, shape, strides and dtype."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Packing:
    """Layout of tensors side by side in one buffer, so that one copy moves them all.

    Args:
        tensors: dense ones, of any shapes and dtypes; only their looks are read.

    Attributes:
        nbytes: of the buffer.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self.places: list[Place] = []
        self.nbytes = 0
        for tensor in tensors:
            self.places.append(Place(self.nbytes, tensor.shape, tensor.stride(), tensor.dtype))
            size = tensor.numel() * tensor.element_size()
            self.nbytes += -(-size // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """View the tensors in a uint8 buffer of `nbytes`, which they share; it lives as long as any of them."""
        return [_view(buffer, place) for place in self.places]


def _view(buffer: torch.Tensor, place: Place) -> torch.Tensor:
    size = place.shape.numel() * place.dtype.itemsize
    return buffer[place.offset : place.offset + size].view(place.dtype).as_strided(place.shape, place.stride)


def host_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """Allocate uninitialised uint8 memory beside `device`: page-locked for a GPU; "meta" has shapes alone.

    Raises:
        RuntimeError: the driver would not lock so much.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8, device="meta" if device.type == "meta" else "cpu")
    if device.type == "cuda" and nbytes:
        _lock_pages(buffer)
    return buffer


def _lock_pages(buffer: torch.Tensor) -> None:
    # Registered where it lies: torch's own pinned allocator rounds sizes up to powers of two, up to twice the memory.
    runtime: Any = torch.cuda.cudart()
    address = buffer.data_ptr()
    error = int(runtime.cudaHostRegister(address, buffer.numel(), 0))
    if error:
        raise RuntimeError(
            f"{buffer.numel() / 2**30:.2f} GiB of host memory could not be page-locked (CUDA error {error}): offload "
            "less, or free host memory"
        )
    weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address).atexit = False


class CopyStream:
    """Copies that run in order beside the computation: a CUDA stream of its own; elsewhere each is done at once."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, after: Sequence[torch.cuda.Event | None] = ()
    ) -> torch.cuda.Event | None:
        """Copy once the events have come; return the event of its end.

        One side must be page-locked, or it waits.
        """
        if self._stream is None:
            target.copy_(source)
            return None
        for event in after:
            if event is not None:
                self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            end: Any = self._stream.record_event()  # which torch types by its base class
            return end

    def synchronize(self) -> None:
        """Let the host wait for all copies so far."""
        if self._stream is not None:
            self._stream.synchronize()


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Record an event that comes when the computation has got to here."""
    stream: Any = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return None if stream is None else stream.record_event()


def wait_for(event: torch.cuda.Event | None, device: torch.device) -> None:
    """Let the computation go on from here only once the event has come; the host does not wait."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)
