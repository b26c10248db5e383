"""Optimizer state in host memory: streamed through the device part by part, around the same kernels.

A bucket's parameters are split into parts of about `PART` bytes of state. A part's moments (and float32 masters) lie in
one page-locked host buffer and pass through one staging buffer on the device: copied in on one stream, used by the
kernels in place, copied out on another. With `BUFFERS` staging buffers a copy in, a kernel and a copy out run at once,
since PCIe carries both directions. The arithmetic is that of state on the device, to the bit.

What a step moves, each way: 8 bytes a parameter for float32 moments, 2.03 for 8-bit ones, 4 more with a float32 master,
which perturbing reads once more. SDXL (2.57e9 parameters) with 8-bit moments: 5.2 GB each way, at 50 GB/s (PCIe 5) both
at once in 0.10 s, one after the other in 0.21. FLUX.1 (11.9e9): 24 GB, 0.5 to 1 s. A step waits for its last copy out,
and the host for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rsaft_fast import ops
from rsaft_fast.ops.transfer import CopyStream, Packing, host_buffer, record_event, wait_for
from rsaft_fast.optim.buckets import Bucket
from rsaft_fast.optim.moments import empty_state, fit_state

PART = 64 * 2**20
"""Bytes of state: copying them takes 1.3 ms at 50 GB/s, a thousand times what starting the copy does."""

BUFFERS = 3
"""On the device: one coming, one in use, one leaving."""


def split(sizes: Sequence[int], limit: int) -> list[range]:
    """Split consecutive items into ranges of at most `limit` bytes; a larger item has a range of its own."""
    ranges, first, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > limit:
            ranges.append(range(first, index))
            first, total = index, 0
        total += size
    return [*ranges, range(first, len(sizes))] if sizes else []


@dataclass
class _Slot:
    """Staging buffer, and the event after which it may be overwritten."""

    buffer: torch.Tensor
    free: Any = None


@dataclass(eq=False)
class Part:
    """Parameters of a bucket whose state travels together.

    Attributes:
        members: their indices in the bucket. table: of them, with step counts and sums shared with the bucket's.
        host: their state, packed. left: how many wait for a gradient that is released.
    """

    members: range
    table: ops.TensorTable
    packing: Packing
    names: tuple[str, ...]
    host: torch.Tensor
    slot: Any = None  # a _Slot while it has a place on the device
    arrived: Any = None
    written: bool = False
    left: set[int] = field(default_factory=set)

    def host_views(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        """List index in the bucket, name and memory of every tensor of state."""
        owners = [(index, name) for name in self.names for index in self.members]
        for (index, name), view in zip(owners, self.packing.views(self.host)):
            yield index, name, view

    def staged_lists(self) -> dict[str, list[torch.Tensor]]:
        """Give the state on the device, as the table's lists."""
        views = self.packing.views(self.slot.buffer[: self.packing.nbytes])
        count = len(self.members)
        return {name: views[i * count : (i + 1) * count] for i, name in enumerate(self.names)}


class Staging:
    """Staging buffers of one optimizer: taken from the allocator when a pass begins, given back when it ends."""

    def __init__(self, device: torch.device, buffers: int = BUFFERS):
        self.device, self.buffers = device, buffers
        self.size = 0
        self._inward, self._outward = CopyStream(device), CopyStream(device)
        self._idle: deque[_Slot] = deque()
        self._made = 0

    def reserve(self, parts: int) -> None:
        """Allocate the buffers now: where there is no memory, nothing has been touched yet."""
        while self._made < min(self.buffers, parts):
            self._idle.append(self._new())

    @property
    def has_room(self) -> bool:
        """Tell whether a part can be begun without more memory than was planned."""
        return bool(self._idle) or self._made < self.buffers

    def _new(self) -> _Slot:
        self._made += 1
        return _Slot(torch.empty(self.size, dtype=torch.uint8, device=self.device))

    def take(self, part: Part) -> None:
        """Give a part its place on the device: addresses are known from here on."""
        # More than were reserved only where released gradients come in so mixed an order that more parts are in use.
        part.slot = self._idle.popleft() if self._idle else self._new()
        part.written = False

    def begin(self, part: Part) -> None:
        """Start to copy a part to its place."""
        target = part.slot.buffer[: part.packing.nbytes]
        part.arrived = self._inward.copy(target, part.host, after=[part.slot.free, record_event(self.device)])

    def end(self, part: Part) -> None:
        """Copy a part out if it was written; its buffer goes to the next."""
        wait_for(part.arrived, self.device)
        part.slot.free = record_event(self.device)
        if part.written:
            source = part.slot.buffer[: part.packing.nbytes]
            part.slot.free = self._outward.copy(part.host, source, after=[part.slot.free])
        self._idle.append(part.slot)
        part.slot = part.arrived = None

    def close(self) -> None:
        """End the pass: what the computation does next may have the buffers' memory."""
        for slot in self._idle:
            wait_for(slot.free, self.device)
        self._made -= len(self._idle)
        self._idle.clear()

    def synchronize(self) -> None:
        """Wait until the host can read what was copied."""
        self._outward.synchronize()


