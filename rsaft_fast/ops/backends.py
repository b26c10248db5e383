"""Choice of the backend that runs the operations: CUDA library, Triton kernels, CPU library or plain torch.

Tried in that order.

A missing backend never fails at import; it fails when it is forced with `RSAFT_BACKEND` and asked to run.
"""

import functools
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch

from rsaft_fast.ops import cuda, library, reference

ORDER = ("cuda", "triton", "cpu", "torch")
ENV = "RSAFT_BACKEND"

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendRow(NamedTuple):
    """One line of `rsaft-fast doctor`: a backend, whether it runs on this machine, and why (not)."""

    backend: str
    available: bool
    why: str


def describe() -> list[BackendRow]:
    """List each backend, whether it is available, and why, in the order in which they are tried."""
    gpu = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    rows = []
    for backend in ORDER:
        obstacle = why_not(backend, torch.device("cpu") if backend == "cpu" else gpu)
        rows.append(BackendRow(backend, obstacle is None, obstacle or _why(backend, gpu)))
    return rows


def forced() -> str | None:
    """Read the backend that `RSAFT_BACKEND` names; None when the choice is free."""
    name = os.environ.get(ENV)
    if not name:
        return None
    if name not in ORDER:
        raise ValueError(f"{ENV}={name!r}: not a backend; use one of {', '.join(ORDER)}, or unset it")
    return name


def why_not(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> str | None:
    """Say why `backend` cannot run on tensors of this device and these dtypes; None when it can."""
    if backend == "torch":
        return None
    if backend in ("cuda", "cpu"):
        obstacle = library.why_not(device.type, backend, _placed(device).index)
        if obstacle is not None:
            return obstacle
    elif not _has_triton():
        return "the package triton is not installed"
    elif device.type != "cuda" and not _interpreting():
        return f"Triton needs a CUDA device and the tensors are on {device.type} (TRITON_INTERPRET=1 runs it there)"
    unsupported = [str(dtype) for dtype in dtypes if dtype not in _KERNEL_DTYPES]
    if unsupported:
        return f"the kernels take float32, bfloat16 and float16, not {', '.join(unsupported)}"
    return None


def choose(device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> str:
    """Name the backend for tensors of this device and these dtypes.

    Raises:
        RuntimeError: a backend is forced with `RSAFT_BACKEND` and cannot run on them.
    """
    name = forced()
    if name is not None:
        obstacle = why_not(name, device, dtypes)
        if obstacle is not None:
            raise RuntimeError(f"{ENV}={name} is forced, but {obstacle}")
        return name
    # On the CPU, Triton's interpreter and the kernels walking as on a GPU are tests' instruments: never picked.
    order = ORDER if device.type == "cuda" else ("cpu", "torch")
    return next(name for name in order if why_not(name, device, dtypes) is None)


def implementation(device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> ModuleType:
    """Import the module that implements the operations for tensors of this device and these dtypes."""
    # Asked several times a step: looked up again only when what the choice depends on has changed.
    return _implementation(
        _placed(device), dtypes, os.environ.get(ENV), os.environ.get("TRITON_INTERPRET"), library.search_number()
    )


@functools.lru_cache(maxsize=256)
def _implementation(device: torch.device, dtypes: tuple[torch.dtype, ...], *_: object) -> ModuleType:
    name = choose(device, dtypes)
    if name == "triton":
        return triton_kernels()
    return reference if name == "torch" else cuda  # which works over either library


def triton_kernels() -> ModuleType:
    """The module of the Triton kernels. It is loaded at the first call: importing it needs Triton."""
    from rsaft_fast import kernels

    return kernels


def _placed(device: torch.device) -> torch.device:
    """Give the device with the number of its GPU: answers are kept, and which one is current changes."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why(backend: str, gpu: torch.device) -> str:
    if backend == "torch":
        return f"plain torch {torch.__version__}, any device and dtype"
    if backend == "cpu":
        return f"compiled library {library.path_of('cpu').name} (csrc/), torch's {torch.get_num_threads()} thread(s)"
    if backend == "cuda":
        return f"compiled library (csrc/) on {torch.cuda.get_device_name() if gpu.type == 'cuda' else 'the CPU'}"
    where = torch.cuda.get_device_name() if gpu.type == "cuda" else "the interpreter on the CPU (TRITON_INTERPRET=1)"
    import triton

    return f"Triton {triton.__version__} on {where}"
