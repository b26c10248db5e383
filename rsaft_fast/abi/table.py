"""Table of tensors that one launch walks: device-resident addresses, sizes and a (tensor, chunk) list."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rsaft_fast.abi.quantize import blocks
from rsaft_fast.abi.scalars import COEFFICIENTS

CHUNK = 32768
"""Elements a chunk. Fixed: the order of every sum follows from it, so no tuning may change it."""

LISTS = ("weight", "grad", "backup", "master", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
"""The lists a table can hold; the position is the row of `TensorTable.addresses`."""

ABSMAX = ("exp_avg_absmax", "exp_avg_sq_absmax")
"""Lists with a float32 value for each block of 8-bit state: `(blocks(numel),)` instead of the weight's shape."""

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

ROW = {name: row for row, name in enumerate(LISTS)}


def pinned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Page-lock a CPU tensor, so that it is copied to `device` without waiting.

    Always fresh memory: an earlier copy may still be reading its own. (The host allocator keeps it until then.)
    """
    return values.pin_memory() if device.type == "cuda" else values


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to `device` without waiting."""
    return pinned(values, device).to(device, non_blocking=True)


class WeightsChangedError(ValueError):
    """Weights are no longer what their table was built for: another shape, layout, dtype or device."""


class LayoutError(ValueError):
    """A tensor's strides differ from its weight's."""


