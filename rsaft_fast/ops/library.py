"""The compiled library (csrc/), through ctypes: found beside the package or at ``RSAFT_LIBRARY``, loaded once."""

import ctypes
import functools
import os
from pathlib import Path

ABI_VERSION = 3
ENV = "RSAFT_LIBRARY"

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_ARGUMENTS = {
    "rsaft_cuda_versions": (_P, _P),
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


class LibraryError(RuntimeError):
    """The library cannot serve; the text says why and what mends it."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, its ABI and the driver checked.

    Raises:
        LibraryError: not built, of another ABI, or newer than the driver.
    """
    path = Path(os.environ.get(ENV) or Path(__file__).parents[1] / "librsaft.so")
    if not path.is_file():
        raise LibraryError("the CUDA library is not built: install again where nvcc is on PATH")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path.name} cannot be loaded: {error}") from error
    found = library.rsaft_abi_version()
    if found != ABI_VERSION:
        raise LibraryError(f"{path.name} has ABI {found}, this package speaks {ABI_VERSION}: build it again")
    for name, types in _ARGUMENTS.items():
        getattr(library, name).argtypes = types
    library.rsaft_error_string.restype = ctypes.c_char_p
    return library


def cuda_versions(library: ctypes.CDLL) -> tuple[int, int]:
    """CUDA version of the runtime in the library, and the newest that the driver serves; 13010 is 13.1, 0 is none."""
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    check(library, library.rsaft_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver)))
    return runtime.value, driver.value


def check(library: ctypes.CDLL, error: int) -> None:
    """Raise for a CUDA error code that a function of the library returned."""
    if error:
        raise LibraryError(f"CUDA error {error}: {library.rsaft_error_string(error).decode()}")


@functools.cache
def why_not(device_type: str = "cuda") -> str | None:
    """Why the library cannot serve tensors on devices of this type; None when it can.

    Compiled by a C++ compiler instead of nvcc, the same sources walk host memory: the tests' instrument.
    """
    try:
        runtime, driver = cuda_versions(load())
    except LibraryError as error:
        return str(error)
    made_for = "cuda" if runtime else "cpu"
    if device_type != made_for:
        return f"the library is built for tensors on {made_for}, and these are on {device_type}"
    if made_for == "cpu":
        return None
    if driver == 0:
        return "the CUDA library is built, but there is no NVIDIA driver"
    # Within one major version a driver serves newer runtimes.
    if driver // 1000 < runtime // 1000:
        return (
            f"the CUDA library holds CUDA {_dotted(runtime)} and the driver serves up to {_dotted(driver)}: "
            "update the driver"
        )
    return None


_search = 0


def looked_for() -> int:
    """Which search for the library its present answers come from."""
    return _search


def forget() -> None:
    """Look for the library again at the next call (after ``RSAFT_LIBRARY`` has changed)."""
    global _search
    _search += 1
    load.cache_clear()
    why_not.cache_clear()


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
