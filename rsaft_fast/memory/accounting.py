"""Accounting of the bytes that autograd keeps alive, on any device."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch.autograd.graph import saved_tensors_hooks


class SavedTensorBytes(saved_tensors_hooks):
    """Count of the bytes of storages that graphs built inside the `with` block keep for their backward pass.

    A storage saved many times counts once, with its whole size, from its first saving until the last graph that holds
    it is freed, also after the block. What a checkpointed call recomputes during the backward pass is not seen, as it
    never enters a graph's saved tensors; its kept inputs are.

    Attributes:
        alive: bytes kept now.
        peak: the most bytes kept at one moment.
        total: bytes of every storage ever kept.
    """

    def __init__(self, ignore: Iterable[torch.Tensor] = ()):
        """`ignore`: tensors (parameters, say) whose storages live anyway and are not counted."""
        self.alive = self.peak = self.total = 0
        self._holders: dict[int, int] = {}
        self._ignored = {_storage_id(tensor): tensor for tensor in ignore}
        # A finaliser may run while the lock is held by its own thread, when the garbage collector strikes.
        self._lock = threading.RLock()
        super().__init__(lambda tensor: _SavedTensor(tensor, self), lambda kept: kept.tensor)

    def __enter__(self) -> SavedTensorBytes:
        super().__enter__()
        return self

    def _keep(self, key: int, size: int) -> None:
        with self._lock:
            holders = self._holders.get(key, 0)
            self._holders[key] = holders + 1
            if holders == 0:
                self.alive += size
                self.total += size
                self.peak = max(self.peak, self.alive)

    def _release(self, key: int, size: int) -> None:
        with self._lock:
            self._holders[key] -= 1
            if self._holders[key] == 0:
                del self._holders[key]
                self.alive -= size


class _SavedTensor:
    """Saved tensor; autograd drops it when the graph is freed."""

    __slots__ = ("tensor", "counter", "key", "size")

    def __init__(self, tensor: torch.Tensor, counter: SavedTensorBytes):
        # An operation's own output would hold its graph node, and the node this: a cycle that is never freed.
        self.tensor = tensor.detach()
        self.counter = None
        self.key, self.size = _storage_id(tensor), tensor.untyped_storage().nbytes()
        if self.key not in counter._ignored:
            self.counter = counter
            counter._keep(self.key, self.size)

    def __del__(self):
        if self.counter is not None:
            self.counter._release(self.key, self.size)


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def saved_tensor_bytes(ignore: Iterable[torch.Tensor] = ()) -> SavedTensorBytes:
    """Count the bytes that autograd keeps: `with saved_tensor_bytes(model.parameters()) as saved: ...; saved.peak`."""
    return SavedTensorBytes(ignore)
