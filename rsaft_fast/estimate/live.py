"""Counting the bytes that are alive on a device, by phase of an update, and running real code on shapes alone.

`LiveBytes` sees every storage that an operation makes, from its birth to its death. Under `shapes_alone` the code that
it watches runs on the meta device: nothing is allocated or computed, and a model of any size is walked in seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsaft_fast.phases import REST, current_phase

_ALIKE = {
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.full_like.default,
}
"""What gives a tensor like its argument."""

CUDA_BLOCK = 512
"""Bytes: torch's CUDA allocator hands out multiples of this, and counts them as allocated."""


@dataclass
class Peak:
    """The moment at which a phase has the most bytes alive.

    Attributes:
        total: bytes alive then. own: those that came after the phase began.
    """

    total: int = 0
    own: int = 0


class LiveBytes(TorchDispatchMode):
    """Sums the storages on one device that operations have made, or that were shown, and that are still alive.

    Attributes:
        alive: bytes now.
        peaks: by phase (`rsaft_fast.phases`), in the order in which phases began.
    """

    def __init__(self, device: str, block: int = 1):
        """`device`: the type that counts ("meta", "cpu"). `block`: sizes are rounded up to a multiple of it."""
        super().__init__()
        self.device, self.block = device, block
        self.alive = 0
        self._sizes: dict[int, int] = {}
        self._parts: dict[int, int] = {}
        self.peaks: dict[str, Peak] = {}
        self._storages: dict[int, weakref.ref] = {}
        self._elsewhere: list[torch.Tensor] = []
        self._excluded: set[int] = set()
        self._phase, self._begun_at = REST, 0

    @property
    def peak(self) -> int:
        return max((peak.total for peak in self.peaks.values()), default=0)

    def see(self, tensors: Iterable[torch.Tensor]) -> int:
        """Count tensors that were made outside; bytes that they add."""
        before = self.alive
        for tensor in tensors:
            self._count(tensor)
        return self.alive - before

    def exclude(self, tensors: Iterable[torch.Tensor]) -> None:
        """Never count the storages of these, which stand for memory elsewhere; they are kept alive."""
        self._elsewhere.extend(tensors)
        self._excluded = {tensor.untyped_storage()._cdata for tensor in self._elsewhere}

    def part(self, tensors: Iterable[torch.Tensor], parts: int) -> None:
        """Count the storages of these, from here on, as one of so many parts: this rank's.

        So is what is made of them as they are (copies, tensors like them).
        """
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            self._parts[key] = parts
            if key in self._sizes:
                self.alive += self.size(tensor) - self._sizes[key]
                self._sizes[key] = self.size(tensor)

    def size(self, tensor: torch.Tensor) -> int:
        """Bytes of its storage as they are counted."""
        storage = tensor.untyped_storage()
        own = -(-storage.nbytes() // self._parts.get(storage._cdata, 1))
        return -(-own // self.block) * self.block

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        before = self.alive
        if self._parts and function in _ALIKE and isinstance(args[0], torch.Tensor):
            key = args[0].untyped_storage()._cdata
            if key in self._parts and out.untyped_storage()._cdata != key:
                self._parts[out.untyped_storage()._cdata] = self._parts[key]
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
            elif isinstance(leaf, tuple | list):
                for tensor in tree_leaves(leaf):
                    if isinstance(tensor, torch.Tensor):
                        self._count(tensor)
        if self.alive > before:
            self._attribute(before)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or key in self._excluded:
            return
        self._sizes[key] = self.size(tensor)
        self.alive += self._sizes[key]
        self._storages[key] = weakref.ref(storage, lambda _: self._died(key))

    def _died(self, key: int) -> None:
        del self._storages[key]
        self._parts.pop(key, None)
        self.alive -= self._sizes.pop(key)

    def _attribute(self, before: int) -> None:
        phase = current_phase()
        if phase != self._phase:
            self._phase, self._begun_at = phase, before
        # What the phase found may die while it runs.
        self._begun_at = min(self._begun_at, before)
        peak = self.peaks.setdefault(phase, Peak())
        if self.alive > peak.total:
            peak.total, peak.own = self.alive, self.alive - self._begun_at


class _FusedAttention(torch.autograd.Function):
    """Shapes of flash and memory-efficient attention: of the forward pass they keep q, k, v, the output and one fp32
    number a query and head; backward, the CUDA kernels sum up the gradient of a half-precision query in fp32.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, cuda):
        ctx.cuda = cuda
        # Laid out as the query is: mostly a (B, H, L, D) view of (B, L, H, D) memory, which what follows need not copy.
        out = (
            torch.empty_like(query)
            if query.shape[-1] == value.shape[-1]
            else query.new_empty(*query.shape[:-1], value.shape[-1])
        )
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors[:3]
        in_fp32 = ctx.cuda and inputs[0].element_size() < 4
        scratch = inputs[0].new_empty(inputs[0].shape, dtype=torch.float32) if in_fp32 else None
        gradients = [t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in inputs]
        del scratch
        return *gradients, None, None


@contextmanager
def _fused_attention(cuda: bool) -> Iterator[None]:
    # A TorchFunctionMode is off while torch.autograd runs, and so would miss what checkpointing recomputes there.
    torch_attention = functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, *options, **named):
        if query.is_meta:
            return _FusedAttention.apply(query, key, value, attn_mask, cuda)
        return torch_attention(query, key, value, attn_mask, *options, **named)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = torch_attention


class _ShapesAlone(TorchDispatchMode):
    """Answers for operations that want a value where there is none: numbers are 1, questions are answered no.

    The shapes of results are remembered: a network asks for the same ones over and over, and torch works them out in
    Python.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        answer = _VALUES.get(function)
        if answer is not None and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            found = answer(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if not _is_pure(function):
            return function(*args, **kwargs)
        try:
            key = (function, _frozen(args), _frozen(tuple(kwargs.items())))
            known = _KNOWN.get(key)
        except TypeError:
            return function(*args, **kwargs)
        if known is not None:
            return _thawed(known)
        out = function(*args, **kwargs)
        with suppress(TypeError):
            _KNOWN[key] = _frozen(out)
        return out


_KNOWN: dict[tuple, tuple] = {}
_SHAPE = "a meta tensor"


@cache
def _is_pure(function: Any) -> bool:
    """Whether results are new tensors whose shapes follow from those of the arguments."""
    schema = function._schema
    return (
        function.namespace == "aten"
        and all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))
        and any("Tensor" in str(argument.type) for argument in schema.arguments)
        and all(str(result.type).startswith("Tensor") for result in schema.returns)
    )


def _frozen(value: Any) -> tuple:
    """What results depend on, hashable; TypeError for tensors that hold values."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise TypeError("a tensor with values")
        return _SHAPE, value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return type(value), *map(_frozen, value)
    return type(value), value  # 1, 1.0 and True are equal, but promote types differently


def _thawed(frozen: tuple) -> Any:
    if frozen[0] is _SHAPE:
        return torch.empty_strided(frozen[1], frozen[2], dtype=frozen[3], device="meta")
    if frozen[0] in (tuple, list):
        return frozen[0](map(_thawed, frozen[1:]))
    return frozen[1]


def _scalar(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


def _copy(tensor: torch.Tensor, *, device=None, dtype=None, **options) -> Any:
    if device is None or torch.device(device).type == "meta":
        return NotImplemented
    return torch.ones(tensor.shape, dtype=dtype or tensor.dtype)


_VALUES = {
    torch.ops.aten._local_scalar_dense.default: _scalar,
    torch.ops.aten._to_copy.default: _copy,
    torch.ops.aten.nonzero.default: lambda tensor: tensor.new_empty(0, tensor.ndim, dtype=torch.int64),
    torch.ops.aten.equal.default: lambda tensor, other: tensor.shape == other.shape,
}


@contextmanager
def shapes_alone(cuda: bool = True) -> Iterator[None]:
    """Let code on the meta device run through, and give a value to what reads one.

    Attention keeps what fused kernels keep (`cuda`: those of the GPU); torch's own meta path would write out the matrix
    of all pairs.
    """
    with _ShapesAlone(), _fused_attention(cuda):
        yield
