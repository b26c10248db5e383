"""A library with the ABI of csrc/ whose functions return at once: what is left of an update is Python's own time."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsaft_fast.ops import library

_RETURNING = "int {name}(void) {{ return 0; }}"
_SPECIAL = {
    # Versions of 0: the library says that it is made for tensors on the CPU.
    "rsaft_cuda_versions": "int rsaft_cuda_versions(int *runtime, int *driver) { return *runtime = *driver = 0; }",
    "rsaft_error_string": 'const char *rsaft_error_string(int error) { return error ? "unknown" : ""; }',
}


def why_not() -> str | None:
    """Why it cannot be built here, or None."""
    return None if shutil.which("cc") else "needs a C compiler (cc) for a library of empty functions"


@contextmanager
def empty_library() -> Iterator[None]:
    """Within, the backend "cuda" takes tensors on the CPU and computes nothing.

    Raises:
        subprocess.CalledProcessError: the compiler fails.
    """
    before = os.environ.get(library.ENV)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[library.ENV] = str(_build(Path(folder)))
        library.forget()
        try:
            yield
        finally:
            os.environ.pop(library.ENV)
            if before is not None:
                os.environ[library.ENV] = before
            library.forget()


def _build(folder: Path) -> Path:
    lines = [f"int rsaft_abi_version(void) {{ return {library.ABI_VERSION}; }}"]
    lines += [_SPECIAL.get(name, _RETURNING.format(name=name)) for name in library._ARGUMENTS]
    source, built = folder / "empty.c", folder / "librsaft.so"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", str(source), "-o", str(built)], check=True, capture_output=True)
    return built
