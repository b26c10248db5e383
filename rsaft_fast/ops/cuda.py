"""Backend of the compiled library (csrc/): the same functions as the other backends have.

A step over small tensors is bound by this module, so it repeats nothing: a table's C struct is built once for each set
of bound lists, addresses of scalars once an object, and a call is then one foreign call with plain integers.
"""

import ctypes
from collections.abc import Sequence

import torch

from rsaft_fast.abi.scalars import GradientNorm, StepInputs, StepScalars
from rsaft_fast.abi.table import CHUNK, LISTS, ROW, TensorTable
from rsaft_fast.ops import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_ABSENT = -1
_MAX_TABLES = 16
_IMAGE_CHUNK = 32768
_POINTERS = (
    *("addresses", "numel", "group", "parameter", "chunk_tensor", "chunk_index"),
    *("sum_sq", "perturbation_sums", "steps", "coefficients"),
)


class _Table(ctypes.Structure):
    """`rsaft_table` of csrc/rsaft.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("gradient", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("tensors", "chunks", "chunk_size", "adaptive", "stochastic")),
        ("dtypes", ctypes.c_int32 * len(LISTS)),
    ]


class _Inputs(ctypes.Structure):
    """`rsaft_step_inputs` of csrc/rsaft.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hyper", "first_inf", "scaler_inf", "grad_scale", "skip", "skipped")),
        ("released", ctypes.c_int32),
    ]


class _Prepared:
    """C struct of a table whose bound lists and dtypes stay as they are; a second one points at single tensors."""

    def __init__(self, table: TensorTable):
        dtypes = [DTYPES[table.dtypes[name]] if name in table else _ABSENT for name in LISTS]
        self.whole = _Table(
            tensors=len(table),
            chunks=table.chunks,
            chunk_size=CHUNK,
            adaptive=table.adaptive,
            stochastic=table.rounding_seed is not None and "master" not in table,
            seed=(table.rounding_seed or 0) & 0xFFFF_FFFF_FFFF_FFFF,
            dtypes=(ctypes.c_int32 * len(LISTS))(*dtypes),
            **{name: getattr(table, name).data_ptr() for name in _POINTERS},
        )
        self.part = _Table.from_buffer_copy(self.whole)
        self.address, self.part_address = ctypes.addressof(self.whole), ctypes.addressof(self.part)

    def of_tensor(self, table: TensorTable, tensor: int, grad: torch.Tensor | None) -> int:
        """Give the address of the struct that walks this tensor's chunks only, with this gradient for its own."""
        offset = 4 * table.first_chunk[tensor]
        self.part.chunk_tensor = self.whole.chunk_tensor + offset
        self.part.chunk_index = self.whole.chunk_index + offset
        self.part.chunks = table.chunks_of[tensor]
        self.part.gradient = 0 if grad is None else grad.data_ptr()
        self.part.dtypes[ROW["grad"]] = self.whole.dtypes[ROW["grad"]] if grad is None else DTYPES[grad.dtype]
        return self.part_address


class _Cache(dict):
    """Addresses that belong to one object, kept with it; a copy of the object has other memory and starts without."""

    def __deepcopy__(self, memo) -> "_Cache":
        return _Cache()

    def __reduce__(self):
        return _Cache, ()


def _cache(owner: TensorTable | GradientNorm | StepScalars) -> _Cache:
    found = owner.__dict__.get("_cuda")
    if found is None:
        found = owner.__dict__["_cuda"] = _Cache()
    return found


def _prepared(table: TensorTable) -> _Prepared:
    cache = _cache(table)
    key = (*table._lists, *table.dtypes.values())
    found = cache.get(key)
    if found is None:
        found = cache[key] = _Prepared(table)
    return found


def _call(device: torch.device, function: str, *arguments) -> None:
    """Call a function of the library on the tensors' device and PyTorch's current stream there.

    On the CPU it runs on as many threads as PyTorch uses.
    """
    loaded = library.load(device.type)
    if device.type != "cuda":
        error = getattr(loaded, function)(*arguments, torch.get_num_threads())
    elif torch._C._cuda_getDevice() == device.index:
        error = getattr(loaded, function)(*arguments, torch._C._cuda_getCurrentRawStream(device.index))
    else:
        with torch.cuda.device(device):
            return _call(device, function, *arguments)
    if error:
        library.check(loaded, error)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _norm_pointers(norm: GradientNorm) -> tuple[int, ...]:
    """Give the addresses of values, norm, scale and found_inf, which live as long as the object."""
    cache = _cache(norm)
    found = cache.get("pointers")
    if found is None:
        tensors = (norm.values, norm.norm, norm.scale, norm.found_inf)
        found = cache["pointers"] = tuple(tensor.data_ptr() for tensor in tensors)
    return found


def _inputs(inputs: StepInputs) -> int:
    """Give the address of `rsaft_step_inputs`: kept with the scalars, rewritten where an address has changed."""
    scalars = inputs.scalars
    first_inf = None if inputs.first is None else _norm_pointers(inputs.first)[3]
    key = (first_inf, _pointer(inputs.found_inf), _pointer(inputs.grad_scale), inputs.released)
    cache = _cache(scalars)
    found = cache.get("inputs")
    if found is None or found[0] != key:
        struct = _Inputs(
            scalars.hyper.data_ptr(), *key[:3], scalars.skip.data_ptr(), scalars.skipped.data_ptr(), int(key[3])
        )
        found = cache["inputs"] = (key, ctypes.addressof(struct), struct)
    return found[1]


