"""SAMAdamW's memory without its arithmetic: the state that it keeps, and when gradients and backups come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rsaft_fast.abi.table import CHUNK, LISTS
from rsaft_fast.ops.transfer import Packing
from rsaft_fast.optim import SAMAdamW
from rsaft_fast.optim.buckets import Storage
from rsaft_fast.optim.moments import MOMENTS, empty_state, state_names
from rsaft_fast.optim.offload import BUFFERS, PART, split

_CHUNK_BYTES = 4 + 4 + 8 + 3 * 8
_TENSOR_BYTES = 8 + 4 + 4 + 8 * len(LISTS) + 4 + 8 * 9
"""Of a `TensorTable`: its arrays a chunk and a tensor."""


class AccountedOptimizer:
    """In `update`'s hands what a SAMAdamW of the same settings is, as far as bytes go.

    The kernels write in place and make nothing besides; so does this.

    Attributes:
        release_gradients, backup: as the optimizer's.
        held: what it keeps between updates, by name. host_bytes: of state that is on the host instead.
    """

    def __init__(self, optimizer: SAMAdamW, earlier: bool, between: Callable[[], None], perturbs: bool = True):
        """`earlier`: gradients of earlier micro-batches are there when a pass begins. `between`: called when the first
        pass over the last micro-batch is done. `perturbs`: whether weights ever are; else none is kept a backup of."""
        self.release_gradients, self.backup = optimizer.release_gradients, optimizer.backup
        self.param_groups = optimizer.param_groups
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.earlier, self.between = earlier, between
        storages = [optimizer._storage_of(p) for p in self.params]
        names = [state_names(storage.master, storage.eight_bit) for storage in storages]
        states = [
            {name: empty_state(p, name, storage.eight_bit) for name in own}
            for p, storage, own in zip(self.params, storages, names)
            if not storage.offload
        ]
        self.host_bytes, self._staging_bytes = _on_the_host(self.params, storages)
        self._staging: torch.Tensor | None = None
        self.held: dict[str, list[torch.Tensor]] = {
            "masters (fp32)": [state["master"] for state in states if "master" in state],
            f"moments ({optimizer.state_bits} bits)": [
                tensor for state in states for name, tensor in state.items() if name.startswith(MOMENTS)
            ],
            "backup of the perturbed weights": [
                torch.empty_like(p)
                for p, s in zip(self.params, storages)
                if perturbs and not s.master and s.backup == "own"
            ],
            "tables of the kernels": [self._table()],
        }
        self._masters_on_host = bool(self._staging_bytes) and any(s.master for s in storages)
        self._in_gradients = [not s.master and s.backup == "gradient" for s in storages]
        self._taken: list[torch.Tensor | None] = []
        self._second = False
        if self.release_gradients:
            for index, param in enumerate(self.params):
                param.register_post_accumulate_grad_hook(lambda p, index=index: self._arrived(index, p))

    def _table(self) -> torch.Tensor:
        chunks = sum(-(-p.numel() // CHUNK) for p in self.params)
        size = chunks * _CHUNK_BYTES + len(self.params) * _TENSOR_BYTES
        return torch.empty(size, dtype=torch.uint8, device=self.params[0].device)

    def _stage(self) -> None:
        if self._staging is None and self._staging_bytes:
            self._staging = torch.empty(self._staging_bytes, dtype=torch.uint8, device=self.params[0].device)

    def gradient_bytes(self) -> int:
        """Of what `.grad` holds now."""
        return sum(p.grad.numel() * p.grad.element_size() for p in self.params if p.grad is not None)

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = torch.empty_like(param, requires_grad=False) if self.earlier else None

    @torch.no_grad()
    def perturb(self, zero_grad: bool = False) -> None:
        self.between()
        self._taken = [p.grad if taken else None for p, taken in zip(self.params, self._in_gradients)]
        self._second = True
        if self._masters_on_host:  # read to perturb, and kept for the way back
            self._stage()
        if zero_grad:
            self.zero_grad()

    @contextmanager
    def perturbed(self, zero_grad: bool = False) -> Iterator[None]:
        self.perturb(zero_grad)
        yield

    def check_finite(self, *tensors: torch.Tensor) -> None:
        """As the optimizer's, which keeps one flag."""

    def _arrived(self, index: int, param: torch.Tensor) -> None:
        if self._second:
            self._stage()
            param.grad = None
            self._taken[index] = None

    def step(self, plain: bool = False) -> None:
        if plain:
            self.between()
        self._stage()
        self._taken, self._second, self._staging = [], False, None

    def stats(self, over_ranks: bool = False) -> dict[str, float]:
        """A norm, for who divides by it."""
        return {"grad_norm": 1.0}


def _on_the_host(params: list[torch.Tensor], storages: list[Storage]) -> tuple[int, int]:
    """Bytes of state on the host, and of the device's buffers through which it passes."""
    kinds: dict[tuple, list[int]] = {}
    for param, storage in zip(params, storages):
        if storage.offload:
            names = state_names(storage.master, storage.eight_bit)
            packing = Packing(empty_state(param, name, storage.eight_bit) for name in names)
            kinds.setdefault((param.dtype, storage), []).append(packing.nbytes)
    parts = [[sum(sizes[i] for i in part) for part in split(sizes, PART)] for sizes in kinds.values()]
    if not parts:
        return 0, 0
    return sum(map(sum, parts)), max(map(max, parts)) * min(BUFFERS, max(map(len, parts)))
