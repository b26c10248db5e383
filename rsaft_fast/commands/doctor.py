"""`rsaft-fast doctor`: what is here, what will run, and what to change."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata

import torch

from rsaft_fast.errors import describe_error
from rsaft_fast.figures.tables import aligned
from rsaft_fast.importing import version_of
from rsaft_fast.ops import backends

REQUIRED = ("rsaft_fast", "torch", "triton", "diffusers", "transformers", "peft", "safetensors", "accelerate")
EXTRAS = {
    "low-bit": "8-bit optimizer state and NF4 base weights",
    "xformers": "another attention backend; its PyPI wheel needs CUDA 12's runtime",
    "hps": "cleans the prompts of HPSv2 and HPSv2.1, which refuse to run without it",
    "ocr": "the OCR reward",
    "server": "rsaft-fast serve",
    "prompts": "prompt sets in parquet",
    "bench": "whom rsaft-fast bench measures beside us",
    "test": "the tests",
    "docs": "builds the pages of docs/",
}
"""What each extra of pyproject.toml is for, in its order."""


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast doctor`."""
    for title, lines in (
        ("versions", _versions()),
        ("device", _device()),
        ("backends of the operations, in the order in which they are tried", _backends()),
        ("attention", _attention()),
        ("extras", _optional()),
        ("advice", _advice()),
    ):
        print(f"{title}:")
        for line in lines:
            print(f"  {line}")
    return 0


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in REQUIRED:
        yield f"{package} {version_of(package) or 'is missing: pip install ' + package}"


def _device() -> Iterator[str]:
    yield f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield (
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        yield f"no GPU: torch was built with {built}"


def _backends() -> Iterator[str]:
    rows = [(row.backend, "runs" if row.available else "no", row.why) for row in backends.describe()]
    yield from aligned(rows, left=3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    forced = os.environ.get(backends.ENV)
    try:
        yield f"used on {device.type}: {backends.choose(device)}" + (f" ({backends.ENV}={forced})" if forced else "")
    except (RuntimeError, ValueError) as error:
        yield f"used on {device.type}: none. {error}"


def _attention() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "scaled_dot_product_attention on the CPU"
        return
    kinds = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    yield "scaled_dot_product_attention with " + ", ".join(name for name, enabled in kinds.items() if enabled)


def _optional() -> Iterator[str]:
    """A line for each extra: what it is for, and which of its packages are here."""
    packages = extras()
    for extra, purpose in EXTRAS.items():
        names = packages.get(extra, [])
        found = [f"{name} {version}" for name in names if (version := version_of(name))]
        missing = [name for name in names if not version_of(name)]
        line = f"{extra} ({purpose}): {', '.join(found) or 'none of it is here'}"
        if missing:
            without = f"without {', '.join(missing)}: " if found else ""
            line += f"; {without}pip install 'rsaft_fast[{extra}]'"
        yield line


def extras() -> dict[str, list[str]]:
    """The packages of each extra, as the installed distribution declares them."""
    found: dict[str, list[str]] = {}
    # Run from a folder of sources, nothing declares them.
    declared = metadata.requires("rsaft_fast") if version_of("rsaft_fast") else None
    for requirement in declared or []:
        match = re.match(r"([\w.\-]+).*;.*extra *== *['\"]([\w\-]+)['\"]", requirement)
        if match:
            found.setdefault(match[2], []).append(match[1])
    return found


def _advice() -> Iterator[str]:
    found = list(faults())
    yield from found or ["nothing to change"]


def faults() -> Iterator[str]:
    """What is wrong with this installation, each with its mend."""
    if fault := _torchvision_fault():
        yield fault
    if importlib.util.find_spec("kernels") is not None and version_of("kernels"):
        yield "the package kernels makes bitsandbytes look for kernels on the hub when it is imported: uninstall it"
    if not torch.version.cuda:
        yield (
            f"torch {torch.__version__} is built without CUDA: with an NVIDIA GPU in this machine, install the build "
            "with CUDA (pytorch.org/get-started); without one the demo runs, and real models are out of reach"
        )
    if torch.version.cuda and not torch.cuda.is_available():
        yield f"torch was built for CUDA {torch.version.cuda} but finds no GPU: check the driver with nvidia-smi"
    if torch.cuda.is_available() and (version := version_of("xformers")) and not _xformers_loads():
        yield f"xformers {version} does not load its CUDA library with torch {torch.__version__}: uninstall it"


def _torchvision_fault() -> str | None:
    """torchvision of another build than torch breaks transformers' image processors when they are imported."""
    version = version_of("torchvision")
    if version is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        # A mismatched build fails in whatever way its missing operator does.
        return (
            f"torchvision {version} does not fit torch {torch.__version__} ({describe_error(error)}); "
            "uninstall it (it is not needed) or install the one built with this torch"
        )
    return None


def _xformers_loads() -> bool:
    try:
        return bool(importlib.import_module("xformers")._has_cpp_library)
    except Exception:
        # Any failure to load is the answer that was asked for.
        return False