def _check_count(tables: Sequence) -> None:
    if len(tables) > _MAX_TABLES:
        raise ValueError(f"{len(tables)} tables in one norm; the library adds up to {_MAX_TABLES}")


def _table_array(owner: GradientNorm, tables: Sequence[TensorTable]) -> int:
    """Give the address of an array of the tables' structs, kept with the norm."""
    addresses = [_prepared(table).address for table in tables]
    cache = _cache(owner)
    found = cache.get("tables")
    if found is None or found[0] != addresses:
        _check_count(tables)
        array = (ctypes.c_void_p * len(addresses))(*addresses)
        found = cache["tables"] = (addresses, ctypes.addressof(array), array)
    return found[1]


def _slot_arrays(norm: GradientNorm, slots: list[torch.Tensor]) -> tuple[int, int]:
    """Give the addresses of arrays of the slots' addresses and of their counts, kept with the norm."""
    cache = _cache(norm)
    found = cache.get("slots")
    if found is None or len(found[0]) != len(slots) or any(a is not b for a, b in zip(found[0], slots)):
        _check_count(slots)
        pointers = (ctypes.c_void_p * len(slots))(*(part.data_ptr() for part in slots))
        counts = (ctypes.c_int32 * len(slots))(*(part.numel() for part in slots))
        found = cache["slots"] = (
            list(slots), (ctypes.addressof(pointers), ctypes.addressof(counts)), pointers, counts
        )  # fmt: skip
    return found[1]


def sum_of_squares(table: TensorTable, adaptive: bool) -> None:
    """Fill `table.sum_sq`: each chunk's sum of squares in its own slot."""
    _call(table.device, "rsaft_sum_of_squares", _prepared(table).address, adaptive)


def finish_norm(
    slots: list[torch.Tensor],
    norm: GradientNorm,
    rho: torch.Tensor,
    tables: list[TensorTable] | None = None,
    inputs: StepInputs | None = None,
) -> None:
    """Add all slots up in float64 to norm, scale and found_inf; with `inputs`, write `tables`' coefficients too."""
    values, _, _, found_inf = _norm_pointers(norm)
    _call(
        rho.device,
        "rsaft_finish_norm",
        *_slot_arrays(norm, slots),
        len(slots),
        rho.data_ptr(),
        rho.numel(),
        values,
        found_inf,
        None if inputs is None else _table_array(norm, tables or ()),
        None if inputs is None else _inputs(inputs),
    )


def sam_perturb_(table: TensorTable, norm: GradientNorm) -> None:
    """Perturb the weights of a table by `norm.scale`; do nothing where `norm.found_inf` is set."""
    _, _, scale, found_inf = _norm_pointers(norm)
    _call(table.device, "rsaft_sam_perturb", _prepared(table).address, scale, found_inf)


def sam_restore_(table: TensorTable, norm: GradientNorm, tensor: int | None = None) -> None:
    """Restore the weights of a table, or of its one `tensor`."""
    prepared = _prepared(table)
    address = prepared.address if tensor is None else prepared.of_tensor(table, tensor, None)
    _call(table.device, "rsaft_sam_restore", address, _norm_pointers(norm)[3])


def adamw_coefficients(tables: list[TensorTable], norm: GradientNorm, inputs: StepInputs) -> None:
    """Write the skip flag and counter, each tensor's step count, and `TensorTable.coefficients`."""
    _, value, _, found_inf = _norm_pointers(norm)
    arguments = (_table_array(norm, tables), len(tables), value, found_inf, _inputs(inputs))
    _call(tables[0].device, "rsaft_adamw_coefficients", *arguments)


def sam_adamw_step_(
    table: TensorTable,
    scalars: StepScalars,
    first: GradientNorm | None,
    restore: bool,
    tensor: int | None = None,
    grad: torch.Tensor | None = None,
) -> None:
    """Restore and update the weights of a table, or of its one `tensor` from `grad`."""
    prepared = _prepared(table)
    address = prepared.address if tensor is None else prepared.of_tensor(table, tensor, grad)
    cache = _cache(scalars)
    skip = cache.get("skip")
    if skip is None:
        skip = cache["skip"] = scalars.skip.data_ptr()
    first_inf = None if first is None else _norm_pointers(first)[3]
    _call(table.device, "rsaft_sam_adamw_step", address, skip, first_inf, restore)


def step_against_(out: torch.Tensor, images: torch.Tensor | None, grad: torch.Tensor, radius: float, norm: str) -> None:
    """Write `out = images + delta`, or `out = delta` without images; see `image_delta`."""
    if out.numel() == 0:
        return
    if not all(tensor.is_contiguous() for tensor in (out, grad, images) if tensor is not None):
        plain = torch.empty_like(out, memory_format=torch.contiguous_format)
        step_against_(plain, None if images is None else images.contiguous(), grad.contiguous(), radius, norm)
        out.copy_(plain)
        return
    samples, elements = len(out), out[0].numel()
    chunks = -(-elements // _IMAGE_CHUNK)
    workspace = torch.empty(samples, chunks, dtype=torch.float64, device=out.device)
    _call(
        out.device,
        "rsaft_perturb_images",
        out.data_ptr(),
        _pointer(images),
        grad.data_ptr(),
        DTYPES[out.dtype],
        DTYPES[grad.dtype],
        samples,
        elements,
        -radius * (elements**0.5 if norm == "rms" else 1.0),
        norm == "linf",
        workspace.data_ptr(),
    )
