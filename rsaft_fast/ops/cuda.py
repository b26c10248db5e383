"""The operations through the compiled library (csrc/): the same seven functions as the other backends have.

A table's C struct is built once and again when a list appears or changes its type; a call is then one foreign call.
"""

import ctypes
from contextlib import nullcontext

import torch

from . import library
from .table import CHUNK, LISTS, TensorTable

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ABSENT = -1
_MAX_TABLES = 16
_IMAGE_CHUNK = 32768


class _Table(ctypes.Structure):
    """``rsaft_table`` of csrc/rsaft.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("addresses", "numel", "group", "chunk_tensor", "chunk_index")),
        *((name, ctypes.c_void_p) for name in ("sum_sq", "perturbation_sums", "steps", "coefficients")),
        *((name, ctypes.c_int32) for name in ("tensors", "chunks", "chunk_size", "adaptive")),
        ("dtypes", ctypes.c_int32 * len(LISTS)),
    ]


def _struct(table: TensorTable) -> ctypes.Structure:
    dtypes = tuple(DTYPES[table.dtypes[name]] if name in table else _ABSENT for name in LISTS)
    known = vars(table).get("_cuda_struct")
    if known is None or known[0] != dtypes:
        struct = _Table(
            tensors=len(table),
            chunks=table.chunks,
            chunk_size=CHUNK,
            adaptive=table.adaptive,
            dtypes=(ctypes.c_int32 * len(LISTS))(*dtypes),
            **{name: getattr(table, name).data_ptr() for name, kind in _Table._fields_ if kind is ctypes.c_void_p},
        )
        known = table._cuda_struct = (dtypes, struct)
    return ctypes.byref(known[1])


def _call(device: torch.device, function: str, *arguments) -> None:
    """Run on the tensors' device and PyTorch's current stream there."""
    loaded = library.load()
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else nullcontext():
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream if on_gpu else None)
        library.check(loaded, getattr(loaded, function)(*arguments, stream))


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def sum_of_squares(table: TensorTable, adaptive: bool) -> None:
    _call(table.device, "rsaft_sum_of_squares", _struct(table), int(adaptive))


def finish_norm(slots: list[torch.Tensor], norm, rho: torch.Tensor) -> None:
    if len(slots) > _MAX_TABLES:
        raise ValueError(f"{len(slots)} tables in one norm; the library adds up to {_MAX_TABLES}")
    _call(
        norm.values.device,
        "rsaft_finish_norm",
        (ctypes.c_void_p * len(slots))(*(table_slots.data_ptr() for table_slots in slots)),
        (ctypes.c_int32 * len(slots))(*(table_slots.numel() for table_slots in slots)),
        len(slots),
        _pointer(rho),
        rho.numel(),
        _pointer(norm.values),
        _pointer(norm.found_inf),
    )


def sam_perturb_(table: TensorTable, norm) -> None:
    _call(table.device, "rsaft_sam_perturb", _struct(table), _pointer(norm.scale), _pointer(norm.found_inf))


def sam_restore_(table: TensorTable, norm) -> None:
    _call(table.device, "rsaft_sam_restore", _struct(table), _pointer(norm.found_inf))


def adamw_coefficients(
    table: TensorTable,
    norm,
    scalars,
    first,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    count: bool,
) -> None:
    _call(
        table.device,
        "rsaft_adamw_coefficients",
        _struct(table),
        _pointer(scalars.hyper),
        _pointer(norm.norm),
        _pointer(norm.found_inf),
        _pointer(None if first is None else first.found_inf),
        _pointer(found_inf),
        _pointer(grad_scale),
        _pointer(scalars.skip),
        _pointer(scalars.skipped),
        int(count),
    )


def sam_adamw_step_(table: TensorTable, scalars, first, restore: bool) -> None:
    first_inf = _pointer(None if first is None else first.found_inf)
    _call(table.device, "rsaft_sam_adamw_step", _struct(table), _pointer(scalars.skip), first_inf, int(restore))


def step_against_(out: torch.Tensor, images: torch.Tensor | None, grad: torch.Tensor, radius: float, norm: str) -> None:
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
        _pointer(out),
        _pointer(images),
        _pointer(grad),
        DTYPES[out.dtype],
        _ABSENT if images is None else DTYPES[images.dtype],
        DTYPES[grad.dtype],
        ctypes.c_int64(samples),
        ctypes.c_int64(elements),
        ctypes.c_double(-radius * (elements**0.5 if norm == "rms" else 1.0)),
        int(norm == "linf"),
        _pointer(workspace),
    )
