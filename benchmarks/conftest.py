"""Options, and the results file: rows are written as they are measured, so that a cut run keeps what it has."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from timing import Timer, bandwidths  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("rsaft_fast")
    group.addoption(
        "--cases", default=None, help="comma-separated parameter lists; default: tiny without a GPU, all with one"
    )
    group.addoption("--results", default=None, help="folder for the JSON of this run, such as benchmarks/results")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def timer(device):
    return Timer(device)


@pytest.fixture(scope="session")
def record(request, device):
    """A function that adds a row to this run's results."""
    head = describe_machine(device) | bandwidths(device)
    rows: list[dict] = []
    folder = request.config.getoption("--results")
    path = None
    if folder:
        path = Path(folder) / head["gpu"].replace(" ", "-") / f"{head['date'].replace(':', '')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(row: dict, bytes_moved: float | None = None) -> dict:
        if bytes_moved is not None:
            row["gbps"] = bytes_moved / row["ms_p50"] / 1e6
            row["fraction_of_copy"] = row["gbps"] / head["copy_gbps"]
        rows.append(row)
        if path is not None:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        return row

    return add


def describe_machine(device: torch.device) -> dict:
    """What a figure depends on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": gpu,
        "driver": _said(query) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "commit": _said(["git", "rev-parse", "--short", "HEAD"]) or os.environ.get("RSAFT_COMMIT"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _said(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
