"""Loader of the compiled libraries (csrc/), through ctypes: beside the package or at `RSAFT_LIBRARY`, loaded once.

The same sources serve tensors on GPUs, compiled by nvcc, and tensors in host memory, compiled by the C++ compiler.
"""

import ctypes
import functools
import os
from pathlib import Path

import torch

ABI_VERSION = 4
ENV = "RSAFT_LIBRARY"

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_ARGUMENTS = {
    "rsaft_cuda_versions": (_P, _P),
    "rsaft_cuda_serves_device": (),
    "rsaft_cuda_architectures": (),
    "rsaft_error_string": (_I,),
    "rsaft_sum_of_squares": (_P, _I, _P),
    "rsaft_finish_norm": (_P, _P, _I, _P, _I, _P, _P, _P, _P, _P),
    "rsaft_sam_perturb": (_P, _P, _P, _P),
    "rsaft_sam_restore": (_P, _P, _P),
    "rsaft_adamw_coefficients": (_P, _I, _P, _P, _P, _P),
    "rsaft_sam_adamw_step": (_P, _P, _P, _I, _P),
    "rsaft_perturb_images": (_P, _P, _P, _I, _I, _L, _L, _D, _I, _P, _P),
}
"""Of the functions in csrc/rsaft.h: given once, so that a call converts plain integers and nothing else."""


CPU_AVX2, CPU_ANY = "librsaft_cpu_avx2.so", "librsaft_cpu.so"
"""The library for host memory, compiled for processors with AVX2 and for every one (setup.py)."""

_NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice
_LEAST_CAPABILITY = (8, 0)  # the kernels' reductions over a warp, and their bf16


class LibraryError(RuntimeError):
    """A compiled library cannot be used; the text says why and what mends it."""


@functools.cache
def load(device_type: str = "cuda") -> ctypes.CDLL:
    """Load the library for tensors on devices of this type, and check its ABI and the driver.

    Raises:
        LibraryError: not built, of another ABI, or newer than the driver.
    """
    path = path_of(device_type)
    if not path.is_file():
        what, compiler = ("CUDA", "nvcc") if device_type == "cuda" else ("CPU", "a C++ compiler (g++)")
        raise LibraryError(f"the {what} library is not built: install again where {compiler} is on PATH")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path.name} cannot be loaded: {error}") from error
    found = library.rsaft_abi_version()
    if found != ABI_VERSION:
        raise LibraryError(f"{path.name} has ABI {found}, this package speaks {ABI_VERSION}: build it again")
    for name, types in _ARGUMENTS.items():
        getattr(library, name).argtypes = types
    library.rsaft_error_string.restype = library.rsaft_cuda_architectures.restype = ctypes.c_char_p
    return library


def path_of(device_type: str) -> Path:
    """Give the path of the library for devices of this type: `RSAFT_LIBRARY`, else in the package.

    On the CPU it is the one that this processor can run.
    """
    if os.environ.get(ENV):
        return Path(os.environ[ENV])
    package = Path(__file__).parents[1]
    if device_type == "cuda":
        return package / "librsaft.so"
    fast = package / CPU_AVX2
    return fast if has_avx2() and fast.is_file() else package / CPU_ANY


def has_avx2() -> bool:
    """Tell whether torch finds the instructions that `CPU_AVX2` is made of."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def cuda_versions(library: ctypes.CDLL) -> tuple[int, int]:
    """Read the CUDA versions of the library's runtime and of the driver; 13010 is 13.1, 0 is none."""
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    check(library, library.rsaft_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver)))
    return runtime.value, driver.value


def check(library: ctypes.CDLL, error: int) -> None:
    """Raise `LibraryError` for an error code that the library returned: CUDA's, or that of host memory."""
    if error:
        runtime, driver = ctypes.c_int(), ctypes.c_int()
        library.rsaft_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
        kind = "CUDA error" if runtime.value else "error"
        raise LibraryError(f"{kind} {error}: {library.rsaft_error_string(error).decode()}")


@functools.cache
def why_not(device_type: str = "cuda", wanted: str = "cuda", index: int | None = None) -> str | None:
    """Say why the library `wanted` ("cuda", "cpu") cannot serve tensors on this device; None when it can.

    Args:
        index: which GPU; None is the one that is current now, for this and every later answer: `backends` names it.

    `RSAFT_LIBRARY` takes the place of either, even one for host memory that of "cuda": the tests' instrument.
    """
    try:
        runtime, driver = cuda_versions(load(wanted))
    except LibraryError as error:
        return str(error)
    made_for = "cuda" if runtime else "cpu"
    # The driver first: without a fit one torch sees no GPU, and whoever asks has tensors on the CPU alone.
    if made_for == "cuda" and driver == 0:
        return "the CUDA library is built, but there is no NVIDIA driver"
    # Within one major version a driver serves newer runtimes.
    if driver // 1000 < runtime // 1000:
        return (
            f"the CUDA library holds CUDA {_dotted(runtime)} and the driver serves up to {_dotted(driver)}: "
            "update the driver"
        )
    if device_type != made_for:
        return f"the library is built for tensors on {made_for}, and these are on {device_type}"
    if made_for == "cpu":
        return None
    return _why_not_card(load(wanted), index)


def _why_not_card(library: ctypes.CDLL, index: int | None) -> str | None:
    """Ask the driver, as a launch would, for machine code for this card, or PTX to make it from."""
    with torch.cuda.device(torch.cuda.current_device() if index is None else index):
        error = library.rsaft_cuda_serves_device()
        if not error:
            return None
        said = library.rsaft_error_string(error).decode()
        if error != _NO_KERNEL_IMAGE:
            return f"the CUDA library cannot run on this GPU: CUDA error {error}, {said}"
        major, minor = torch.cuda.get_device_capability()
    built = ", ".join(f"{int(each) / 100:.1f}" for each in library.rsaft_cuda_architectures().decode().split(","))
    if (major, minor) < _LEAST_CAPABILITY:
        mend = f"it needs {'.'.join(map(str, _LEAST_CAPABILITY))} or newer"
    else:
        mend = f"build it again with RSAFT_ARCHITECTURES={major}{minor}"
    return f"the CUDA library is built for compute capability {built}, and this GPU has {major}.{minor}: {mend}"


_search = 0


def search_number() -> int:
    """Count the searches for the library so far: an answer belongs to the search that it came from."""
    return _search


def forget() -> None:
    """Look for the library again at the next call (after `RSAFT_LIBRARY` has changed)."""
    global _search
    _search += 1
    load.cache_clear()
    why_not.cache_clear()


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