class OffloadedBucket(Bucket):
    """Bucket whose state is on the host.

    Its own table knows weights, gradients and backups, and the norm's slots.
    """

    staging: Staging

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.parts: list[Part] = []
        self._part_of: dict[int, Part] = {}
        self._arrivals: list[Part] = []
        self._opened_now: list[Part] = []

    def bind_state(self, names: tuple[str, ...], states: list[dict[str, torch.Tensor]], staging: Staging) -> None:
        """Move the existing state, and zeros where there is none yet, to host buffers.

        Args:
            names: of the lists. states: of each parameter; their tensors become views of the host buffers.
        """
        self.staging = staging
        for param, state in zip(self.weights, states):
            if any(name in state for name in names):
                fit_state(param, state, self.storage.master, self.storage.eight_bit, "cpu")
        self.parts = []
        shapes = [
            [empty_state(torch.empty_like(p, device="meta"), name, self.storage.eight_bit) for name in names]
            for p in self.weights
        ]
        for members in split([Packing(tensors).nbytes for tensors in shapes], PART):
            packing = Packing(shapes[index][i] for i in range(len(names)) for index in members)
            table = self.table.part(members.start, members.stop)
            part = Part(members, table, packing, names, host_buffer(packing.nbytes, self.table.device))
            for index, name, view in part.host_views():
                value = states[index].get(name)
                view.copy_(empty_state(self.weights[index], name, self.storage.eight_bit) if value is None else value)
                states[index][name] = view
            self.parts.append(part)
            self._part_of |= dict.fromkeys(members, part)
            staging.size = max(staging.size, packing.nbytes)
        self._arrivals = self.parts[::-1]  # a backward pass comes to the last layers first

    # -- whole passes --------------------------------------------------------------------------------------------------

    def reserve(self) -> None:
        _refuse_capture(self.table.device)
        self.staging.reserve(len(self.parts))

    def perturb(self, norm: ops.GradientNorm) -> None:
        if not self.storage.master:
            return super().perturb(norm)
        try:
            self._each_part(lambda part: ops.sam_perturb_(part.table, norm))
        except BaseException:
            self.close(for_good=False)
            self.restore(norm)  # parts that were not perturbed lose nothing by it
            raise

    def restore(self, norm: ops.GradientNorm, index: int | None = None) -> None:
        if not self.storage.master:
            return super().restore(norm, index)
        if index is None:
            return self._each_part(lambda part: ops.sam_restore_(part.table, norm), gradients=False)
        part = self._part_on_device(index)
        ops.sam_restore_(part.table, norm, index - part.members.start)

    def restore_changed(self, norm: ops.GradientNorm, indices: Iterable[int] | None = None) -> None:
        self.close(for_good=False)
        self.staging.synchronize()
        super().restore_changed(norm, indices)

    def step(self, scalars: ops.StepScalars, first: ops.GradientNorm | None, restore: bool) -> None:
        self._each_part(
            lambda part: ops.sam_adamw_step_(part.table, scalars, first=first, restore=restore), writes=True
        )

    def close(self, for_good: bool = True) -> None:
        """Copy out what is still on the device, and free its memory.

        Not `for_good` keeps the memory: perturbed weights must find their way back though there be no more.
        """
        for part in self.parts:
            if part.slot is not None:
                self._end(part)
            part.left.clear()
        if len(self._opened_now) == len(self.parts):
            self._arrivals = self._opened_now
        self._opened_now = []
        if for_good:
            self.staging.close()

    def _each_part(self, operation: Callable[[Part], None], writes: bool = False, gradients: bool = True) -> None:
        """Run the operation on every part with its state on the device, while the parts after it are copied."""
        self.reserve()
        ahead = self.staging.buffers - 1
        for index, part in enumerate(self.parts):
            for coming in self.parts[index : index + ahead]:
                if coming.slot is None:
                    self._begin(coming, gradients)
            wait_for(part.arrived, self.staging.device)
            operation(part)
            part.written = writes
            self._end(part)

    def _begin(self, part: Part, gradients: bool) -> None:
        """Start to copy a part, addresses first.

        One engine copies inward, in order, and kernels must not wait for the next part's state.
        """
        self.staging.take(part)
        self._bind_part(part, gradients)
        self.staging.begin(part)

    def _bind_part(self, part: Part, gradients: bool) -> None:
        own = slice(part.members.start, part.members.stop)
        lists: dict[str, Any] = part.staged_lists() | {"weight": self.weights[own]}
        if gradients:
            lists["grad"] = self.table["grad"][own]  # in the weights' layout, whatever p.grad has
        if self._backup is not None:
            lists["backup"] = self._backup[own]
        part.table.bind(**lists)

    def _end(self, part: Part) -> None:
        for name in ("grad", "backup", *part.names):  # their memory may go elsewhere
            part.table.release(name)
        self.staging.end(part)

    # -- released gradients --------------------------------------------------------------------------------------------

    def step_tensor(self, index: int, grad: torch.Tensor, scalars: ops.StepScalars, first: ops.GradientNorm) -> None:
        part = self._part_on_device(index)
        ops.sam_adamw_step_tensor_(part.table, index - part.members.start, grad, scalars, first=first)
        part.written = True
        part.left.discard(index)
        if not part.left:
            self._end(part)

    def drop_backup(self, index: int | None = None) -> None:
        super().drop_backup(index)
        part = None if index is None else self._part_of.get(index)
        if index is not None and part is not None and "backup" in part.table:
            part.table.forget("backup", index - part.members.start)

    def _part_on_device(self, index: int) -> Part:
        """Give a parameter's part on the device, and start to copy the part that came after it in the last pass."""
        part = self._part_of[index]
        self.reserve()
        if part.slot is None:
            self._begin(part, gradients=False)  # they come one by one, and none may be kept
        if not part.left:
            part.left = set(part.members)
            wait_for(part.arrived, self.staging.device)
            self._opened_now.append(part)
            place = self._arrivals.index(part)
            for other in self._arrivals[place + 1 : place + 2]:
                if other.slot is None and other not in self._opened_now and self.staging.has_room:
                    self._begin(other, gradients=False)
        return part


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step with offloaded state cannot be captured in a CUDA graph: use offload='none'")