class TensorTable:
    """Lists of tensors that an operation walks in one launch.

    Built once from the weights; other lists are bound when they exist. All tensors live on one device, every list has
    one dtype, and tensor `i` of every list has the shape and the strides of weight `i`, which must be dense and
    non-overlapping (contiguous, channels-last, transposed: any order of dimensions without holes). An entry of a bound
    list may be None: its address is 0 and the operations treat it as absent. Moments may be uint8 codes (`quantize`);
    then the lists `ABSMAX` belong to them. Lists that are written share no memory, among themselves or with weights.

    Args:
        weights: the tensors to update; every dtype equal.
        group: for each weight, the row of the hyper-parameter arrays that it follows. Default: all 0.
        adaptive: ASAM (arXiv 2102.11600): norms over `|w| * g`, perturbations along `w**2 * g`.
        parameter: for each weight, its index in the optimizer: stochastic rounding draws by it. Default: 0, 1, 2...
        rounding_seed: round perturbed and updated bf16 weights without master stochastically. None: to nearest.

    Attributes:
        groups: how many rows the hyper-parameter arrays must have.
        addresses: int64 `(len(LISTS), n)`, on the device, as the kernels read them.
        numel: int64 `(n,)`. group, parameter: int32 `(n,)`.
        chunk_tensor, chunk_index: int32 `(chunks,)`: the tensor of each chunk, and which chunk of it.
        sum_sq: float64 `(chunks,)`: a slot a chunk for `global_norm`.
        perturbation_sums: float64 `(chunks, 3)`: sums of applied², applied·wanted, wanted² of the last perturbation.
        steps: float32 `(n,)`: optimizer steps taken by each tensor. coefficients: float64 `(n, 9)`, scratch.

    Raises:
        ValueError: no weights, mixed devices, holes or overlap in a layout, overlapping weights, unequal shapes or
            strides. TypeError: mixed or non-floating dtypes, sparse tensors.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        *,
        group: Sequence[int] | None = None,
        adaptive: bool = False,
        parameter: Sequence[int] | None = None,
        rounding_seed: int | None = None,
    ):
        weights = list(weights)
        if not weights:
            raise ValueError("a TensorTable needs at least one tensor")
        for index, weight in enumerate(weights):
            _check_layout(index, weight)
        self.device = weights[0].device
        self.adaptive = adaptive
        self.rounding_seed = rounding_seed
        self.captured = False
        self.shapes = [weight.shape for weight in weights]
        self.strides = [weight.stride() for weight in weights]
        self._odd_strides = [None if weight.is_contiguous() else weight.stride() for weight in weights]
        self._device_index = weights[0].get_device()
        self.dtypes: dict[str, torch.dtype] = {"weight": weights[0].dtype}
        self._allowed = _allowed_dtypes(weights[0].dtype)
        self._lists: dict[str, list[torch.Tensor | None]] = {}
        self._bound: dict[str, list] = {}

        sizes = torch.tensor([weight.numel() for weight in weights], dtype=torch.int64)
        chunks = (sizes + CHUNK - 1) // CHUNK
        owner = torch.repeat_interleave(torch.arange(len(weights)), chunks)
        self.first_chunk = (chunks.cumsum(0) - chunks).tolist()
        index = torch.arange(len(owner)) - (chunks.cumsum(0) - chunks)[owner]
        self.chunks_of = chunks.tolist()
        groups = torch.tensor([0] * len(weights) if group is None else list(group), dtype=torch.int32)
        if len(groups) != len(weights) or groups.min() < 0:
            raise ValueError(f"group={groups.tolist()} for {len(weights)} weights: one row number, from 0, for each")
        self.groups = int(groups.max()) + 1
        self._group_rows = groups.tolist()
        self.parameters = list(range(len(weights)) if parameter is None else parameter)

        self.numel = to_device(sizes, self.device)
        self.group = to_device(groups, self.device)
        self.parameter = to_device(torch.tensor(self.parameters, dtype=torch.int32), self.device)
        self.chunk_tensor = to_device(owner.int(), self.device)
        self.chunk_index = to_device(index.int(), self.device)
        self.addresses = torch.zeros(len(LISTS), len(weights), dtype=torch.int64, device=self.device)
        self.sum_sq = torch.zeros(len(owner), dtype=torch.float64, device=self.device)
        self.perturbation_sums = torch.zeros(len(owner), 3, dtype=torch.float64, device=self.device)
        self.steps = torch.zeros(len(weights), dtype=torch.float32, device=self.device)
        self.coefficients = torch.zeros(len(weights), len(COEFFICIENTS), dtype=torch.float64, device=self.device)
        self.bind(weight=weights)

    def __len__(self) -> int:
        return len(self.shapes)

    def part(self, first: int, last: int) -> "TensorTable":
        """Make a table of the weights `first` to `last - 1`.

        It has its own lists, and the step counts, coefficients and sums of this one.
        """
        table = TensorTable(
            self["weight"][first:last],
            group=self._group_rows[first:last],
            adaptive=self.adaptive,
            parameter=self.parameters[first:last],
            rounding_seed=self.rounding_seed,
        )
        table.steps, table.coefficients = self.steps[first:last], self.coefficients[first:last]
        start = self.first_chunk[first]
        table.perturbation_sums = self.perturbation_sums[start : start + table.chunks]
        return table

    @property
    def float_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of all lists but codes: what a backend must be able to compute with."""
        return tuple(dtype for dtype in self.dtypes.values() if dtype is not torch.uint8)

    @property
    def chunks(self) -> int:
        """Number of chunks: the size of a launch."""
        return self.chunk_tensor.numel()

    def __contains__(self, name: str) -> bool:
        return name in self._lists

    def __getitem__(self, name: str) -> list[Any]:  # tensors, and None where one of this list is absent
        if name not in self._lists:
            raise KeyError(f"the table has no list {name!r}; bind it first (bound: {', '.join(self._lists)})")
        return self._lists[name]

    def bind(self, **lists: Sequence[torch.Tensor | None]) -> None:
        """Attach lists by name. Addresses are compared with the known ones and uploaded only where they moved.

        Raises:
            WeightsChangedError: weights of another shape, layout, dtype or device than those the table was built for.
            ValueError, TypeError: a tensor does not fit (see the class). Nothing has been bound or written then.
            RuntimeError: an address moved although a captured graph owns the table, or moves during a capture.
        """
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        moved = {}
        for name, tensors in lists.items():
            try:
                addresses = [None if t is None else _address(t) for t in tensors]
            except RuntimeError:  # no storage: a sparse tensor, say. The check finds the words for it.
                self._check(name, tensors)
                raise
            # Also where they did not move: a view of another shape, dtype or order may begin at the same address.
            if not self._differ_in_addresses_alone(name, tensors) or 0 in addresses:
                self._check(name, tensors)
            if addresses != self._bound.get(name):
                moved[name] = addresses
        self._check_overlap({name: lists[name] for name in moved if name != "grad"})
        if moved and (self.captured or capturing):
            raise RuntimeError(
                f"addresses of {', '.join(moved)} moved, and a CUDA graph "
                + ("is being captured" if capturing else "that was captured owns this table")
                + ": run one step before the capture and keep the gradients (zero_grad(set_to_none=False))"
            )
        self.captured = self.captured or capturing
        self._upload(moved)
        for name in moved:
            self.dtypes[name] = next((t.dtype for t in lists[name] if t is not None), self.dtypes["weight"])
        self._lists.update((name, list(tensors)) for name, tensors in lists.items())

    def release(self, name: str) -> None:
        """Drop the references to a list (gradients, say), so that its memory can be freed. Addresses stay known."""
        self._lists.pop(name, None)

    def forget(self, name: str, index: int) -> None:
        """Drop the reference to one tensor of a list. Its address stays known."""
        self._lists[name][index] = None

    def holds(self, name: str, index: int, tensor: torch.Tensor | None) -> bool:
        """Tell whether entry `index` of a list has this tensor's address."""
        return tensor is not None and self._bound[name][index] == _address(tensor)

    def places(self, name: str) -> list[int | None]:
        """Give the addresses of a list as uploaded last; another list object once they have moved."""
        return self._bound[name]

    def suits(self, index: int, weight: torch.Tensor) -> bool:
        """Tell whether a weight has the shape, layout, dtype and device that the table was built for."""
        return (
            weight.dtype is self.dtypes["weight"]
            and weight.device == self.device
            and weight.shape == self.shapes[index]
            and order(weight.shape, weight.stride()) == order(self.shapes[index], self.strides[index])
        )

    def _upload(self, moved: dict[str, list[int | None]]) -> None:
        """Upload the moved addresses in one copy, from the first moved row to the last.

        Rows between them are written as they are known.
        """
        if not moved:
            return
        self._bound.update(moved)
        rows = sorted(ROW[name] for name in moved)
        empty = [None] * len(self)
        block = torch.tensor(
            [[e or 0 for e in self._bound.get(name, empty)] for name in LISTS[rows[0] : rows[-1] + 1]],
            dtype=torch.int64,
        )
        self.addresses[rows[0] : rows[-1] + 1].copy_(pinned(block, self.device), non_blocking=True)

    def _differ_in_addresses_alone(self, name: str, tensors: Sequence[torch.Tensor | None]) -> bool:
        """Tell whether a list differs from the known one in addresses alone; if not, `check` looks at each tensor."""
        dtype, device = self.dtypes.get(name), self._device_index
        if dtype is None or name not in self._bound or len(tensors) != len(self):
            return False
        layouts = zip(self.shapes, self._odd_strides)
        if name in ABSMAX:
            layouts = (((blocks(shape.numel()),), None) for shape in self.shapes)
        return all(
            t is None
            or (
                t.dtype is dtype
                and t.shape == shape
                and (t.is_contiguous() if strides is None else t.stride() == strides)
                and t.get_device() == device
            )
            for t, (shape, strides) in zip(tensors, layouts)
        )

    def _check_overlap(self, written: dict[str, Sequence[torch.Tensor | None]]) -> None:
        """Check lists that are about to be bound for shared memory, with each other and with the weights."""
        if written:
            lists = {"weight": self._lists.get("weight", ()), **written}
            check_overlap((f"{name} {i}", t) for name, tensors in lists.items() for i, t in enumerate(tensors))

    def _check_absmax(self, what: str, index: int, tensor: torch.Tensor) -> None:
        expected = (blocks(self.shapes[index].numel()),)
        if tensor.shape != expected or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(
                f"{what} is {tensor.dtype} of shape {tuple(tensor.shape)}; a block of state has one: float32 {expected}"
            )

    def _check(self, name: str, tensors: Sequence[torch.Tensor | None]) -> None:
        if name not in ROW:
            raise ValueError(f"unknown list {name!r}; a table holds {', '.join(LISTS)}")
        if len(tensors) != len(self):
            raise ValueError(f"{name}: {len(tensors)} tensors for a table of {len(self)}")
        present = [(index, tensor) for index, tensor in enumerate(tensors) if tensor is not None]
        for index, tensor in present:
            self.check(name, index, tensor, present[0][1].dtype)

    def check(self, name: str, index: int, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """Check that a tensor fits as entry `index` of a list of this dtype (default: as the list has been).

        Raises:
            ValueError, TypeError: it does not; the text says what to change.
        """
        what, dtype = f"{name} {index}", dtype or self.dtypes.get(name, tensor.dtype)
        if tensor.layout is not torch.strided:
            raise TypeError(f"{what} is sparse ({tensor.layout}): use dense gradients (sparse=False in nn.Embedding)")
        if name == "weight" and "weight" in self._bound and not self.suits(index, tensor):
            raise WeightsChangedError(
                f"{what} is {tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on "
                f"{tensor.device}; its table was built for {self.dtypes[name]} of shape {tuple(self.shapes[index])}, "
                f"strides {self.strides[index]}, on {self.device}: build a new table"
            )
        if tensor.device != self.device:
            raise ValueError(f"{what} is on {tensor.device}, the table on {self.device}: one device a table")
        if tensor.dtype not in self._allowed[name]:
            raise TypeError(
                f"{what} is {tensor.dtype} beside {self.dtypes['weight']} weights: it must be "
                + " or ".join(map(str, self._allowed[name]))
            )
        if tensor.dtype != dtype:
            raise TypeError(f"{what} is {tensor.dtype}, the list is of {dtype}: mixed dtypes")
        if tensor.numel() and not tensor.is_meta and not tensor.data_ptr():
            raise ValueError(f"{what} has no memory (its storage was resized to 0): gather it before the pass")
        if name in ABSMAX:
            self._check_absmax(what, index, tensor)
            return
        if tensor.shape != self.shapes[index]:
            raise ValueError(f"{what} has shape {tuple(tensor.shape)}, its weight {tuple(self.shapes[index])}")
        if order(tensor.shape, tensor.stride()) != order(self.shapes[index], self.strides[index]):
            raise LayoutError(
                f"{what} has strides {tensor.stride()}, its weight {self.strides[index]}: "
                "give it the weight's layout (torch.empty_like(weight).copy_(tensor))"
            )


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor lies; 1 where it has no elements, and so no memory: 0 would say that it is absent."""
    return tensor.data_ptr() or int(tensor.numel() == 0)


def _allowed_dtypes(weight: torch.dtype) -> dict[str, tuple[torch.dtype, ...]]:
    """Give the dtypes that each list may have; a backup holds the weights' own bits."""
    state = torch.promote_types(weight, torch.float32)
    moments = (state, torch.uint8)
    own = {"backup": (weight,), "master": (state,), "exp_avg": moments, "exp_avg_sq": moments}
    return {name: own.get(name, FLOATING) for name in LISTS}


def order(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Give the strides that matter: those of dimensions longer than 1 in a tensor that is not empty."""
    if 0 in shape:
        return ()
    return tuple(stride for size, stride in zip(shape, strides) if size > 1)


def _check_layout(index: int, weight: torch.Tensor) -> None:
    if weight.layout is not torch.strided:
        raise TypeError(f"weight {index} is sparse ({weight.layout}): only dense tensors")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight {index} is {weight.dtype}: only floating-point tensors")
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(weight.shape, weight.stride()) if n > 1):
        if 0 not in weight.shape and stride != expected:
            raise ValueError(
                f"weight {index} of shape {tuple(weight.shape)} has strides {weight.stride()}: "
                "expanded, or a view with holes. Make it dense (.contiguous()) before building the optimizer"
            )
        expected *= size


def check_overlap(tensors: Iterable[tuple[str, torch.Tensor | None]]) -> None:
    """Raise ValueError if two of these named dense tensors share memory."""
    spans = [
        (start, start + tensor.numel() * tensor.element_size(), name)
        for name, tensor in tensors
        if tensor is not None and (start := tensor.data_ptr()) and tensor.numel()
    ]
    spans.sort()
    for (_, end, first), (start, _, second) in zip(spans, spans[1:]):
        if start < end:
            raise ValueError(f"{_both(first, second)} overlap in memory: pass shared storage once")


def _both(first: str, second: str) -> str:
    (kind, number), (other, its) = first.split(), second.split()
    return f"{kind}s {number} and {its}" if kind == other else f"{first} and {second}"
