"""Python's own cost: host time until perturb() and step() have returned, the device never waited for.

static    gradients stay where they are, and the optimizer was promised so (`static_gradients=True`)
checked   they stay, and the optimizer looks at every address in every pass
moved     every pass finds new ones, as after `zero_grad(set_to_none=True)`: addresses are uploaded

Without a GPU a library with the ABI of csrc/ whose functions return at once takes the place of ours, and the tensors
have one element: Python's time is left, and the foreign calls', without the driver's launches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsaft_fast.benchmarks.peers import Problem
from rsaft_fast.benchmarks.providers import Ours
from rsaft_fast.benchmarks.timing import Part
from rsaft_fast.ops import library

LISTS = ("sdxl-lora32", "flux1-lora32", "sd15-lora32", "sd35-medium-lora32")
EMPTY_NOTE = "on the CPU, its library's functions return at once: Python and foreign calls, no launches"
VARIANTS = ("static", "checked", "moved")


def what_of(variant: str) -> str:
    return f"host-{variant}"


def host_parts(problem: Problem, backend: str) -> dict[str, Part]:
    """A whole update of each variant, by `what_of` its name. Each has its own weights."""
    return {what_of(variant): _part(problem, backend, variant) for variant in VARIANTS}


def _part(problem: Problem, backend: str, variant: str) -> Part:
    ours = Ours(problem, backend, static_gradients=variant == "static")
    if variant != "moved":
        return Part(ours.update, ours.use)
    sets = [problem.gradients, [gradient.clone() for gradient in problem.gradients]]

    def move() -> None:
        ours.use()
        sets.reverse()
        for parameter, gradient in zip(ours.parameters, sets[0]):
            parameter.grad = gradient

    return Part(ours.update, move)


def why_not_empty() -> str | None:
    """Why the library of empty functions cannot be built here, or None."""
    return None if shutil.which("cc") else "needs a C compiler (cc) for a library of empty functions"


@contextmanager
def empty_library() -> Iterator[None]:
    """Within, the backend "cuda" takes tensors on the CPU and computes nothing.

    Raises:
        subprocess.CalledProcessError: the compiler fails.
    """
    functions = {name: f"int {name}(void) {{ return 0; }}" for name in library._ARGUMENTS} | {
        "rsaft_abi_version": f"int rsaft_abi_version(void) {{ return {library.ABI_VERSION}; }}",
        # Versions of 0: the library says that it is made for tensors on the CPU.
        "rsaft_cuda_versions": "int rsaft_cuda_versions(int *runtime, int *driver) { return *runtime = *driver = 0; }",
        "rsaft_error_string": 'const char *rsaft_error_string(int error) { return error ? "unknown" : ""; }',
    }
    before = os.environ.get(library.ENV)
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "empty.c"), Path(folder, "librsaft.so")
        source.write_text("\n".join(functions.values()) + "\n", encoding="utf-8")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", source, "-o", built], check=True, capture_output=True)
        os.environ[library.ENV] = str(built)
        library.forget()
        try:
            yield
        finally:
            os.environ.pop(library.ENV)
            if before is not None:
                os.environ[library.ENV] = before
            library.forget()
